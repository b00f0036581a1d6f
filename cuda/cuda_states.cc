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

std::size_t layer_nbytes(const MixerConfig& mixer, std::size_t ring_element) {
  const auto product = [](std::initializer_list<std::int64_t> extents) { return num_elements({extents}); };
  std::int64_t elements;
  std::size_t width = sizeof(float);
  if (const auto* conv = std::get_if<GatedConvConfig>(&mixer)) {
    elements = product({conv->kernel_size - 1, conv->inner_size});
  } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&mixer)) {
    elements = product({linear->num_heads, linear->num_features(), linear->head_dim + 1});
  } else {
    const auto& window = std::get<SlidingWindowConfig>(mixer);
    elements = product({2, window.window, window.num_kv_heads, window.head_dim});
    width = ring_element;
  }
  const std::size_t nbytes = static_cast<std::size_t>(num_elements({elements, static_cast<std::int64_t>(width)}));
  return (nbytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Calls visit(row of the saved keys or values, row of the ring) for the positions that a ring holds.
template <typename Visit>
void for_each_in_ring(const SlidingWindowConfig& config, std::int64_t num_tokens, Visit&& visit) {
  const std::int64_t count = std::min(num_tokens, config.window);
  for (std::int64_t i = 0; i < count; ++i) visit(i, (num_tokens - count + i) % config.window);
}

}  // namespace

CudaStatePool::CudaStatePool(const ModelConfig& config, DType ring_dtype, int capacity)
    : layers_(config.layers), ring_dtype_(ring_dtype), capacity_(capacity) {
  for (const MixerConfig& mixer : layers_) {
    offsets_.push_back(slot_nbytes_);
    slot_nbytes_ += layer_nbytes(mixer, size_of(ring_dtype));
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

std::vector<backend::NamedTensor> CudaStatePool::save(const std::byte* slot, std::int64_t num_tokens) const {
  std::vector<backend::NamedTensor> out;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const std::byte* data = slot + offsets_[i];
    const auto add = [&](const char* name, DType dtype, std::vector<std::int64_t> shape) {
      out.push_back({"layers." + std::to_string(i) + name, Tensor::empty(dtype, std::move(shape))});
      return out.back().tensor.data_as<std::byte>();
    };
    if (const auto* conv = std::get_if<GatedConvConfig>(&layers_[i])) {
      std::byte* saved = add(".conv", DType::float32, {conv->kernel_size - 1, conv->inner_size});
      if (conv->kernel_size > 1) std::memcpy(saved, data, out.back().tensor.nbytes());
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&layers_[i])) {
      const auto cols = static_cast<std::size_t>(linear->head_dim);
      const std::int64_t rows = linear->num_heads * linear->num_features();
      auto* saved = reinterpret_cast<float*>(
          add(".taylor", DType::float32, {linear->num_heads, linear->num_features(), linear->head_dim + 1}));
      const auto* s = reinterpret_cast<const float*>(data);
      const float* z = s + rows * linear->head_dim;
      for (std::int64_t row = 0; row < rows; ++row) {
        saved = std::copy_n(s + row * linear->head_dim, cols, saved);
        *saved++ = z[row];
      }
    } else {
      const auto& window = std::get<SlidingWindowConfig>(layers_[i]);
      const std::vector<std::int64_t> shape{std::min(num_tokens, window.window), window.num_kv_heads, window.head_dim};
      const std::size_t row_nbytes =
          static_cast<std::size_t>(window.num_kv_heads * window.head_dim) * size_of(ring_dtype_);
      const std::byte* ring = data;
      for (const char* name : {".keys", ".values"}) {
        std::byte* saved = add(name, ring_dtype_, shape);
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

void CudaStatePool::restore(std::byte* slot, std::int64_t num_tokens, std::span<const TensorView> tensors) const {
  auto tensor = tensors.begin();
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    std::byte* data = slot + offsets_[i];
    if (std::holds_alternative<GatedConvConfig>(layers_[i])) {
      const TensorView& saved = *tensor++;
      if (saved.nbytes() > 0) std::memcpy(data, saved.data, saved.nbytes());
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&layers_[i])) {
      const std::byte* saved = (*tensor++).data;
      const std::size_t row_nbytes = static_cast<std::size_t>(linear->head_dim) * sizeof(float);
      const auto rows = static_cast<std::size_t>(linear->num_heads * linear->num_features());
      std::byte* z = data + rows * row_nbytes;
      for (std::size_t row = 0; row < rows; ++row, saved += row_nbytes + sizeof(float)) {
        std::memcpy(data + row * row_nbytes, saved, row_nbytes);
        std::memcpy(z + row * sizeof(float), saved + row_nbytes, sizeof(float));
      }
    } else {
      const auto& window = std::get<SlidingWindowConfig>(layers_[i]);
      const std::int64_t row = window.num_kv_heads * window.head_dim;
      const std::size_t row_nbytes = static_cast<std::size_t>(row) * size_of(ring_dtype_);
      std::byte* ring = data;
      for (int part = 0; part < 2; ++part) {  // keys, values
        const TensorView& saved = *tensor++;
        for_each_in_ring(window, num_tokens, [&](std::int64_t from, std::int64_t to) {
          const TensorView view{
              saved.dtype, {row}, saved.data + static_cast<std::size_t>(from * row) * size_of(saved.dtype)};
          io::convert(view, ring_dtype_, ring + static_cast<std::size_t>(to) * row_nbytes);
        });
        ring += static_cast<std::size_t>(window.window) * row_nbytes;
      }
    }
  }
}

}  // namespace based::cuda
