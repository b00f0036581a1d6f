#include "backend/cpu/cpu_states.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "based/error.h"

namespace based::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t checked_mul(std::int64_t a, std::size_t b) {
  std::size_t product;
  if (a < 0 || __builtin_mul_overflow(static_cast<std::size_t>(a), b, &product)) throw std::bad_alloc();
  return product;
}

std::size_t checked_add(std::size_t a, std::size_t b) {
  std::size_t sum;
  if (__builtin_add_overflow(a, b, &sum)) throw std::bad_alloc();
  return sum;
}

// Extents beyond this cannot be allocated, and sums of a few products of two of them do not overflow.
constexpr std::int64_t kMaxExtent = std::int64_t{1} << 28;

void check_extents(std::initializer_list<std::int64_t> extents) {
  for (std::int64_t extent : extents)
    if (extent < 0 || extent > kMaxExtent) throw std::bad_alloc();
}

std::size_t layer_nbytes(const MixerConfig& mixer, std::size_t ring_element) {
  if (const auto* conv = std::get_if<GatedConvConfig>(&mixer)) {
    check_extents({conv->kernel_size - 1, conv->inner_size});
    return checked_mul((conv->kernel_size - 1) * conv->inner_size, sizeof(float));
  }
  if (const auto* linear = std::get_if<LinearAttentionConfig>(&mixer)) {
    check_extents({linear->num_heads, linear->feature_dim, linear->head_dim});
    check_extents({linear->num_features()});
    return checked_mul(linear->num_heads, checked_mul(TaylorLayout(*linear).head_size, sizeof(float)));
  }
  const auto& window = std::get<SlidingWindowConfig>(mixer);
  check_extents({window.num_kv_heads, window.head_dim, window.window});
  return checked_mul(window.num_kv_heads, checked_mul(RingLayout(window).head_size, ring_element));
}

// A ring of this size is used page by page: a short sequence takes the memory of a few keys, and a reset gives all of
// it back. Smaller rings, and the other layers, are soon used whole: there pages of 2 MB are better, which a part given
// back would break up.
constexpr std::size_t kLargeRing = std::size_t{8} << 20;

// Zeros in a private mapping; whole pages are given back to the system, which hands out zeros when they are next used.
void give_back(std::byte* data, std::size_t nbytes) {
#if defined(__linux__)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + page - 1) / page * page, end = (address + nbytes) / page * page;
  std::byte* const whole = data + (begin - address);
  if (begin < end && madvise(whole, end - begin, MADV_DONTNEED) == 0) {  // locked pages cannot be given back
    std::memset(data, 0, begin - address);
    std::memset(whole + (end - begin), 0, address + nbytes - end);
    return;
  }
#endif
  std::memset(data, 0, nbytes);
}

// IEEE binary16: the exponent moves to float32's place and bias, which a product by 2¹¹² does for subnormals as well.
float float_from_f16(std::uint16_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}

// One element of `dtype` (float32, bfloat16 or float16) as float, exactly.
float read_element(const std::byte* data, std::int64_t index, DType dtype) {
  if (dtype == DType::float16) {
    std::uint16_t bits;
    std::memcpy(&bits, data + index * 2, 2);
    return float_from_f16(bits);
  }
  if (dtype == DType::bfloat16) {
    std::uint16_t bits;
    std::memcpy(&bits, data + index * 2, 2);
    return float_from_bf16(bits);
  }
  float value;
  std::memcpy(&value, data + index * 4, 4);
  return value;
}

std::vector<float> to_floats(const TensorView& tensor) {
  std::vector<float> x(static_cast<std::size_t>(tensor.size()));
  for (std::int64_t i = 0; i < tensor.size(); ++i)
    x[static_cast<std::size_t>(i)] = read_element(tensor.data, i, tensor.dtype);
  return x;
}

// Rounded to nearest even; a ring of the CPU is float32 or bfloat16.
void write_element(std::byte* data, std::int64_t index, DType dtype, float value) {
  if (dtype == DType::bfloat16) {
    const std::uint16_t bits = bf16_from_float(value);
    std::memcpy(data + index * 2, &bits, 2);
  } else {
    std::memcpy(data + index * 4, &value, 4);
  }
}

