#include "backend/cpu/cpu_states.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <tuple>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_memory.h"
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

// The same for the keys and values of all tokens, whose saved rows are those of one piece, from `begin` on.
template <typename Visit>
void for_each_in_piece(const ContextState& state, std::int64_t begin, std::int64_t num_tokens, Visit&& visit) {
  const ContextLayout layout(state);
  std::int64_t saved = begin * state.num_heads * state.head_dim;
  for (std::int64_t t = 0; t < std::min(num_tokens - begin, kPieceTokens); ++t) {
    const std::int64_t block = t / kStateLanes, lane = t % kStateLanes;
    for (std::int64_t head = 0; head < state.num_heads; ++head) {
      const std::int64_t keys = head * layout.head_size + block * layout.block_size;
      const std::int64_t values = keys + kStateLanes * state.head_dim + lane * layout.cols;
      for (std::int64_t d = 0; d < state.head_dim; ++d) visit(saved++, keys + d * kStateLanes + lane, values + d);
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

// Bytes of the keys and values of all tokens, in whole blocks.
std::size_t context_nbytes(const ContextState& state, std::size_t width, std::int64_t num_tokens) {
  check_extents({state.num_heads, state.head_dim});
  const std::size_t of_block = checked_mul(state.num_heads, checked_mul(ContextLayout(state).block_size, width));
  return checked_mul(num_tokens / kStateLanes + (num_tokens % kStateLanes > 0 ? 1 : 0), of_block);
}

std::size_t pieces_for(std::int64_t num_tokens) {
  return static_cast<std::size_t>((num_tokens + kPieceTokens - 1) / kPieceTokens);
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
  std::size_t operator()(const ContextState& state) const {
    context_nbytes(state, size_of(dtypes.model), kPieceTokens);
    return 0;  // in pieces of memory of its own
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
  std::function<std::byte*(std::int64_t position)> piece;  // of a ContextState
  backend::StateWriter& writer;

  void operator()(const DenseState& state) const { save_dense(state, dtypes, data, layer, writer); }

  void operator()(const RingState& state) const {
    const Rows rows = add_rows(state.saved_shape(num_tokens));
    for_each_in_ring(state, num_tokens, [&](auto... at) { rows.copy(data, at...); });
  }

  void operator()(const ContextState& state) const {
    const Rows rows = add_rows(state.saved_shape(num_tokens));
    for (std::int64_t begin = 0; begin < num_tokens; begin += kPieceTokens) {
      const std::byte* from = piece(begin);
      for_each_in_piece(state, begin, num_tokens, [&](auto... at) { rows.copy(from, at...); });
    }
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

 private:
  // Saved keys and values.
  struct Rows {
    std::byte *keys, *values;
    std::int64_t width;
    void copy(const std::byte* from, std::int64_t saved, std::int64_t key, std::int64_t value) const {
      std::memcpy(keys + saved * width, from + key * width, static_cast<std::size_t>(width));
      std::memcpy(values + saved * width, from + value * width, static_cast<std::size_t>(width));
    }
  };
  Rows add_rows(const std::vector<std::int64_t>& shape) const {
    return {writer.add(layer, "keys", dtypes.model, shape), writer.add(layer, "values", dtypes.model, shape),
            static_cast<std::int64_t>(size_of(dtypes.model))};
  }
};

// Its inverse, into a slot of zeros.
struct Restore {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  std::byte* data;
  std::function<std::byte*(std::int64_t position)> piece;  // of a ContextState
  backend::StateReader& reader;

  void operator()(const DenseState& state) const { restore_dense(state, dtypes, reader, data); }

  void operator()(const RingState& state) const {
    const Rows rows = take_rows();
    for_each_in_ring(state, num_tokens, [&](auto... at) { rows.copy(data, at...); });
  }

  void operator()(const ContextState& state) const {
    const Rows rows = take_rows();
    for (std::int64_t begin = 0; begin < num_tokens; begin += kPieceTokens) {
      std::byte* to = piece(begin);
      for_each_in_piece(state, begin, num_tokens, [&](auto... at) { rows.copy(to, at...); });
    }
  }

  void operator()(const TaylorState& state) const {
    std::vector<float> saved = backend::to_floats(reader.take());
    if (const auto pending = reader.take_pending()) backend::fold_pending(state, saved, *pending);
    for_each_feature(state, reinterpret_cast<float*>(data), [&](std::int64_t row, float* s, float* z) {
      std::copy_n(saved.data() + row, state.head_dim, s);
      *z = saved[static_cast<std::size_t>(row + state.head_dim)];
    });
  }

 private:
  struct Rows {
    std::vector<std::byte> keys, values;
    std::int64_t width;
    void copy(std::byte* to, std::int64_t saved, std::int64_t key, std::int64_t value) const {
      std::memcpy(to + key * width, keys.data() + saved * width, static_cast<std::size_t>(width));
      std::memcpy(to + value * width, values.data() + saved * width, static_cast<std::size_t>(width));
    }
  };
  Rows take_rows() const {
    std::vector<std::byte> keys = backend::converted(reader.take(), dtypes.model);
    std::vector<std::byte> values = backend::converted(reader.take(), dtypes.model);
    return {std::move(keys), std::move(values), static_cast<std::int64_t>(size_of(dtypes.model))};
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

ContextLayout::ContextLayout(const ContextState& state)
    : cols(round_up(state.head_dim, kStateLanes)),
      block_size(kStateLanes * (state.head_dim + cols)),
      head_size(kPieceTokens / kStateLanes * block_size) {}

backend::StateLayout state_layout(const ModelConfig& config, DType model) {
  if (model != DType::float32 && model != DType::bfloat16)
    throw InvalidArgument("keys and values are kept in float32 or bfloat16, not " + std::string(name_of(model)));
  return {config, kAlignment, [&](const StatePart& state) { return std::visit(SizeOf{dtypes_of(model)}, state); }};
}

CpuStatePool::CpuStatePool(const ModelConfig& config, DType dtype, int capacity, CpuBackend& memory)
    : layout_(state_layout(config, dtype)), dtype_(dtype), capacity_(capacity) {
  for (const auto& part : layout_.parts()) {
    large_rings_.push_back(std::visit(IsLargeRing{dtypes_of(dtype)}, part.state));
    in_piece_.push_back(piece_nbytes_);
    if (const auto* state = std::get_if<ContextState>(&part.state))
      piece_nbytes_ += context_nbytes(*state, size_of(dtype), kPieceTokens);
  }
  const bool has_large_rings = std::ranges::count(large_rings_, true) > 0;
  grows_ = has_large_rings || piece_nbytes_ > 0;
  buffer_ = memory.allocate_states(layout_.pool_nbytes(capacity), has_large_rings);
  data_ = static_cast<std::byte*>(buffer_.data.get());
  // Behind the states: where these do not fit, nothing else is taken.
  pieces_.resize(static_cast<std::size_t>(capacity));
  reserved_.resize(static_cast<std::size_t>(capacity));
}

std::size_t CpuStatePool::part_nbytes(std::size_t part) const {
  const auto& parts = layout_.parts();
  return (part + 1 < parts.size() ? parts[part + 1].offset : layout_.slot_nbytes()) - parts[part].offset;
}

std::size_t CpuStatePool::growing_nbytes(std::int64_t num_tokens) const {
  std::size_t total = 0;
  for (std::size_t i = 0; i < large_rings_.size(); ++i) {
    const StatePart& part = layout_.parts()[i].state;
    if (large_rings_[i])
      total += part_nbytes(i) - unused_nbytes(std::get<RingState>(part), size_of(dtype_), num_tokens);
    else if (const auto* context = std::get_if<ContextState>(&part))
      total += context_nbytes(*context, size_of(dtype_), num_tokens);
  }
  return total;
}

void CpuStatePool::reserve(std::span<const std::int32_t> slots, std::span<const std::int64_t> num_tokens,
                           CpuBackend& memory) {
  if (!grows_) return;
  std::size_t grown = 0;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::int64_t before = reserved_[static_cast<std::size_t>(slots[i])];
    if (round_up(before, kStateLanes) < num_tokens[i])  // memory is counted in whole blocks
      grown += growing_nbytes(num_tokens[i]) - growing_nbytes(before);
  }
  if (grown > 0) memory.check_available(grown);
  std::vector<std::vector<backend::Buffer>> added(slots.size());
  for (std::size_t i = 0; i < slots.size() && piece_nbytes_ > 0; ++i) {
    auto& pieces = pieces_[static_cast<std::size_t>(slots[i])];
    const std::size_t wanted = pieces_for(num_tokens[i]);
    if (wanted <= pieces.size()) continue;
    pieces.reserve(wanted);
    while (pieces.size() + added[i].size() < wanted) added[i].push_back(memory.allocate_states(piece_nbytes_, true));
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {  // nothing here fails
    const auto slot = static_cast<std::size_t>(slots[i]);
    for (backend::Buffer& piece : added[i]) pieces_[slot].push_back(std::move(piece));
    reserved_[slot] = std::max(reserved_[slot], num_tokens[i]);
  }
}

void CpuStatePool::clear(int slot, std::int64_t num_tokens) {
  std::byte* const begin = this->slot(slot);
  const auto& parts = layout_.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (large_rings_[i])
      give_back(begin + parts[i].offset, part_nbytes(i));
    else
      std::memset(begin + parts[i].offset, 0, part_nbytes(i));
  }
  keep(slot, num_tokens);
}

void CpuStatePool::keep(int slot, std::int64_t num_tokens) {
  auto& pieces = pieces_[static_cast<std::size_t>(slot)];
  pieces.resize(std::min(pieces.size(), pieces_for(num_tokens)));
  reserved_[static_cast<std::size_t>(slot)] = num_tokens;
}

void CpuStatePool::copy(int to_slot, const CpuStatePool& from, int from_slot, std::int64_t num_tokens,
                        CpuBackend& memory) {
  if (this == &from && to_slot == from_slot) return;
  reserve({&to_slot, 1}, {&num_tokens, 1}, memory);
  std::byte* const to = slot(to_slot);
  const std::byte* const source = from.slot(from_slot);
  const auto& parts = layout_.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::size_t begin = parts[i].offset;
    if (large_rings_[i])
      copy_ring(std::get<RingState>(parts[i].state), size_of(dtype_), source + begin, to + begin, num_tokens);
    else if (const auto* context = std::get_if<ContextState>(&parts[i].state))
      copy_context(*context, i, to_slot, from, from_slot, num_tokens);
    else
      std::memcpy(to + begin, source + begin, part_nbytes(i));
  }
  keep(to_slot, num_tokens);
}

std::vector<backend::MemoryPiece> CpuStatePool::pieces(int slot, std::int64_t num_tokens) const {
  std::vector<backend::MemoryPiece> result{{this->slot(slot), layout_.slot_nbytes()}};
  const auto& context = pieces_[static_cast<std::size_t>(slot)];
  for (std::size_t i = 0; i < std::min(context.size(), pieces_for(num_tokens)); ++i)
    result.push_back({static_cast<std::byte*>(context[i].data.get()), context[i].nbytes});
  return result;
}

void CpuStatePool::copy_context(const ContextState& state, std::size_t part, int to_slot, const CpuStatePool& from,
                                int from_slot, std::int64_t num_tokens) const {
  const ContextLayout layout(state);
  const std::size_t width = size_of(dtype_), head_nbytes = static_cast<std::size_t>(layout.head_size) * width;
  for (std::int64_t begin = 0; begin < num_tokens; begin += kPieceTokens) {
    const std::int64_t blocks = (std::min(num_tokens - begin, kPieceTokens) + kStateLanes - 1) / kStateLanes;
    std::byte* to = context_data(to_slot, part, begin);
    const std::byte* source = from.context_data(from_slot, part, begin);
    for (std::int64_t head = 0; head < state.num_heads; ++head, to += head_nbytes, source += head_nbytes)
      std::memcpy(to, source, static_cast<std::size_t>(blocks * layout.block_size) * width);
  }
}

std::size_t CpuBackend::state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens) const {
  const backend::StateLayout layout = state_layout(config, dtype);
  std::size_t unused = 0;
  for (const auto& part : layout.parts())
    if (std::visit(IsLargeRing{dtypes_of(dtype)}, part.state))
      unused += unused_nbytes(std::get<RingState>(part.state), size_of(dtype), num_tokens);
  std::size_t total = layout.slot_nbytes() - unused;
  for (const auto& part : layout.parts())
    if (const auto* context = std::get_if<ContextState>(&part.state))
      if (__builtin_add_overflow(total, context_nbytes(*context, size_of(dtype), num_tokens), &total))
        throw std::bad_alloc();
  return total;
}

std::size_t CpuBackend::available_nbytes() const { return available_memory(); }

// Reading the system's counts takes about 50 µs, so what was found to be free is used up first.
void CpuBackend::check_available(std::size_t nbytes) {
  if (nbytes > found_) {
    const std::size_t available = available_memory();
    if (nbytes > available)
      throw OutOfMemory("out of memory: " + std::to_string(nbytes) + " bytes of states are needed, " +
                        std::to_string(available) + " bytes are available");
    found_ = nbytes + std::min(available - nbytes, kFoundAhead);
  }
  found_ -= nbytes;
}

std::unique_ptr<backend::StatePool> CpuBackend::make_states(const ModelConfig& config, DType dtype, int capacity) {
  if (capacity < 1)
    throw InvalidArgument("capacity of a state pool must be at least 1, got " + std::to_string(capacity));
  return std::make_unique<CpuStatePool>(config, dtype, capacity, *this);
}

void CpuBackend::copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot,
                            std::int64_t num_tokens) {
  pool_of(to).copy(to_slot, pool_of(from), from_slot, num_tokens, *this);
}

void CpuBackend::reserve_states(backend::StatePool& states, std::span<const std::int32_t> slots,
                                std::span<const std::int64_t> num_tokens) {
  pool_of(states).reserve(slots, num_tokens, *this);
}

std::vector<backend::MemoryPiece> CpuBackend::state_pieces(const backend::StatePool& states, int slot,
                                                           std::int64_t num_tokens) const {
  return pool_of(states).pieces(slot, num_tokens);
}

void CpuBackend::reset_state(backend::StatePool& states, int slot) { pool_of(states).clear(slot, 0); }

std::vector<backend::NamedTensor> CpuBackend::export_state(const backend::StatePool& states, int slot,
                                                           std::int64_t num_tokens) {
  const CpuStatePool& pool = pool_of(states);
  backend::StateWriter writer;
  const auto& parts = pool.layout().parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto piece = [&, i](std::int64_t position) { return pool.context_data(slot, i, position); };
    std::visit(Save{dtypes_of(pool.ring_dtype()), num_tokens, parts[i].layer, pool.slot(slot) + parts[i].offset, piece,
                    writer},
               parts[i].state);
  }
  return std::move(writer.tensors);
}

void CpuBackend::import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                              std::span<const backend::NamedView> tensors) {
  CpuStatePool& pool = pool_of(states);
  const std::int32_t slots[] = {slot};
  const std::int64_t lengths[] = {num_tokens};
  pool.reserve(slots, lengths, *this);
  pool.clear(slot, num_tokens);
  backend::StateReader reader(tensors);
  const auto& parts = pool.layout().parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto piece = [&, i](std::int64_t position) { return pool.context_data(slot, i, position); };
    std::visit(Restore{dtypes_of(pool.ring_dtype()), num_tokens, pool.slot(slot) + parts[i].offset, piece, reader},
               parts[i].state);
  }
}

}  // namespace based::cpu
