#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Backend::gated_linear_attention for one head of one sequence. Pointers are to the sequence's first token of the
/// call, and to the head's numbers of it.
struct GatedLinearAttentionTask {
  const float *q, *k, *v, *gate;  // (key_dim) twice, (head_dim) twice, of rows of u_width
  const float* a;                 // (key_dim), of rows of a_width
  const float* norm;              // (head_dim)
  std::int64_t u_width, a_width, key_dim, head_dim, num_tokens;
  float gate_normalizer, eps;
  float* state;            // (key_dim, head_dim)
  void* out;               // rows of out_width float, or bfloat16 when out_bf16
  std::int64_t out_begin;  // the head's first column
  std::int64_t out_width;
  bool out_bf16;
  float* scratch;  // gated_linear_scratch() floats
};

/// The decays and the result of a token, each in whole vectors of any instruction set.
constexpr std::int64_t gated_linear_scratch(std::int64_t key_dim, std::int64_t head_dim) {
  const auto whole = [](std::int64_t n) { return (n + 15) / 16 * 16; };
  return whole(key_dim) + whole(head_dim);
}

struct GatedLinearAttentionKernels {
  void (*advance)(const GatedLinearAttentionTask& task);
};

const GatedLinearAttentionKernels& gated_linear_attention_kernels(IsaTag<Isa::baseline>);
const GatedLinearAttentionKernels& gated_linear_attention_kernels(IsaTag<Isa::avx2>);
const GatedLinearAttentionKernels& gated_linear_attention_kernels(IsaTag<Isa::avx512>);
const GatedLinearAttentionKernels& gated_linear_attention_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
