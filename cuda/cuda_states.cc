#include "cuda_states.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace based::cuda {

namespace {

constexpr std::size_t kAlignment = 256;

// Throws when the product of the extents overflows.
std::size_t nbytes_of(std::initializer_list<std::int64_t> extents, DType dtype) {
  return static_cast<std::size_t>(num_elements({num_elements({extents}), static_cast<std::int64_t>(size_of(dtype))}));
}

// The form in which kernels.h takes the shape of a Taylor state.
LinearAttentionConfig config_of(const TaylorState& state) {
  return {state.num_heads, state.feature_dim, state.head_dim};
}

backend::StateDTypes dtypes_of(DType model) { return {model, model}; }

// A Taylor part of a slot, on the host.
struct TaylorSlot {
  float *s, *z;  // (H · num_features, head_dim), (H · num_features)
  std::byte *keys, *values;
  std::int32_t* counts;  // (H), all the same

  TaylorSlot(const TaylorState& state, DType dtype, std::byte* data) {
    const PendingLayout layout(config_of(state), dtype);
    s = reinterpret_cast<float*>(data);
    z = s + state.num_heads * state.num_features() * state.head_dim;
    keys = data + linear_attention_state_bytes(config_of(state));
    values = keys + layout.values;
    counts = reinterpret_cast<std::int32_t*>(keys + layout.counts);
  }
};

// Calls visit(row of the saved (n, H, …), row of the slot's (H, W, …)) for n pending tokens.
template <typename Visit>
void for_each_pending(const TaylorState& state, std::int64_t n, Visit&& visit) {
  for (std::int64_t j = 0; j < n; ++j)
    for (std::int64_t head = 0; head < state.num_heads; ++head)
      visit(j * state.num_heads + head, head * kPendingTokens + j);
}

// Calls visit(row of the saved keys or values, row of the ring) for the positions that a ring holds.
template <typename Visit>
void for_each_in_ring(const RingState& state, std::int64_t num_tokens, Visit&& visit) {
  const std::int64_t count = std::min(num_tokens, state.rows);
  for (std::int64_t i = 0; i < count; ++i) visit(i, (num_tokens - count + i) % state.rows);
}

// ---- by the kind of a part ------------------------------------------------------------------------------------------

// Bytes of a part in a slot.
struct SizeOf {
  backend::StateDTypes dtypes;

  std::size_t operator()(const DenseState& state) const {
    return nbytes_of({num_elements(state.shape)}, dtypes.kept(state.dtype));
  }
  std::size_t operator()(const RingState& state) const {
    return nbytes_of({2, state.rows, state.num_heads, state.head_dim}, dtypes.model);
  }
  std::size_t operator()(const TaylorState& state) const {
    nbytes_of({num_elements(state.saved_shape())}, DType::float32);
    nbytes_of({state.num_heads, kPendingTokens, state.feature_dim + state.head_dim}, dtypes.model);
    return linear_attention_state_bytes(config_of(state)) + PendingLayout(config_of(state), dtypes.model).nbytes;
  }
};

// Writes a part's saved tensors.
struct Save {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  int layer;
  const std::byte* data;
  backend::StateWriter& writer;

  void operator()(const DenseState& state) const { save_dense(state, dtypes, data, layer, writer); }

  void operator()(const RingState& state) const {
    const std::size_t row_nbytes = static_cast<std::size_t>(state.num_heads * state.head_dim) * size_of(dtypes.model);
    const std::byte* ring = data;
    for (const char* name : {"keys", "values"}) {
      std::byte* saved = writer.add(layer, name, dtypes.model, state.saved_shape(num_tokens));
      for_each_in_ring(state, num_tokens, [&](std::int64_t to, std::int64_t from) {
        std::memcpy(saved + static_cast<std::size_t>(to) * row_nbytes,
                    ring + static_cast<std::size_t>(from) * row_nbytes, row_nbytes);
      });
      ring += static_cast<std::size_t>(state.rows) * row_nbytes;
    }
  }

