#pragma once

// Launchers of sampling.cu and what they share with the sampler on the host. As kernels.h.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "based/sampling.h"
#include "kernels.h"

namespace based::cuda {

/// Weights e^((x − max) / T) are summed as integers of this many fraction bits: sums of any order are equal, and those
/// of kMaxVocabSize weights do not overflow.
constexpr int kWeightBits = 42;
constexpr std::int64_t kMaxVocabSize = std::int64_t{1} << 21;

/// A token with what is added to its logit. Entries of one token are neighbours, in the order they are added.
struct BiasedToken {
  std::int32_t token = 0;
  float bias = 0;
};

/// One sequence's sampling parameters and history, in device memory. Its buffers are device memory but for `top`.
struct SamplerRow {
  std::uint64_t seed = 0;
  std::uint32_t sequence = 0;
  float inverse_temperature = 0;  // of base 2: log₂e / temperature; read when `draws`
  bool draws = false;             // false: greedy
  float min_p = 0;
  double top_p = 1;
  std::int32_t top_k = 0;  // 0: all
  std::int32_t num_bias = 0, num_stop = 0;
  std::int32_t num_top = 0;     // top_logprobs wanted
  std::int64_t num_output = 0;  // counted by the kernel
  std::int64_t min_tokens = 0;
  double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  const BiasedToken* bias = nullptr;     // (num_bias)
  const std::int32_t* stop = nullptr;    // (num_stop), of the vocabulary
  std::uint32_t* seen = nullptr;         // (padded vocabulary): kInPrompt | times in the output; null: no penalties
  float* changed_logits = nullptr;       // (padded vocabulary), scratch; null: nothing changes logits
  TokenLogprob* top_logprobs = nullptr;  // (ring size, num_top), host memory
};

constexpr std::uint32_t kInPrompt = 1u << 31;

/// Elements of a row's vocabulary-sized buffers: whole vectors of 4.
constexpr std::int64_t padded_vocabulary(std::int64_t vocab_size) { return (vocab_size + 3) / 4 * 4; }

/// skipped: the step was to feed the row's last choice, and there was none.
enum class SamplingFailure : std::int32_t { none, no_logit, no_token, skipped };

struct alignas(16) SamplingResult {
  std::int32_t token;
  float logprob;
  SamplingFailure failure;
  std::int32_t num_top;
};

/// A sampler's memory.
struct SamplerView {
  SamplerRow* rows = nullptr;      // (num_rows)
  std::int32_t* chosen = nullptr;  // (num_rows) the last token of each row; −1: its last sampling failed, or none was
  std::uint32_t* counters = nullptr;  // (2) steps done; blocks of this step that ended
  SamplingResult* ring = nullptr;     // (ring_size, num_rows), host memory: step s writes entry s mod ring_size
  int num_rows = 0;
  std::uint32_t ring_size = 0;  // a power of 2
};

/// Sampler::sample for the rows batch.slots of the sampler; rows that embed() marked fail as `skipped`. logits (M, ≥
/// vocab_size), row stride `cols`; any alignment to the element, faster when rows are 16-byte aligned.
void sample(cudaStream_t stream, const SamplerView& sampler, const DeviceBatch& batch, const float* logits,
            std::int64_t cols, std::int64_t vocab_size);

/// sampler.rows[row] = state and sampler.chosen[row] = −1, without waiting for a copy from the host.
void store_row(cudaStream_t stream, const SamplerView& sampler, int row, const SamplerRow& state);

/// seen[token] = kInPrompt for each of n tokens.
void mark_prompt(cudaStream_t stream, const std::int32_t* tokens, std::int64_t n, std::uint32_t* seen);

/// out[i] = log softmax(logits[i, :vocab_size])[targets[i]] for i < num_rows. NaN counts as −∞, +∞ as the largest
/// float.
void token_log_probs(cudaStream_t stream, const float* logits, std::int64_t num_rows, std::int64_t cols,
                     std::int64_t vocab_size, const std::int32_t* targets, float* out);

}  // namespace based::cuda
