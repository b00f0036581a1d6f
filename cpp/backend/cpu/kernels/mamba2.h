#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// The recurrence of Backend::mamba2 for one head of one sequence, and the gate. Pointers are to the sequence's first
/// token of the call, and to the head's numbers of it.
struct Mamba2Task {
  float* x;                          // (head_dim), of rows of xbc_width: overwritten by (Sᵀ C + D x) ⊙ SiLU(z)
  const float *b, *c;                // (N), of rows of xbc_width
  const float *z, *dt;               // (head_dim) and one number, of rows of u_width
  const float *log_rate, *d, *bias;  // the head's
  std::int64_t xbc_width, u_width, head_dim, state_size, num_tokens;
  float* state;  // (N, head_dim)
};

struct Mamba2Kernels {
  void (*advance)(const Mamba2Task& task);
};

const Mamba2Kernels& mamba2_kernels(IsaTag<Isa::baseline>);
const Mamba2Kernels& mamba2_kernels(IsaTag<Isa::avx2>);
const Mamba2Kernels& mamba2_kernels(IsaTag<Isa::avx512>);
const Mamba2Kernels& mamba2_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
