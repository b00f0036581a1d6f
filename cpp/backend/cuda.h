#pragma once

// All that the core sees of cuda/. A build without CUDA has no_cuda.cc in its place.

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "based/config.h"
#include "based/device.h"
#include "based/ops.h"

namespace based::cuda {

// ---- devices (cuda/make_cuda_backend.cc) ---------------------------------------------------------------------------

std::unique_ptr<backend::Backend> make_cuda_backend(int index, bool deterministic);

std::vector<DeviceDescription> cuda_devices();

/// See based::cuda_problem, based::synchronize.
std::string cuda_problem();
void synchronize(int index);

/// See based::release_lent.
void release(Tensor tensor, bool on_legacy_stream) noexcept;

/// A folder of cuBLASLt (or the library file itself) to look into before the system's own places. Called before the
/// first use of CUDA; later calls change nothing once the library is loaded. Any thread.
void add_library_path(std::string path);

// ---- operations on a caller's arrays (cuda/ops.cc); arguments are checked ------------------------------------------

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
