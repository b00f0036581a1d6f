#include "backend/state_layout.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "based/error.h"
#include "io/convert_dtype.h"

namespace based::backend {

namespace {

std::size_t checked_add(std::size_t a, std::size_t b) {
  std::size_t sum;
  if (__builtin_add_overflow(a, b, &sum))
    throw OutOfMemory("out of memory: a state of this model is larger than can be addressed");
  return sum;
}

// Bit for bit where the dtype stays.
void convert_to(DType dtype, const TensorView& from, std::byte* to) {
  if (from.dtype == dtype)
    std::copy_n(from.data, from.nbytes(), to);
  else
    io::convert(from, dtype, to);
}

}  // namespace

DType StateDTypes::kept(StateDType dtype) const {
  switch (dtype) {
    case StateDType::model:
      return model;
    case StateDType::projection:
      return projection;
    case StateDType::float32:
      break;
  }
  return DType::float32;
}

StateLayout::StateLayout(const ModelConfig& config, std::size_t alignment,
                         const std::function<std::size_t(const StatePart&)>& nbytes_of) {
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    first_part_.push_back(parts_.size());
    for (StatePart& state : mixer_state(config.layers[i])) {
      const std::size_t nbytes = nbytes_of(state);
      offsets_.push_back(slot_nbytes_);
      parts_.push_back({static_cast<int>(i), std::move(state), slot_nbytes_});
      slot_nbytes_ = checked_add(checked_add(slot_nbytes_, nbytes), alignment - 1) / alignment * alignment;
    }
  }
}

std::size_t StateLayout::pool_nbytes(int capacity) const {
  std::size_t total;
  if (__builtin_mul_overflow(slot_nbytes_, static_cast<std::size_t>(capacity), &total))
    throw OutOfMemory("out of memory: " + std::to_string(capacity) + " states of " + std::to_string(slot_nbytes_) +
                      " bytes each are more than can be addressed");
  return total;
}

std::byte* StateWriter::add(int layer, std::string_view name, DType dtype, std::vector<std::int64_t> shape) {
  tensors.push_back(
      {"layers." + std::to_string(layer) + "." + std::string(name), Tensor::empty(dtype, std::move(shape))});
  return tensors.back().tensor.data_as<std::byte>();
}

std::optional<SavedPending> StateReader::take_pending() {
  if (next_ == end_ || !next_->name.ends_with(".pending_keys")) return std::nullopt;
  const TensorView& keys = take();
  const TensorView& values = take();
  return SavedPending{keys, values};
}

void save_dense(const DenseState& state, const StateDTypes& dtypes, const std::byte* data, int layer,
                StateWriter& writer) {
  const DType saved = dtypes.saved(state.dtype);
  convert_to(saved, {dtypes.kept(state.dtype), state.shape, data}, writer.add(layer, state.name, saved, state.shape));
}

void restore_dense(const DenseState& state, const StateDTypes& dtypes, StateReader& reader, std::byte* data) {
  convert_to(dtypes.kept(state.dtype), reader.take(), data);
}

std::vector<std::byte> converted(const TensorView& tensor, DType dtype) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(tensor.size()) * size_of(dtype));
  convert_to(dtype, tensor, bytes.data());
  return bytes;
}

std::vector<float> to_floats(const TensorView& tensor) {
  std::vector<float> x(static_cast<std::size_t>(tensor.size()));
  io::convert(tensor, DType::float32, x.data());
  return x;
}

void fold_pending(const TaylorState& state, std::span<float> taylor, const SavedPending& pending) {
  const std::vector<float> keys = to_floats(pending.keys), values = to_floats(pending.values);
  const auto f = static_cast<std::size_t>(state.feature_dim), head_dim = static_cast<std::size_t>(state.head_dim);
  const auto heads = static_cast<std::size_t>(state.num_heads);
  const auto scale = static_cast<float>(std::pow(static_cast<double>(state.feature_dim), -0.25));
  std::vector<float> y(f);
  for (std::size_t row = 0; row * f < keys.size(); ++row) {  // token, head
    for (std::size_t i = 0; i < f; ++i) y[i] = keys[row * f + i] * scale;
    const float* v = values.data() + row * head_dim;
    float* s = taylor.data() + row % heads * static_cast<std::size_t>(state.num_features()) * (head_dim + 1);
    const auto add = [&](float phi) {
      for (std::size_t n = 0; n < head_dim; ++n) s[n] += phi * v[n];
      s[head_dim] += phi;
      s += head_dim + 1;
    };
    add(1.0f);
    for (std::size_t i = 0; i < f; ++i) add(y[i]);
    for (std::size_t i = 0; i < f; ++i)
      for (std::size_t j = i; j < f; ++j) add(y[i] * y[j] * (i == j ? 0.70710678f : 1.0f));
  }
}

}  // namespace based::backend
