#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"
#include "backend/cpu/kernels/token_shift.h"

namespace based::cpu {

/// Backend::rwkv7 for one head of one sequence. Pointers are to the sequence's first token of the call, and to the
/// head's numbers of it: (head_dim), of rows of `width`.
struct Rwkv7Task {
  const float *r, *k, *v, *w, *a, *g;
  const float *k_k, *k_a, *r_k, *norm, *norm_bias;  // the head's (head_dim)
  std::int64_t width, head_dim, num_tokens;
  float eps;
  float* state;            // (head_dim, head_dim)
  void* out;               // rows of `width` float, or bfloat16 when out_bf16
  std::int64_t out_begin;  // the head's first column
  bool out_bf16;
  float* scratch;  // rwkv7_scratch() floats
};

/// κ, k, κ ⊙ a, w and the result of a token, each in whole vectors of any instruction set.
constexpr std::int64_t rwkv7_scratch(std::int64_t head_dim) { return 5 * ((head_dim + 15) / 16 * 16); }

struct Rwkv7Kernels {
  void (*shift)(const TokenShiftTask<6>& task);
  void (*tanh)(float* x, std::int64_t count);
  void (*sigmoid)(float* x, std::int64_t count);
  void (*advance)(const Rwkv7Task& task);
};

const Rwkv7Kernels& rwkv7_kernels(IsaTag<Isa::baseline>);
const Rwkv7Kernels& rwkv7_kernels(IsaTag<Isa::avx2>);
const Rwkv7Kernels& rwkv7_kernels(IsaTag<Isa::avx512>);
const Rwkv7Kernels& rwkv7_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
