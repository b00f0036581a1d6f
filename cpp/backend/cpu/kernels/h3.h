#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Backend::h3 for one head of one sequence. Pointers are to the sequence's first token of the call.
struct H3Task {
  const float* taps;    // (channels, K)
  const float* decay;   // (2, M), the head's; so weight
  const float* weight;  // (2, M)
  float skip;
  const float* qkv;                // rows [q (channels) | k (channels) | v (channels)]
  std::int64_t channels, channel;  // of all heads; the head's first
  std::int64_t head_dim, kernel_size, num_modes, num_tokens;
  float* past;   // (K − 1, channels): k before the call, oldest first
  float* state;  // (head_dim, head_dim, 2, M)
  void* out;     // (tokens, channels) float, or bfloat16 when out_bf16
  bool out_bf16;
  float* scratch;  // h3_scratch() floats
};

/// k and the result of a token, each in whole vectors of any instruction set.
constexpr std::int64_t h3_scratch(std::int64_t head_dim) { return 2 * ((head_dim + 15) / 16 * 16); }

struct H3Kernels {
  void (*advance)(const H3Task& task);
};

const H3Kernels& h3_kernels(IsaTag<Isa::baseline>);
const H3Kernels& h3_kernels(IsaTag<Isa::avx2>);
const H3Kernels& h3_kernels(IsaTag<Isa::avx512>);
const H3Kernels& h3_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