  void operator()(const TaylorState& state) const {
    const TaylorSlot part(state, dtypes.model, const_cast<std::byte*>(data));
    const std::int64_t rows = state.num_heads * state.num_features(), n = *part.counts;
    auto* saved = reinterpret_cast<float*>(writer.add(layer, "taylor", DType::float32, state.saved_shape()));
    for (std::int64_t row = 0; row < rows; ++row) {
      saved = std::copy_n(part.s + row * state.head_dim, state.head_dim, saved);
      *saved++ = part.z[row];
    }
    if (n == 0) return;
    const auto save_pending = [&](const char* name, const std::byte* from, std::int64_t width) {
      std::byte* to = writer.add(layer, name, dtypes.model, {n, state.num_heads, width});
      const std::int64_t row_nbytes = width * static_cast<std::int64_t>(size_of(dtypes.model));
      for_each_pending(state, n, [&](std::int64_t to_row, std::int64_t from_row) {
        std::copy_n(from + from_row * row_nbytes, row_nbytes, to + to_row * row_nbytes);
      });
    };
    save_pending("pending_keys", part.keys, state.feature_dim);
    save_pending("pending_values", part.values, state.head_dim);
  }
};

// Its inverse, into a slot of zeros.
struct Restore {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  std::byte* data;
  backend::StateReader& reader;

  void operator()(const DenseState& state) const { restore_dense(state, dtypes, reader, data); }

  void operator()(const RingState& state) const {
    const std::size_t row_nbytes = static_cast<std::size_t>(state.num_heads * state.head_dim) * size_of(dtypes.model);
    std::byte* ring = data;
    for (int part = 0; part < 2; ++part) {  // keys, values
      const std::vector<std::byte> saved = backend::converted(reader.take(), dtypes.model);
      for_each_in_ring(state, num_tokens, [&](std::int64_t from, std::int64_t to) {
        std::memcpy(ring + static_cast<std::size_t>(to) * row_nbytes,
                    saved.data() + static_cast<std::size_t>(from) * row_nbytes, row_nbytes);
      });
      ring += static_cast<std::size_t>(state.rows) * row_nbytes;
    }
  }

  void operator()(const TaylorState& state) const {
    const TaylorSlot part(state, dtypes.model, data);
    std::vector<float> sums = backend::to_floats(reader.take());
    if (const auto pending = reader.take_pending()) {
      const std::int64_t n = pending->keys.shape[0];
      if (pending->keys.dtype == dtypes.model && n < kPendingTokens) {
        const auto place = [&](const TensorView& saved, std::byte* to) {
          const std::int64_t row_nbytes = saved.shape[2] * static_cast<std::int64_t>(size_of(dtypes.model));
          for_each_pending(state, n, [&](std::int64_t from_row, std::int64_t to_row) {
            std::copy_n(saved.data + from_row * row_nbytes, row_nbytes, to + to_row * row_nbytes);
          });
        };
        place(pending->keys, part.keys);
        place(pending->values, part.values);
        std::fill_n(part.counts, state.num_heads, static_cast<std::int32_t>(n));
      } else {  // of another dtype, which this one need not hold, or of a device that leaves more of them
        backend::fold_pending(state, sums, *pending);
      }
    }
    const float* saved = sums.data();
    for (std::int64_t row = 0; row < state.num_heads * state.num_features(); ++row) {
      std::copy_n(saved, state.head_dim, part.s + row * state.head_dim);
      part.z[row] = saved[state.head_dim];
      saved += state.head_dim + 1;
    }
  }
};

}  // namespace

backend::StateLayout state_layout(const ModelConfig& config, DType model) {
  return {config, kAlignment, [&](const StatePart& state) { return std::visit(SizeOf{dtypes_of(model)}, state); }};
}

CudaStatePool::CudaStatePool(const ModelConfig& config, DType dtype, int capacity)
    : layout_(state_layout(config, dtype)), dtype_(dtype), capacity_(capacity), sums_nbytes_(config.layers.size()) {
  for (const auto& part : layout_.parts())
    if (const auto* taylor = std::get_if<TaylorState>(&part.state))
      sums_nbytes_[static_cast<std::size_t>(part.layer)] = linear_attention_state_bytes(config_of(*taylor));
}

void CudaStatePool::attach(backend::Buffer memory, std::shared_ptr<const Stream> stream) {
  buffer_ = std::move(memory);
  data_ = static_cast<std::byte*>(buffer_.data.get());
  stream_ = std::move(stream);
}

std::vector<backend::NamedTensor> CudaStatePool::save(const std::byte* slot, std::int64_t num_tokens) const {
  backend::StateWriter writer;
  for (const auto& part : layout_.parts())
    std::visit(Save{dtypes_of(dtype_), num_tokens, part.layer, slot + part.offset, writer}, part.state);
  return std::move(writer.tensors);
}

void CudaStatePool::restore(std::byte* slot, std::int64_t num_tokens,
                            std::span<const backend::NamedView> tensors) const {
  std::fill_n(slot, layout_.slot_nbytes(), std::byte{0});
  backend::StateReader reader(tensors);
  for (const auto& part : layout_.parts())
    std::visit(Restore{dtypes_of(dtype_), num_tokens, slot + part.offset, reader}, part.state);
}

}  // namespace based::cuda
