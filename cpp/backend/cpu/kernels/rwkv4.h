#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Backend::rwkv4_shift for one sequence and channels [channel_begin, channel_end). Pointers are to the sequence's
/// first token of the call.
struct Rwkv4ShiftTask {
  const void* x;        // (tokens, d) float, or bfloat16 when bf16; so mixed
  const float* mix[3];  // (d)
  void* mixed[3];       // (tokens, d)
  bool bf16;
  std::int64_t hidden_size, num_tokens;
  std::int64_t channel_begin, channel_end;
  float* before;  // (d): the token before
};

/// Backend::rwkv4, likewise.
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
  void (*shift)(const Rwkv4ShiftTask& task);
  void (*advance)(const Rwkv4Task& task);
};

const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::baseline>);
const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::avx2>);
const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::avx512>);
const Rwkv4Kernels& rwkv4_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
