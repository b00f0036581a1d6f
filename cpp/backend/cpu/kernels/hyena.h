#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Backend::hyena for one sequence and channels [channel_begin, channel_end). Pointers are to the sequence's first
/// token of the call, which stands at position `start`.
struct HyenaTask {
  const float* taps;    // (3e, K)
  const float* bias;    // (3e)
  const float* filter;  // (L, e)
  const float* skip;    // (e)
  const float* u;       // rows [x₁ (e) | x₂ (e) | v (e)] before the convolution
  std::int64_t inner_size, kernel_size, start, num_tokens;
  std::int64_t channel_begin, channel_end;
  float* past;      // (K − 1, 3e): u before the call, oldest first
  float* products;  // (L, e)
  void* out;        // (tokens, e) float, or bfloat16 when out_bf16
  bool out_bf16;
};

struct HyenaKernels {
  void (*advance)(const HyenaTask& task);
};

const HyenaKernels& hyena_kernels(IsaTag<Isa::baseline>);
const HyenaKernels& hyena_kernels(IsaTag<Isa::avx2>);
const HyenaKernels& hyena_kernels(IsaTag<Isa::avx512>);
const HyenaKernels& hyena_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
