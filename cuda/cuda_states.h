#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/state_layout.h"
#include "kernels.h"
#include "stream.h"

namespace based::cuda {

/// The layout of a slot: every part as kernels.h lays it out, aligned to 256 bytes; pending tokens behind their sums.
/// `model`: the model's dtype, "T" of kernels.h. Throws when a size overflows.
backend::StateLayout state_layout(const ModelConfig& config, DType model);

/// The memory is in the order of `stream`.
class CudaStatePool final : public backend::StatePool {
 public:
  CudaStatePool(const ModelConfig& config, DType dtype, int capacity);

  int capacity() const override { return capacity_; }
  std::size_t nbytes_per_slot() const override { return layout_.slot_nbytes(); }

  /// Size of all slots. Throws OutOfMemory when it overflows.
  std::size_t nbytes() const { return layout_.pool_nbytes(capacity_); }
  /// Before any use.
  void attach(backend::Buffer memory, std::shared_ptr<const Stream> stream);

  const Stream& stream() const { return *stream_; }
  std::byte* slot(int slot) const { return data_ + static_cast<std::size_t>(slot) * layout_.slot_nbytes(); }
  /// A part of a layer's state.
  StateView layer(int layer, int part = 0) const {
    return {data_ + layout_.offset(layer, part), layout_.slot_nbytes()};
  }
  /// The pending tokens of a layer whose first part is a Taylor state.
  StateView pending(int layer) const {
    return {data_ + layout_.offset(layer) + sums_nbytes_[static_cast<std::size_t>(layer)], layout_.slot_nbytes()};
  }

  /// Between a slot's bytes (a host copy of them) and its saved form.
  std::vector<backend::NamedTensor> save(const std::byte* slot, std::int64_t num_tokens) const;
  void restore(std::byte* slot, std::int64_t num_tokens, std::span<const backend::NamedView> tensors) const;

 private:
  backend::StateLayout layout_;
  DType dtype_;
  int capacity_;
  std::vector<std::size_t> sums_nbytes_;  // by layer: of its Taylor sums; 0 without
  std::shared_ptr<const Stream> stream_;
  backend::Buffer buffer_;
  std::byte* data_ = nullptr;
};

}  // namespace based::cuda
