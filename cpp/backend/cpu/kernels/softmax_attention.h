#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Positions per block of keys.
inline constexpr std::int64_t kKeyBlock = 16;
/// Queries that attend at once.
inline constexpr int kQueryBlock = 4;

struct RotaryTask {
  const float* x;       // (head_dim)
  float* y;             // (head_dim)
  const float* cosine;  // (num_pairs) of the token's angles
  const float* sine;    // (num_pairs)
  std::int64_t num_pairs;
  std::int64_t head_dim;
  bool interleaved;    // pairs (x[2i], x[2i + 1]) instead of (x[i], x[i + num_pairs])
  bool round_to_bf16;  // y rounded to the nearest bfloat16
  float scale;         // of y
};

/// Keys and values of one kv head, positions in blocks of kKeyBlock: block b of all time is block (b − first_block) mod
/// num_blocks here.
struct KeyBlocks {
  const void* keys;                       // blocks (head_dim, kKeyBlock) of float, or bfloat16 when bf16
  const void* values;                     // blocks (kKeyBlock, value_cols), likewise
  std::int64_t key_stride, value_stride;  // elements from block to block
  bool bf16;
  std::int64_t first_block, num_blocks;
  std::int64_t head_dim;
  std::int64_t value_cols;  // head_dim up to a multiple of 16
};

/// out[i] = Σ_j softmax_j(q[i]·k_j) v_j over positions first[i] ≤ j ≤ last[i]. `partial`: out[i] is what these keys are
/// of a longer sum, value_cols + 2 floats: Σ_j e^(q[i]·k_j − m) v_j, m = max_j q[i]·k_j, Σ_j e^(q[i]·k_j − m).
struct AttendTask {
  KeyBlocks window;
  const float* q;  // (kQueryBlock, head_dim), rotated and scaled
  int num_queries;
  std::int64_t first[kQueryBlock], last[kQueryBlock];
  void* out[kQueryBlock];  // (head_dim) float, or bfloat16 when out_bf16
  bool out_bf16;
  bool partial;
  float* scratch;  // kQueryBlock · (kKeyBlock · blocks from the least first to the greatest last), aligned to 64 bytes
};

struct SoftmaxAttentionKernels {
  void (*rotate)(const RotaryTask& task);
  void (*attend)(const AttendTask& task);
  // sum = the partial sum over the keys of both.
  void (*add)(float* sum, const float* more, std::int64_t value_cols);
  // out (head_dim) float, or bfloat16 = softmax average of a partial sum over all keys.
  void (*finish)(const float* sum, std::int64_t value_cols, std::int64_t head_dim, void* out, bool bf16);
};

const SoftmaxAttentionKernels& softmax_attention_kernels(IsaTag<Isa::baseline>);
const SoftmaxAttentionKernels& softmax_attention_kernels(IsaTag<Isa::avx2>);
const SoftmaxAttentionKernels& softmax_attention_kernels(IsaTag<Isa::avx512>);
const SoftmaxAttentionKernels& softmax_attention_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