// Calls visit(index in the saved keys and values, index in the ring's keys, in the ring's values) for each number of
// a saved window layer.
template <typename Visit>
void for_each_in_ring(const SlidingWindowConfig& config, std::int64_t num_tokens, Visit&& visit) {
  const RingLayout ring(config);
  const std::int64_t count = std::min(num_tokens, config.window);
  std::int64_t saved = 0;
  for (std::int64_t position = num_tokens - count; position < num_tokens; ++position) {
    const std::int64_t slot = position % ring.slots, block = slot / kStateLanes, lane = slot % kStateLanes;
    for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
      const std::int64_t keys = head * ring.head_size + block * config.head_dim * kStateLanes + lane;
      const std::int64_t values = head * ring.head_size + ring.keys_size + slot * ring.cols;
      for (std::int64_t d = 0; d < config.head_dim; ++d) visit(saved++, keys + d * kStateLanes, values + d);
    }
  }
}

// Calls visit(row of the saved (H, num_features, head_dim + 1), row of S, its element of z).
template <typename State, typename Visit>
void for_each_feature(const LinearAttentionConfig& config, State* state, Visit&& visit) {
  const TaylorLayout layout(config);
  std::int64_t saved = 0;
  for (std::int64_t head = 0; head < config.num_heads; ++head, state += layout.head_size)
    for (std::int64_t p = 0; p < layout.num_features; ++p, saved += config.head_dim + 1)
      visit(saved, state + p * layout.cols, state + layout.rows * layout.cols + p);
}

}  // namespace

TaylorLayout::TaylorLayout(const LinearAttentionConfig& config)
    : num_features(config.num_features()),
      rows(round_up(num_features, 4)),
      cols(round_up(config.head_dim, kStateLanes)),
      size_z(round_up(num_features, kStateLanes)),
      head_size(rows * cols + size_z) {}

RingLayout::RingLayout(const SlidingWindowConfig& config)
    : slots(round_up(config.window, kStateLanes)),
      cols(round_up(config.head_dim, kStateLanes)),
      keys_size(slots * config.head_dim),
      head_size(round_up(keys_size + slots * cols, 2 * kStateLanes)) {}

CpuStatePool::CpuStatePool(const ModelConfig& config, DType ring_dtype, int capacity, CpuBackend& memory)
    : layers_(config.layers), ring_dtype_(ring_dtype), capacity_(capacity) {
  for (const MixerConfig& mixer : layers_) {
    const std::size_t layer = layer_nbytes(mixer, size_of(ring_dtype));
    offsets_.push_back(slot_nbytes_);
    large_rings_.push_back(std::holds_alternative<SlidingWindowConfig>(mixer) && layer >= kLargeRing);
    slot_nbytes_ = checked_add(slot_nbytes_, layer);
    slot_nbytes_ = checked_add(slot_nbytes_, kAlignment - 1) / kAlignment * kAlignment;
  }
  const std::size_t nbytes = checked_mul(capacity, slot_nbytes_);
  buffer_ = memory.allocate_states(nbytes, std::ranges::count(large_rings_, true) > 0);
  data_ = static_cast<std::byte*>(buffer_.data.get());
}

void CpuStatePool::reset(int slot) const {
  std::byte* const begin = this->slot(slot);
  for (std::size_t i = 0; i < offsets_.size(); ++i) {
    const std::size_t end = i + 1 < offsets_.size() ? offsets_[i + 1] : slot_nbytes_;
    if (large_rings_[i])
      give_back(begin + offsets_[i], end - offsets_[i]);
    else
      std::memset(begin + offsets_[i], 0, end - offsets_[i]);
  }
}

std::unique_ptr<backend::StatePool> CpuBackend::make_states(const ModelConfig& config, DType dtype, int capacity) {
  if (capacity < 1)
    throw InvalidArgument("capacity of a state pool must be at least 1, got " + std::to_string(capacity));
  if (dtype != DType::float32 && dtype != DType::bfloat16)
    throw InvalidArgument("keys and values are kept in float32 or bfloat16, not " + std::string(name_of(dtype)));
  return std::make_unique<CpuStatePool>(config, dtype, capacity, *this);
}

void CpuBackend::copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot) {
  const std::byte* source = pool_of(from).slot(from_slot);
  std::byte* target = pool_of(to).slot(to_slot);
  if (source != target) std::memcpy(target, source, from.nbytes_per_slot());
}

