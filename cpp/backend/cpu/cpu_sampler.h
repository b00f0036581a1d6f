#pragma once

#include <deque>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels/softmax.h"
#include "backend/cpu/thread_pool.h"

namespace based::cpu {

/// Rows are sampled in parallel. Of equal logits the lower token id is the likelier one, for the maximum, top_k, top_p
/// and logprobs. A token is drawn by inverting the distribution function over the kept tokens, in order of their ids,
/// at one uniform number (philox.h).
class CpuSampler final : public backend::Sampler {
 public:
  CpuSampler(std::shared_ptr<ThreadPool> pool, const SoftmaxKernels& kernels, std::int64_t vocab_size, int num_rows);

  void assign(int row, const SamplingParams& params, std::uint64_t seed, std::uint32_t sequence,
              std::span<const std::int32_t> prompt, std::span<const std::int32_t> stop_ids,
              std::span<const backend::SeenToken> seen = {}) override;
  void sample(const backend::Matrix& logits, const backend::RaggedBatch& batch) override;
  std::vector<backend::SampledToken> take() override;

  /// What was chosen last for a row; −1: its last sampling failed, or there was none since assign().
  std::int32_t chosen(std::int32_t row) const { return rows_[static_cast<std::size_t>(row)].chosen; }

 private:
  // A token that penalties concern.
  struct Seen {
    std::int32_t token;
    std::int32_t count;  // in the output
    bool in_prompt;
  };
  struct Row {
    SamplingParams params;
    std::uint64_t seed = 0;
    std::uint32_t sequence = 0;
    std::int64_t num_output = 0;
    std::int32_t chosen = -1;
    std::vector<std::int32_t> stop_ids;     // those of the vocabulary
    std::vector<Seen> seen;                 // only with penalties
    std::vector<std::int32_t> seen_number;  // (vocab_size), token → 1 + index in `seen`; empty without penalties

    bool has_penalties() const;
    bool changes_logits() const;
    bool selects() const;
    void see(std::int32_t token, bool in_prompt);
  };
  struct Candidate {
    float logit;
    float weight;
    std::int32_t token;
  };
  // Of one thread. Grown before the threads start: no task allocates.
  struct Workspace {
    std::vector<float> logits, weights;
    std::vector<Candidate> candidates;
  };
  // The logits ≥ threshold.
  struct Bound {
    float threshold;
    std::int64_t count;
    double weight;
  };
  // Two thresholds: enough logits from the lower one on, too few from the higher one on.
  struct Bracket {
    Bound low{-std::numeric_limits<float>::infinity(), 0, 0};
    Bound high{std::numeric_limits<float>::infinity(), 0, 0};
  };
  enum class Failure : std::uint8_t { none, no_logit, no_token };

  void reserve(std::span<const std::int32_t> rows);
  Failure choose(const Row& row, const float* logits, std::int64_t position, Workspace& workspace,
                 backend::SampledToken& result) const;
  void change_logits(const Row& row, float* logits) const;
  std::int32_t draw(const Row& row, const float* logits, const SoftmaxStats& stats, double random,
                    Workspace& workspace) const;
  std::span<const Candidate> keep_candidates(const Row& row, const float* logits, float max,
                                             Workspace& workspace) const;
  template <typename Above, typename Enough>
  static Bracket narrow(double max, double temperature, Above&& above, Enough&& enough);
  std::span<Candidate> collect(const float* logits, const float* weights, float low, float high, double least_weight,
                               Workspace& workspace) const;
  void likeliest(const float* logits, const SoftmaxStats& stats, Workspace& workspace, std::size_t count,
                 std::vector<TokenLogprob>& out) const;

  std::shared_ptr<ThreadPool> pool_;
  const SoftmaxKernels& kernels_;
  std::int64_t vocab_size_;
  std::vector<Row> rows_;
  std::vector<Workspace> workspaces_;
  std::deque<std::vector<backend::SampledToken>> steps_;  // sampled, not taken
};

}  // namespace based::cpu
