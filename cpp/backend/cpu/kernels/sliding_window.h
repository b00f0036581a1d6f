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
struct WindowKeys {
  const void* keys;    // (num_blocks, head_dim, kKeyBlock) float, or bfloat16 when bf16
  const void* values;  // (num_blocks · kKeyBlock, value_cols), likewise
  bool bf16;
  std::int64_t first_block, num_blocks;
  std::int64_t head_dim;
  std::int64_t value_cols;  // head_dim up to a multiple of 16
};

/// out[i] = Σ_j softmax_j(q[i]·k_j) v_j over positions first[i] ≤ j ≤ last[i].
struct WindowAttendTask {
  WindowKeys window;
  const float* q;  // (kQueryBlock, head_dim), rotated and scaled
  int num_queries;
  std::int64_t first[kQueryBlock], last[kQueryBlock];
  void* out[kQueryBlock];  // (head_dim) float, or bfloat16 when out_bf16
  bool out_bf16;
  float* scratch;  // kQueryBlock · (kKeyBlock · blocks from the least first to the greatest last), aligned to 64 bytes
};

struct SlidingWindowKernels {
  void (*rotate)(const RotaryTask& task);
  void (*attend)(const WindowAttendTask& task);
};

const SlidingWindowKernels& sliding_window_kernels(IsaTag<Isa::baseline>);
const SlidingWindowKernels& sliding_window_kernels(IsaTag<Isa::avx2>);
const SlidingWindowKernels& sliding_window_kernels(IsaTag<Isa::avx512>);
const SlidingWindowKernels& sliding_window_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
