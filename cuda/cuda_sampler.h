#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kernels.h"
#include "kernels/sampling.h"
#include "stream.h"

namespace based::cuda {

/// What a sampler needs of its backend, which outlives it.
class SamplerHost {
 public:
  virtual ~SamplerHost() = default;
  virtual cudaStream_t stream() const = 0;

  /// The device's copy of the batch last begun. Of a recorded step: at addresses that hold every later step's batch.
  virtual const DeviceBatch& device_batch(const backend::RaggedBatch& batch) = 0;

  /// Device memory, given back in the order of the stream.
  virtual backend::Buffer allocate_workspace(std::size_t nbytes) = 0;

  /// In the order of the stream; `host` may be reused at once.
  virtual void copy_staged(void* device, const void* host, std::size_t nbytes) = 0;

  /// Calls `launched` with the batch of each step, once its operations are enqueued: now, or, when a step is being
  /// recorded, after every replay of it.
  virtual void after_launch(std::function<void(const backend::RaggedBatch&)> launched) = 0;
};

/// Chooses as the CPU does, with the same random numbers; weights are rounded to kWeightBits, so that a draw that falls
/// on the boundary of two tokens may differ. A recorded step that samples must not be replayed when its sampler is
/// gone.
class CudaSampler final : public backend::Sampler {
 public:
  /// On the current device. Throws UnsupportedError for a vocabulary of more than kMaxVocabSize tokens.
  CudaSampler(SamplerHost& host, std::int64_t vocab_size, int num_rows);
  ~CudaSampler() override;
  CudaSampler(const CudaSampler&) = delete;
  CudaSampler& operator=(const CudaSampler&) = delete;

  void assign(int row, const SamplingParams& params, std::uint64_t seed, std::uint32_t sequence,
              std::span<const std::int32_t> prompt, std::span<const std::int32_t> stop_ids,
              std::span<const backend::SeenToken> seen = {}) override;
  void sample(const backend::Matrix& logits, const backend::RaggedBatch& batch) override;
  std::vector<backend::SampledToken> take() override;

  /// (num_rows) on the device: the token that each row chose last.
  const std::int32_t* chosen() const { return view_.chosen; }

 private:
  static constexpr std::uint32_t kRing = kMaxSteps;
  static_assert((kRing & (kRing - 1)) == 0, "the device counts steps modulo 2³²");

  // What a row's SamplerRow points to.
  struct Row {
    backend::Buffer bias, stop, seen, changed_logits;
    std::shared_ptr<void> top_logprobs;  // (kRing, num_top) TokenLogprob, pinned
    int num_top = 0;
    int top_capacity = 0;  // ≥ num_top
  };
  // A step whose tokens nobody took yet.
  struct Pending {
    std::uint32_t entry;  // of the ring
    std::vector<std::int32_t> slots;
    std::vector<std::int64_t> positions;  // of the chosen tokens
    struct Top {
      std::shared_ptr<void> logprobs;
      int num_top;
    };
    std::vector<Top> top;  // by sequence; empty when no row wants any
  };

  void launched(const backend::RaggedBatch& batch);
  backend::Buffer upload(const void* values, std::size_t nbytes);

  SamplerHost& host_;
  const int device_;
  const std::int64_t vocab_size_;
  backend::Buffer memory_;      // rows, counters, chosen
  std::shared_ptr<void> ring_;  // pinned
  SamplerView view_;
  Event events_[kRing];
  std::uint32_t num_launched_ = 0;
  std::vector<Row> rows_;
  std::deque<Pending> pending_;
};

}  // namespace based::cuda
