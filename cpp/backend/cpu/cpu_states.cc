#include "backend/cpu/cpu_states.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <tuple>

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

// Extents beyond this cannot be allocated, and sums of a few products of two of them do not overflow.
constexpr std::int64_t kMaxExtent = std::int64_t{1} << 28;

void check_extents(const std::vector<std::int64_t>& extents) {
  for (std::int64_t extent : extents)
    if (extent < 0 || extent > kMaxExtent) throw std::bad_alloc();
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

backend::StateDTypes dtypes_of(DType model) { return {model, DType::float32}; }

// Calls visit(index in the saved keys and values, index in the ring's keys, in the ring's values) for each number of
// a saved window layer.
template <typename Visit>
void for_each_in_ring(const RingState& state, std::int64_t num_tokens, Visit&& visit) {
  const RingLayout ring(state);
  const std::int64_t count = std::min(num_tokens, state.rows);
  std::int64_t saved = 0;
  for (std::int64_t position = num_tokens - count; position < num_tokens; ++position) {
    const std::int64_t slot = position % ring.slots, block = slot / kStateLanes, lane = slot % kStateLanes;
    for (std::int64_t head = 0; head < state.num_heads; ++head) {
      const std::int64_t keys = head * ring.head_size + block * state.head_dim * kStateLanes + lane;
      const std::int64_t values = head * ring.head_size + ring.keys_size + slot * ring.cols;
      for (std::int64_t d = 0; d < state.head_dim; ++d) visit(saved++, keys + d * kStateLanes, values + d);
    }
  }
}

// Calls visit(row of the saved (H, num_features, head_dim + 1), row of S, its element of z).
template <typename Float, typename Visit>
void for_each_feature(const TaylorState& state, Float* data, Visit&& visit) {
  const TaylorLayout layout(state);
  std::int64_t saved = 0;
  for (std::int64_t head = 0; head < state.num_heads; ++head, data += layout.head_size)
    for (std::int64_t p = 0; p < layout.num_features; ++p, saved += state.head_dim + 1)
      visit(saved, data + p * layout.cols, data + layout.rows * layout.cols + p);
}

// Ring slots that a sequence of num_tokens tokens has written, in whole blocks.
std::int64_t used_slots(const RingState& state, std::int64_t num_tokens) {
  return round_up(std::min(num_tokens, state.rows), kStateLanes);
}

// Bytes of a ring beyond them.
std::size_t unused_nbytes(const RingState& state, std::size_t width, std::int64_t num_tokens) {
  const RingLayout ring(state);
  const std::int64_t unused = ring.slots - used_slots(state, num_tokens);
  return static_cast<std::size_t>(state.num_heads * unused * (state.head_dim + ring.cols)) * width;
}

// Copies the slots of a ring that a sequence of num_tokens tokens has written, and gives back the memory of the others.
void copy_ring(const RingState& state, std::size_t width, const std::byte* from, std::byte* to,
               std::int64_t num_tokens) {
  const RingLayout ring(state);
  const std::int64_t used = used_slots(state, num_tokens);
  for (std::int64_t head = 0; head < state.num_heads; ++head) {
    for (const auto& [first, count, size] : {std::tuple(std::int64_t{0}, used * state.head_dim, ring.keys_size),
                                             {ring.keys_size, used * ring.cols, ring.head_size - ring.keys_size}}) {
      const std::size_t at = static_cast<std::size_t>(head * ring.head_size + first) * width;
      const std::size_t nbytes = static_cast<std::size_t>(count) * width;
      std::memcpy(to + at, from + at, nbytes);
      give_back(to + at + nbytes, static_cast<std::size_t>(size) * width - nbytes);
    }
  }
}

// ---- by the kind of a part ------------------------------------------------------------------------------------------

// Bytes of a part in a slot.
struct SizeOf {
  backend::StateDTypes dtypes;

  std::size_t operator()(const DenseState& state) const {
    check_extents(state.shape);
    std::size_t nbytes = size_of(dtypes.kept(state.dtype));
    for (const std::int64_t extent : state.shape) nbytes = checked_mul(extent, nbytes);
    return nbytes;
  }
  std::size_t operator()(const RingState& state) const {
    check_extents({state.num_heads, state.head_dim, state.rows});
    return checked_mul(state.num_heads, checked_mul(RingLayout(state).head_size, size_of(dtypes.model)));
  }
  std::size_t operator()(const TaylorState& state) const {
    check_extents({state.num_heads, state.feature_dim, state.head_dim});
    check_extents({state.num_features()});
    return checked_mul(state.num_heads, checked_mul(TaylorLayout(state).head_size, sizeof(float)));
  }
};

struct IsLargeRing {
  backend::StateDTypes dtypes;

  bool operator()(const RingState& state) const { return SizeOf{dtypes}(state) >= kLargeRing; }
  template <class Other>
  bool operator()(const Other&) const {
    return false;
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
    std::byte* keys = writer.add(layer, "keys", dtypes.model, state.saved_shape(num_tokens));
    std::byte* values = writer.add(layer, "values", dtypes.model, state.saved_shape(num_tokens));
    const auto width = static_cast<std::int64_t>(size_of(dtypes.model));
    for_each_in_ring(state, num_tokens, [&](std::int64_t saved, std::int64_t key, std::int64_t value) {
      std::memcpy(keys + saved * width, data + key * width, static_cast<std::size_t>(width));
      std::memcpy(values + saved * width, data + value * width, static_cast<std::size_t>(width));
    });
  }

  void operator()(const TaylorState& state) const {
    const std::int64_t dv = state.head_dim;
    auto* saved = reinterpret_cast<float*>(writer.add(layer, "taylor", DType::float32, state.saved_shape()));
    for_each_feature(state, reinterpret_cast<const float*>(data),
                     [&](std::int64_t row, const float* s, const float* z) {
                       std::memcpy(saved + row, s, static_cast<std::size_t>(dv) * sizeof(float));
                       saved[row + dv] = *z;
                     });
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
    const std::vector<std::byte> keys = backend::converted(reader.take(), dtypes.model);
    const std::vector<std::byte> values = backend::converted(reader.take(), dtypes.model);
    const auto width = static_cast<std::int64_t>(size_of(dtypes.model));
    for_each_in_ring(state, num_tokens, [&](std::int64_t saved, std::int64_t key, std::int64_t value) {
      std::memcpy(data + key * width, keys.data() + saved * width, static_cast<std::size_t>(width));
      std::memcpy(data + value * width, values.data() + saved * width, static_cast<std::size_t>(width));
    });
  }

  void operator()(const TaylorState& state) const {
    std::vector<float> saved = backend::to_floats(reader.take());
    if (const auto pending = reader.take_pending()) backend::fold_pending(state, saved, *pending);
    for_each_feature(state, reinterpret_cast<float*>(data), [&](std::int64_t row, float* s, float* z) {
      std::copy_n(saved.data() + row, state.head_dim, s);
      *z = saved[static_cast<std::size_t>(row + state.head_dim)];
    });
  }
};

}  // namespace

