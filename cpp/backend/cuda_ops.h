#pragma once

// What the core sees of cuda/ops.cc; arguments are checked. A build without CUDA has them in ops.cc: they throw.

#include <cstddef>
#include <memory>
#include <optional>

#include "based/config.h"
#include "based/ops.h"

namespace based::cuda {

void taylor_linear_attention(const LinearAttentionConfig& config, const ops::Array& q, const ops::Array& k,
                             const ops::Array& v, const std::optional<ops::Array>& initial_state, const ops::Array& out,
                             const std::optional<ops::Array>& final_state, ops::StreamHandle stream);
void sliding_window_attention(const SlidingWindowConfig& config, const ops::Array& q, const ops::Array& k,
                              const ops::Array& v, const ops::Array& out, ops::StreamHandle stream);
void gated_short_conv(const GatedConvConfig& config, const ops::Array& u, const ops::Array& weight,
                      const std::optional<ops::Array>& initial_state, const ops::Array& out,
                      const std::optional<ops::Array>& final_state, ops::StreamHandle stream);

/// In the order of `stream`, which outlives it.
std::shared_ptr<void> allocate(int device, std::size_t nbytes, ops::StreamHandle stream);

/// Between the host and a device, or within one; waits for the device first.
void copy(int device, void* to, const void* from, std::size_t nbytes);

}  // namespace based::cuda
