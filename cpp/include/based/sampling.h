#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace based {

/// How to choose tokens: vLLM's names and meanings. Applied in this order: logit_bias, min_tokens (stop ids are
/// impossible before it), repetition / presence / frequency penalties, temperature, min_p, top_k, top_p.
/// Penalties: repetition counts prompt and output tokens, presence and frequency output tokens only.
struct SamplingParams {
  static constexpr int kMaxSamples = 1 << 14;
  static constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();

  int n = 1;                                 // samples per prompt, 1 … kMaxSamples
  std::int64_t max_tokens = 16;              // ≥ 1; kNoLimit: until something else ends it, Model::max_context too
  std::int64_t min_tokens = 0;               // 0 … max_tokens
  double temperature = 1.0;                  // ≥ 0; 0 = greedy
  double top_p = 1.0;                        // (0, 1]
  std::int64_t top_k = 0;                    // 0 or −1: all; else ≥ 1
  double min_p = 0.0;                        // [0, 1]
  double repetition_penalty = 1.0;           // > 0
  double presence_penalty = 0.0;             // [−2, 2]
  double frequency_penalty = 0.0;            // [−2, 2]
  std::optional<std::uint64_t> seed;         // none: a fresh one per request
  std::vector<std::int64_t> stop_token_ids;  // end the sequence; kept in token_ids
  bool ignore_eos = false;                   // do not end at the model's eos_token_id
  std::optional<int> logprobs;               // also return the log-probabilities of this many likeliest tokens,
                                             // from the model's own distribution (before any of the above); ≥ 0
  std::vector<std::pair<std::int64_t, double>> logit_bias;  // (token id, [−100, 100] added to its logit)

  /// Throws InvalidArgument naming the field, its value and its domain. Token ids must lie in [0, vocab_size).
  void validate(std::int64_t vocab_size) const;
};

struct TokenLogprob {
  std::int32_t token = 0;
  float logprob = 0;
};

}  // namespace based
