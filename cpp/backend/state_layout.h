#pragma once

// Where the parts of a state lie in a slot, and how they go to and come from its saved form: what all devices share.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "based/config.h"

namespace based::backend {

/// The dtypes that a pool's states are in.
struct StateDTypes {
  DType model = DType::float32;
  DType projection = DType::float32;

  /// In the slots.
  DType kept(StateDType dtype) const;
  /// In the saved form.
  DType saved(StateDType dtype) const { return dtype == StateDType::model ? model : DType::float32; }
};

/// A slot is contiguous: layer after layer, and of a layer part after part, each at a multiple of the alignment.
class StateLayout {
 public:
  struct Part {
    int layer;
    StatePart state;
    std::size_t offset;  // bytes from the slot's start
  };

  /// `nbytes_of` gives the size of a part on the device. Throws OutOfMemory when the sum overflows.
  StateLayout(const ModelConfig& config, std::size_t alignment,
              const std::function<std::size_t(const StatePart&)>& nbytes_of);

  std::size_t slot_nbytes() const { return slot_nbytes_; }
  const std::vector<Part>& parts() const { return parts_; }

  /// Into parts(): a part of a layer, in the order of its description.
  std::size_t index(int layer, int part = 0) const {
    return first_part_[static_cast<std::size_t>(layer)] + static_cast<std::size_t>(part);
  }
  std::size_t offset(int layer, int part = 0) const { return offsets_[index(layer, part)]; }

  /// Of `capacity` slots. Throws OutOfMemory when it overflows.
  std::size_t pool_nbytes(int capacity) const;

 private:
  std::vector<Part> parts_;
  std::vector<std::size_t> offsets_;     // those of parts_ again: the forward pass reads nothing else
  std::vector<std::size_t> first_part_;  // by layer
  std::size_t slot_nbytes_ = 0;
};

/// Collects a state's saved tensors.
class StateWriter {
 public:
  std::vector<NamedTensor> tensors;

  /// "layers.{layer}.{name}"; returns its uninitialised memory.
  std::byte* add(int layer, std::string_view name, DType dtype, std::vector<std::int64_t> shape);
};

/// A layer's pending tokens in a state's saved form: keys (n, H, f), values (n, H, head_dim), n ≥ 1.
struct SavedPending {
  TensorView keys, values;
};

/// Walks through a state's saved tensors.
class StateReader {
 public:
  explicit StateReader(std::span<const NamedView> tensors) : next_(tensors.begin()), end_(tensors.end()) {}

  const TensorView& take() { return (next_++)->view; }
  /// Nothing when other tensors follow.
  std::optional<SavedPending> take_pending();

 private:
  std::span<const NamedView>::iterator next_, end_;
};

/// The generic part: a copy, converted where the slot's dtype is not the file's.
void save_dense(const DenseState& state, const StateDTypes& dtypes, const std::byte* data, int layer,
                StateWriter& writer);
void restore_dense(const DenseState& state, const StateDTypes& dtypes, StateReader& reader, std::byte* data);

/// A copy in another dtype.
std::vector<std::byte> converted(const TensorView& tensor, DType dtype);
std::vector<float> to_floats(const TensorView& tensor);

/// taylor (H, num_features, head_dim + 1) += Σ_j φ(k_j) [v_j | 1]ᵀ in float32 over n tokens, keys (n, H, f), values
/// (n, H, head_dim): for a device that cannot keep these pending tokens as they are.
void fold_pending(const TaylorState& state, std::span<float> taylor, const SavedPending& pending);

}  // namespace based::backend
