#include "cuda_states.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "based/error.h"
#include "io/convert_dtype.h"

namespace based::cuda {

namespace {

constexpr std::size_t kAlignment = 256;

// Throws when the product of the extents overflows.
std::size_t nbytes_of(std::initializer_list<std::int64_t> extents, DType dtype) {
  return static_cast<std::size_t>(num_elements({num_elements({extents}), static_cast<std::int64_t>(size_of(dtype))}));
}

std::size_t layer_nbytes(const MixerConfig& mixer, DType dtype) {
  std::size_t nbytes;
  if (const auto* conv = std::get_if<GatedConvConfig>(&mixer)) {
    nbytes = nbytes_of({conv->kernel_size - 1, conv->inner_size}, dtype);
  } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&mixer)) {
    nbytes_of({linear->num_heads, linear->num_features(), linear->head_dim + 1}, DType::float32);
    nbytes_of({linear->num_heads, kPendingTokens, linear->feature_dim + linear->head_dim}, dtype);
    nbytes = linear_attention_state_bytes(*linear) + PendingLayout(*linear, dtype).nbytes;
  } else {
    const auto& window = std::get<SlidingWindowConfig>(mixer);
    nbytes = nbytes_of({2, window.window, window.num_kv_heads, window.head_dim}, dtype);
  }
  return (nbytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Of a linear layer's part of a slot, on the host.
struct LinearSlot {
  float *s, *z;  // (H · num_features, head_dim), (H · num_features)
  std::byte *keys, *values;
  std::int32_t* counts;  // (H), all the same

  LinearSlot(const LinearAttentionConfig& config, DType dtype, std::byte* data) {
    const PendingLayout layout(config, dtype);
    s = reinterpret_cast<float*>(data);
    z = s + config.num_heads * config.num_features() * config.head_dim;
    keys = data + linear_attention_state_bytes(config);
    values = keys + layout.values;
    counts = reinterpret_cast<std::int32_t*>(keys + layout.counts);
  }
};

// Calls visit(row of the saved (n, H, …), row of the slot's (H, W, …)) for n pending tokens.
template <typename Visit>
void for_each_pending(const LinearAttentionConfig& config, std::int64_t n, Visit&& visit) {
  for (std::int64_t j = 0; j < n; ++j)
    for (std::int64_t head = 0; head < config.num_heads; ++head)
      visit(j * config.num_heads + head, head * kPendingTokens + j);
}

std::vector<float> to_floats(const TensorView& tensor) {
  std::vector<float> x(static_cast<std::size_t>(tensor.size()));
  io::convert(tensor, DType::float32, x.data());
  return x;
}

// Calls visit(row of the saved keys or values, row of the ring) for the positions that a ring holds.
template <typename Visit>
void for_each_in_ring(const SlidingWindowConfig& config, std::int64_t num_tokens, Visit&& visit) {
  const std::int64_t count = std::min(num_tokens, config.window);
  for (std::int64_t i = 0; i < count; ++i) visit(i, (num_tokens - count + i) % config.window);
}

}  // namespace

CudaStatePool::CudaStatePool(const ModelConfig& config, DType dtype, int capacity)
    : layers_(config.layers), dtype_(dtype), capacity_(capacity) {
  for (const MixerConfig& mixer : layers_) {
    offsets_.push_back(slot_nbytes_);
    slot_nbytes_ += layer_nbytes(mixer, dtype);
  }
}

std::size_t CudaStatePool::nbytes() const {
  std::size_t total;
  if (__builtin_mul_overflow(slot_nbytes_, static_cast<std::size_t>(capacity_), &total))
    throw OutOfMemory("out of memory: " + std::to_string(capacity_) + " states of " + std::to_string(slot_nbytes_) +
                      " bytes each are more than can be addressed");
  return total;
}

void CudaStatePool::attach(backend::Buffer memory, std::shared_ptr<const Stream> stream) {
  buffer_ = std::move(memory);
  data_ = static_cast<std::byte*>(buffer_.data.get());
  stream_ = std::move(stream);
}

StateView CudaStatePool::pending(int layer) const {
  const auto i = static_cast<std::size_t>(layer);
  const auto& config = std::get<LinearAttentionConfig>(layers_[i]);
  return {data_ + offsets_[i] + linear_attention_state_bytes(config), slot_nbytes_};
}

std::vector<backend::NamedTensor> CudaStatePool::save(const std::byte* slot, std::int64_t num_tokens) const {
  std::vector<backend::NamedTensor> out;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const std::byte* data = slot + offsets_[i];
    const auto add = [&](const char* name, DType dtype, std::vector<std::int64_t> shape) {
      out.push_back({"layers." + std::to_string(i) + name, Tensor::empty(dtype, std::move(shape))});
      return out.back().tensor.data_as<std::byte>();
    };
    if (const auto* conv = std::get_if<GatedConvConfig>(&layers_[i])) {
      const std::vector<std::int64_t> shape{conv->kernel_size - 1, conv->inner_size};
      io::convert({dtype_, shape, data}, DType::float32, add(".conv", DType::float32, shape));
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&layers_[i])) {
      const LinearSlot part(*linear, dtype_, const_cast<std::byte*>(data));
      const std::int64_t rows = linear->num_heads * linear->num_features(), n = *part.counts;
      auto* saved = reinterpret_cast<float*>(
          add(".taylor", DType::float32, {linear->num_heads, linear->num_features(), linear->head_dim + 1}));
      for (std::int64_t row = 0; row < rows; ++row) {
        saved = std::copy_n(part.s + row * linear->head_dim, linear->head_dim, saved);
        *saved++ = part.z[row];
      }
      if (n == 0) continue;
      const auto add_pending = [&](const char* name, const std::byte* from, std::int64_t width) {
        std::byte* to = add(name, dtype_, {n, linear->num_heads, width});
        const std::int64_t row_nbytes = width * static_cast<std::int64_t>(size_of(dtype_));
        for_each_pending(*linear, n, [&](std::int64_t to_row, std::int64_t from_row) {
          std::copy_n(from + from_row * row_nbytes, row_nbytes, to + to_row * row_nbytes);
        });
      };
      add_pending(".pending_keys", part.keys, linear->feature_dim);
      add_pending(".pending_values", part.values, linear->head_dim);
    } else {
      const auto& window = std::get<SlidingWindowConfig>(layers_[i]);
      const std::vector<std::int64_t> shape{std::min(num_tokens, window.window), window.num_kv_heads, window.head_dim};
      const std::size_t row_nbytes = static_cast<std::size_t>(window.num_kv_heads * window.head_dim) * size_of(dtype_);
      const std::byte* ring = data;
      for (const char* name : {".keys", ".values"}) {
        std::byte* saved = add(name, dtype_, shape);
        for_each_in_ring(window, num_tokens, [&](std::int64_t to, std::int64_t from) {
          std::memcpy(saved + static_cast<std::size_t>(to) * row_nbytes,
                      ring + static_cast<std::size_t>(from) * row_nbytes, row_nbytes);
        });
        ring += static_cast<std::size_t>(window.window) * row_nbytes;
      }
    }
  }
  return out;
}