TaylorLayout::TaylorLayout(const TaylorState& state)
    : num_features(state.num_features()),
      rows(round_up(num_features, 4)),
      cols(round_up(state.head_dim, kStateLanes)),
      size_z(round_up(num_features, kStateLanes)),
      head_size(rows * cols + size_z) {}

RingLayout::RingLayout(const RingState& state)
    : slots(round_up(state.rows, kStateLanes)),
      cols(round_up(state.head_dim, kStateLanes)),
      keys_size(slots * state.head_dim),
      head_size(round_up(keys_size + slots * cols, 2 * kStateLanes)) {}

backend::StateLayout state_layout(const ModelConfig& config, DType model) {
  if (model != DType::float32 && model != DType::bfloat16)
    throw InvalidArgument("keys and values are kept in float32 or bfloat16, not " + std::string(name_of(model)));
  return {config, kAlignment, [&](const StatePart& state) { return std::visit(SizeOf{dtypes_of(model)}, state); }};
}

CpuStatePool::CpuStatePool(const ModelConfig& config, DType dtype, int capacity, CpuBackend& memory)
    : layout_(state_layout(config, dtype)), dtype_(dtype), capacity_(capacity) {
  for (const auto& part : layout_.parts())
    large_rings_.push_back(std::visit(IsLargeRing{dtypes_of(dtype)}, part.state));
  buffer_ = memory.allocate_states(layout_.pool_nbytes(capacity), std::ranges::count(large_rings_, true) > 0);
  data_ = static_cast<std::byte*>(buffer_.data.get());
}

