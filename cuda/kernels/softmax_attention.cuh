#pragma once

// What the kernels of softmax attention share. See softmax_attention.cu.

#include <limits>

#include "kernels/common.cuh"

namespace based::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct AttentionArguments {
  DeviceBatch batch;
  QkvView qkv;
  KeyValueView ring;
  void* out;
  std::int64_t out_token;
  int num_heads, num_kv_heads, head_dim, window;
  int num_pairs;
  bool interleaved;
  bool aligned;      // q, k, v and out can be moved in 16 bytes,
  bool in_pairs;     // two elements at a time
  float scale;       // of q·k, times log₂ e
  double log2_step;  // log₂ of the ratio of successive pairs' frequencies

  __device__ int kv_head(int head) const {
    return num_heads == num_kv_heads ? head : head / (num_heads / num_kv_heads);  // no division where none is needed
  }
  __device__ std::byte* ring_keys(std::int32_t sequence) const {
    return ring.keys.data + static_cast<std::size_t>(batch.slots[sequence]) * ring.keys.slot_stride;
  }
  // Elements from the first row to another. `in_pieces`: the ring has several.
  template <bool in_pieces>
  __device__ std::int64_t ring_row(int row) const {
    if constexpr (!in_pieces) return row * ring.row;
    return (row >> ring.piece_shift) * ring.piece + (row & ((1 << ring.piece_shift) - 1)) * ring.row;
  }
  __device__ int first_of_pair(int pair) const { return interleaved ? 2 * pair : pair; }
  __device__ int second_of_pair(int pair) const { return interleaved ? 2 * pair + 1 : pair + num_pairs; }
};

// The maximum to subtract: of no key at all, anything finite.
__device__ __forceinline__ float finite_maximum(float m) { return m == -kInfinity ? 0.0f : m; }

// ---- softmax_attention_wgmma.cu ------------------------------------------------------------------------------------

/// Attention of all tiles over contexts on Hopper's asynchronous tensor cores, once q and k are rotated and the
/// contexts hold the call's keys and values. False, and nothing is launched, where the device or the shape is not for
/// them. T: bf16 or fp16.
template <typename T>
bool attend_by_wgmma(cudaStream_t stream, const char* name, const AttentionArguments& a);

}  // namespace based::cuda