void CpuBackend::reset_state(backend::StatePool& states, int slot) { pool_of(states).reset(slot); }

std::vector<backend::NamedTensor> CpuBackend::export_state(const backend::StatePool& states, int slot,
                                                           std::int64_t num_tokens) {
  const CpuStatePool& pool = pool_of(states);
  std::vector<backend::NamedTensor> out;
  for (std::size_t i = 0; i < pool.layers().size(); ++i) {
    const int layer = static_cast<int>(i);
    const std::string prefix = "layers." + std::to_string(i);
    const auto add = [&](const char* name, DType dtype, std::vector<std::int64_t> shape) {
      out.push_back({prefix + name, Tensor::empty(dtype, std::move(shape))});
      return out.back().tensor.data_as<std::byte>();
    };
    if (const auto* conv = std::get_if<GatedConvConfig>(&pool.layers()[i])) {
      std::byte* saved = add(".conv", DType::float32, {conv->kernel_size - 1, conv->inner_size});
      const std::size_t nbytes = out.back().tensor.nbytes();
      if (nbytes > 0) std::memcpy(saved, pool.layer<std::byte>(slot, layer), nbytes);
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&pool.layers()[i])) {
      const std::int64_t dv = linear->head_dim;
      auto* saved =
          reinterpret_cast<float*>(add(".taylor", DType::float32, {linear->num_heads, linear->num_features(), dv + 1}));
      for_each_feature(*linear, pool.layer<const float>(slot, layer),
                       [&](std::int64_t row, const float* s, const float* z) {
                         std::memcpy(saved + row, s, static_cast<std::size_t>(dv) * sizeof(float));
                         saved[row + dv] = *z;
                       });
    } else {
      const auto& window = std::get<SlidingWindowConfig>(pool.layers()[i]);
      const DType dtype = pool.ring_dtype();
      const std::vector<std::int64_t> shape{std::min(num_tokens, window.window), window.num_kv_heads, window.head_dim};
      std::byte* keys = add(".keys", dtype, shape);
      std::byte* values = add(".values", dtype, shape);
      const auto* ring = pool.layer<const std::byte>(slot, layer);
      const auto width = static_cast<std::int64_t>(size_of(dtype));
      for_each_in_ring(window, num_tokens, [&](std::int64_t saved, std::int64_t key, std::int64_t value) {
        std::memcpy(keys + saved * width, ring + key * width, static_cast<std::size_t>(width));
        std::memcpy(values + saved * width, ring + value * width, static_cast<std::size_t>(width));
      });
    }
  }
  return out;
}

void CpuBackend::import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                              std::span<const backend::NamedView> tensors) {
  const CpuStatePool& pool = pool_of(states);
  reset_state(states, slot);
  auto tensor = tensors.begin();
  for (std::size_t i = 0; i < pool.layers().size(); ++i) {
    const int layer = static_cast<int>(i);
    if (std::holds_alternative<GatedConvConfig>(pool.layers()[i])) {
      const TensorView& saved = (tensor++)->view;
      if (saved.nbytes() > 0) std::memcpy(pool.layer<std::byte>(slot, layer), saved.data, saved.nbytes());
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&pool.layers()[i])) {
      std::vector<float> saved = to_floats((tensor++)->view);
      if (const auto pending = backend::take_pending(tensor, tensors.end()))
        backend::fold_pending(*linear, saved, to_floats(pending->keys), to_floats(pending->values));
      for_each_feature(*linear, pool.layer<float>(slot, layer), [&](std::int64_t row, float* s, float* z) {
        std::copy_n(saved.data() + row, linear->head_dim, s);
        *z = saved[static_cast<std::size_t>(row + linear->head_dim)];
      });
    } else {
      const auto& window = std::get<SlidingWindowConfig>(pool.layers()[i]);
      const TensorView& keys = (tensor++)->view;
      const TensorView& values = (tensor++)->view;
      auto* ring = pool.layer<std::byte>(slot, layer);
      const DType dtype = pool.ring_dtype();
      for_each_in_ring(window, num_tokens, [&](std::int64_t saved, std::int64_t key, std::int64_t value) {
        write_element(ring, key, dtype, read_element(keys.data, saved, keys.dtype));
        write_element(ring, value, dtype, read_element(values.data, saved, values.dtype));
      });
    }
  }
}

}  // namespace based::cpu
