#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "based/tensor.h"

// The mixers' kernels by themselves, on memory of the caller, without models and sessions. CUDA only.
//
// Work is enqueued on `stream` of the tensors' device, and is not waited for. Inputs are float32, bfloat16 or float16,
// all of one dtype and one device; outputs have their dtype; states are float32. B sequences of T tokens each.
// Every function throws InvalidArgument with what was found and what was expected, UnsupportedError where there is no
// CUDA, OutOfMemory, DeviceError.

namespace based::ops {

/// Memory of the caller. It outlives the work.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
};

/// A cudaStream_t; null: the legacy default stream.
using StreamHandle = void*;

/// Taylor linear attention (LinearAttentionConfig's equation). q, k (B, T, H, f), v and out (B, T, H, D). States
/// (B, H, num_features, D + 1) float32, dense, as docs/state-format.md lays them out; no initial state: zeros. Strides
/// are free, but for D and f, which are dense, and 16-byte aligned sequences.
void taylor_linear_attention(const Array& q, const Array& k, const Array& v, const std::optional<Array>& initial_state,
                             const Array& out, const std::optional<Array>& final_state, double eps,
                             StreamHandle stream);

/// Softmax attention over the last `window` keys, the query's own included, without rotary embedding. q and out
/// (B, T, H, D), k, v (B, T, H_kv, D), strides as above; `out` dense in H and D.
void sliding_window_attention(const Array& q, const Array& k, const Array& v, const Array& out, std::int64_t window,
                              double scale, StreamHandle stream);

/// out = SiLU(conv(u₁)) ⊙ u₂ with u = [u₁|u₂] (B, T, 2e), weight (e, K) of u's dtype, out (B, T, e); states (B, K − 1,
/// e) float32, the last values of u₁, oldest first. Everything dense.
void gated_short_conv(const Array& u, const Array& weight, const std::optional<Array>& initial_state, const Array& out,
                      const std::optional<Array>& final_state, StreamHandle stream);

/// Uninitialised memory of a CUDA device in the order of `stream`, which outlives it.
Tensor empty(Device device, DType dtype, std::vector<std::int64_t> shape, StreamHandle stream);

}  // namespace based::ops
