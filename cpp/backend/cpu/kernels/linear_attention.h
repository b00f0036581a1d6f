#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Tokens that linear attention takes at once. Chunks are counted from a sequence's first token in the call: cutting
/// a prompt at multiples of this changes no bit. Divides CpuBackend::chunk_tokens().
inline constexpr std::int64_t kTaylorChunk = 64;

/// float32 holds every integer up to here.
inline constexpr std::int64_t kExactCounts = std::int64_t{1} << 24;

/// One head of one sequence, value columns [0, cols).
struct LinearAttentionTask {
  const float* q;       // the first token's (f)
  const float* k;       // (f)
  const float* v;       // (head_dim)
  std::int64_t stride;  // floats from one token to the next
  std::int64_t num_tokens;
  std::int64_t count;         // keys in the state before the first token, used where it is kExactCounts or more
  std::int64_t feature_dim;   // f
  std::int64_t num_features;  // F = 1 + f + f(f + 1)/2
  std::int64_t head_dim;      // values taken, ≤ cols
  double eps;
  float* state;             // (F up to a multiple of 4, ≥ cols): Σ φ(k) vᵀ
  std::int64_t state_cols;  // floats from one row to the next
  std::int64_t cols;        // head_dim up to a multiple of 16
  float* z;                 // (F up to a multiple of 16): Σ φ(k)
  void* out;                // the first token's (head_dim) float, or bfloat16 when out_bf16
  std::int64_t out_stride;  // elements from one token to the next
  bool out_bf16;
  float* scratch;  // scratch_size() floats, aligned to 64 bytes
};

struct LinearAttentionKernels {
  /// Advances state and z over all tokens, and writes their outputs. z[0] counts keys: from kExactCounts on, where a
  /// float32 no longer takes one more, it follows from task.count. (Of a sequence whose first prompt was shorter than
  /// the prefix that its model can read, that is more than there are, by at most limits::kPrefix in kExactCounts.)
  void (*attend)(const LinearAttentionTask& task);
  /// Advances state and z, and asks nothing: q, count and out are not read.
  void (*add)(const LinearAttentionTask& task);
  std::int64_t (*scratch_size)(std::int64_t feature_dim, std::int64_t num_features, std::int64_t cols);
};

const LinearAttentionKernels& linear_attention_kernels(IsaTag<Isa::baseline>);
const LinearAttentionKernels& linear_attention_kernels(IsaTag<Isa::avx2>);
const LinearAttentionKernels& linear_attention_kernels(IsaTag<Isa::avx512>);
const LinearAttentionKernels& linear_attention_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
