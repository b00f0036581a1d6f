#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// out[t, c] = SiLU(Σ_j taps[c, j] · u₁[t − K + 1 + j, c] + bias[c]) · u₂[t, c] for tokens [token_begin, token_end) of
/// a sequence and channels [channel_begin, channel_end).
struct GatedConvTask {
  const float* taps;  // (e, K)
  const float* bias;  // (e); null for none
  bool gated;         // false: without the factor u₂
  const float* u;     // the sequence's first token of the call: rows [u₁ (e) | u₂ (e), where gated] of `width`
  const float* past;  // (K − 1, e): u₁ before it, oldest first
  std::int64_t inner_size, kernel_size, width;
  std::int64_t token_begin, token_end;
  std::int64_t channel_begin, channel_end;
  void* out;  // the first token's row of (N, e) float, or bfloat16 when out_bf16
  bool out_bf16;
  float* scratch;  // kernel_size · (channel_end − channel_begin) floats
};

struct GatedConvKernels {
  void (*convolve)(const GatedConvTask& task);
};

const GatedConvKernels& gated_conv_kernels(IsaTag<Isa::baseline>);
const GatedConvKernels& gated_conv_kernels(IsaTag<Isa::avx2>);
const GatedConvKernels& gated_conv_kernels(IsaTag<Isa::avx512>);
const GatedConvKernels& gated_conv_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
