#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "kernels.h"
#include "stream.h"

namespace based::cuda {

/// Slots of equal size, each one contiguous: layer after layer as kernels.h lays each out, aligned to 256 bytes; a
/// linear layer's pending tokens behind its sums. `dtype` is the model's, "T" of kernels.h. The memory is in the order
/// of `stream`.
class CudaStatePool final : public backend::StatePool {
 public:
  CudaStatePool(const ModelConfig& config, DType dtype, int capacity);

  int capacity() const override { return capacity_; }
  std::size_t nbytes_per_slot() const override { return slot_nbytes_; }

  /// Size of all slots. Throws OutOfMemory when it overflows.
  std::size_t nbytes() const;
  /// Before any use.
  void attach(backend::Buffer memory, std::shared_ptr<const Stream> stream);

  const std::vector<MixerConfig>& layers() const { return layers_; }
  const Stream& stream() const { return *stream_; }
  std::byte* slot(int slot) const { return data_ + static_cast<std::size_t>(slot) * slot_nbytes_; }
  StateView layer(int layer) const { return {data_ + offsets_[static_cast<std::size_t>(layer)], slot_nbytes_}; }
  /// The pending tokens of a linear layer.
  StateView pending(int layer) const;

  /// Between a slot's bytes (a host copy of them) and its saved form.
  std::vector<backend::NamedTensor> save(const std::byte* slot, std::int64_t num_tokens) const;
  void restore(std::byte* slot, std::int64_t num_tokens, std::span<const backend::NamedView> tensors) const;

 private:
  std::vector<MixerConfig> layers_;
  DType dtype_;
  int capacity_;
  std::vector<std::size_t> offsets_;
  std::size_t slot_nbytes_ = 0;
  std::shared_ptr<const Stream> stream_;
  backend::Buffer buffer_;
  std::byte* data_ = nullptr;
};

}  // namespace based::cuda