std::size_t CpuStatePool::part_nbytes(std::size_t part) const {
  const auto& parts = layout_.parts();
  return (part + 1 < parts.size() ? parts[part + 1].offset : layout_.slot_nbytes()) - parts[part].offset;
}

void CpuStatePool::reset(int slot) const {
  std::byte* const begin = this->slot(slot);
  const auto& parts = layout_.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (large_rings_[i])
      give_back(begin + parts[i].offset, part_nbytes(i));
    else
      std::memset(begin + parts[i].offset, 0, part_nbytes(i));
  }
}

void CpuStatePool::copy(int to_slot, const std::byte* from, std::int64_t num_tokens) const {
  std::byte* const to = slot(to_slot);
  if (to == from) return;
  const auto& parts = layout_.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::size_t begin = parts[i].offset;
    if (large_rings_[i])
      copy_ring(std::get<RingState>(parts[i].state), size_of(dtype_), from + begin, to + begin, num_tokens);
    else
      std::memcpy(to + begin, from + begin, part_nbytes(i));
  }
}

std::size_t CpuBackend::state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens) const {
  const backend::StateLayout layout = state_layout(config, dtype);
  std::size_t unused = 0;
  for (const auto& part : layout.parts())
    if (std::visit(IsLargeRing{dtypes_of(dtype)}, part.state))
      unused += unused_nbytes(std::get<RingState>(part.state), size_of(dtype), num_tokens);
  return layout.slot_nbytes() - unused;
}

std::unique_ptr<backend::StatePool> CpuBackend::make_states(const ModelConfig& config, DType dtype, int capacity) {
  if (capacity < 1)
    throw InvalidArgument("capacity of a state pool must be at least 1, got " + std::to_string(capacity));
  return std::make_unique<CpuStatePool>(config, dtype, capacity, *this);
}

void CpuBackend::copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot,
                            std::int64_t num_tokens) {
  pool_of(to).copy(to_slot, pool_of(from).slot(from_slot), num_tokens);
}

void CpuBackend::reset_state(backend::StatePool& states, int slot) { pool_of(states).reset(slot); }

std::vector<backend::NamedTensor> CpuBackend::export_state(const backend::StatePool& states, int slot,
                                                           std::int64_t num_tokens) {
  const CpuStatePool& pool = pool_of(states);
  backend::StateWriter writer;
  for (const auto& part : pool.layout().parts())
    std::visit(Save{dtypes_of(pool.ring_dtype()), num_tokens, part.layer, pool.slot(slot) + part.offset, writer},
               part.state);
  return std::move(writer.tensors);
}

void CpuBackend::import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                              std::span<const backend::NamedView> tensors) {
  const CpuStatePool& pool = pool_of(states);
  reset_state(states, slot);
  backend::StateReader reader(tensors);
  for (const auto& part : pool.layout().parts())
    std::visit(Restore{dtypes_of(pool.ring_dtype()), num_tokens, pool.slot(slot) + part.offset, reader}, part.state);
}

}  // namespace based::cpu