void CudaStatePool::restore(std::byte* slot, std::int64_t num_tokens,
                            std::span<const backend::NamedView> tensors) const {
  std::fill_n(slot, slot_nbytes_, std::byte{0});
  auto tensor = tensors.begin();
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    std::byte* data = slot + offsets_[i];
    if (std::holds_alternative<GatedConvConfig>(layers_[i])) {
      io::convert((tensor++)->view, dtype_, data);
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&layers_[i])) {
      const LinearSlot part(*linear, dtype_, data);
      std::vector<float> sums = to_floats((tensor++)->view);
      if (const auto pending = backend::take_pending(tensor, tensors.end())) {
        const std::int64_t n = pending->keys.shape[0];
        if (pending->keys.dtype == dtype_ && n < kPendingTokens) {
          const auto place = [&](const TensorView& saved, std::byte* to) {
            const std::int64_t row_nbytes = saved.shape[2] * static_cast<std::int64_t>(size_of(dtype_));
            for_each_pending(*linear, n, [&](std::int64_t from_row, std::int64_t to_row) {
              std::copy_n(saved.data + from_row * row_nbytes, row_nbytes, to + to_row * row_nbytes);
            });
          };
          place(pending->keys, part.keys);
          place(pending->values, part.values);
          std::fill_n(part.counts, linear->num_heads, static_cast<std::int32_t>(n));
        } else {  // of another dtype, which this one need not hold, or of a device that leaves more of them
          backend::fold_pending(*linear, sums, to_floats(pending->keys), to_floats(pending->values));
        }
      }
      const float* saved = sums.data();
      for (std::int64_t row = 0; row < linear->num_heads * linear->num_features(); ++row) {
        std::copy_n(saved, linear->head_dim, part.s + row * linear->head_dim);
        part.z[row] = saved[linear->head_dim];
        saved += linear->head_dim + 1;
      }
    } else {
      const auto& window = std::get<SlidingWindowConfig>(layers_[i]);
      const std::int64_t row = window.num_kv_heads * window.head_dim;
      const std::size_t row_nbytes = static_cast<std::size_t>(row) * size_of(dtype_);
      std::byte* ring = data;
      for (int part = 0; part < 2; ++part) {  // keys, values
        const TensorView& saved = (tensor++)->view;
        for_each_in_ring(window, num_tokens, [&](std::int64_t from, std::int64_t to) {
          const TensorView view{
              saved.dtype, {row}, saved.data + static_cast<std::size_t>(from * row) * size_of(saved.dtype)};
          io::convert(view, dtype_, ring + static_cast<std::size_t>(to) * row_nbytes);
        });
        ring += static_cast<std::size_t>(window.window) * row_nbytes;
      }
    }
  }
}

}  // namespace based::cuda
