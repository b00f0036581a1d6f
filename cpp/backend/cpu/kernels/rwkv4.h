#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"
#include "backend/cpu/kernels/token_shift.h"

namespace based::cpu {

/// Backend::rwkv4 for one sequence and channels [channel_begin, channel_end). Pointers are to the sequence's first
/// token of the call.
struct Rwkv4Task {
  const float* decay;      // (e)
  const float* first;      // (e)
  const float *k, *v, *r;  // (tokens, e)
  std::int64_t inner_size, num_tokens;
  std::int64_t channel_begin, channel_end;
  float* state;  // (3, e): numerator, denominator, exponent
  void* out;     // (tokens, e) float, or bfloat16 when out_bf16
  bool out_bf16;
};

struct Rwkv4Kernels {
  void (*shift)(const TokenShiftTask<3>& task);
  void (*advance)(const Rwkv4Task& task);
};

const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::baseline>);
const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::avx2>);
const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::avx512>);
const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
