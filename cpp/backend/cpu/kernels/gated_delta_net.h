#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Backend::gated_delta_net for one head of one sequence. Pointers are to the sequence's first token of the call.
struct GatedDeltaNetTask {
  const float* taps;      // (channels, K)
  const float* norm;      // (head_dim)
  const float* log_rate;  // the head's; null without a decay
  const float* dt_bias;   // the head's; null without a decay
  const float* u;  // rows [q, k, v of all heads (channels) | b (H) | a (H) | g (H · head_dim)] of `width` numbers
  std::int64_t num_heads, key_dim, head_dim, kernel_size, width, num_tokens;
  std::int64_t head;
  float eps;
  bool output_gate;
  float* past;   // (K − 1, channels): u before the call, oldest first
  float* state;  // (key_dim, head_dim)
  void* out;     // rows of H · head_dim float, or bfloat16 when out_bf16
  bool out_bf16;
  float* scratch;  // delta_scratch() floats
};

/// q, k and v of a token, each in whole vectors of any instruction set, and a result.
constexpr std::int64_t delta_scratch(std::int64_t key_dim, std::int64_t head_dim) {
  const auto whole = [](std::int64_t n) { return (n + 15) / 16 * 16; };
  return 2 * whole(key_dim) + 2 * whole(head_dim);
}

struct GatedDeltaNetKernels {
  void (*advance)(const GatedDeltaNetTask& task);
};

const GatedDeltaNetKernels& gated_delta_net_kernels(IsaTag<Isa::baseline>);
const GatedDeltaNetKernels& gated_delta_net_kernels(IsaTag<Isa::avx2>);
const GatedDeltaNetKernels& gated_delta_net_kernels(IsaTag<Isa::avx512>);
const GatedDeltaNetKernels& gated_delta_net_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
