#include "cuda_states.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include "based/error.h"

namespace based::cuda {

namespace {

constexpr std::size_t kAlignment = 256;

// From this size on a ring takes memory as it is used. Smaller ones are in the slot, whose copy is one.
constexpr std::size_t kLargeRing = std::size_t{8} << 20;
constexpr std::size_t kPage = std::size_t{2} << 20;  // memory is mapped in multiples of
constexpr std::int64_t kPieceRows = 128;             // at least, or a step would map memory too often
constexpr std::int64_t kMaxPieceRows = 1 << 16;

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

// Rows of a part that is keys and values.
std::int64_t rows_of(const RingState& state) { return state.rows; }
std::int64_t rows_of(const ContextState&) { return StatePlaces::kNoEnd; }

// Calls visit(row of the saved keys or values, row in which the part has it) for the positions that a part holds.
template <class State, typename Visit>
void for_each_row(const State& state, std::int64_t num_tokens, Visit&& visit) {
  const std::int64_t rows = rows_of(state), count = std::min(num_tokens, rows);
  for (std::int64_t i = 0; i < count; ++i) visit(i, (num_tokens - count + i) % rows);
}

// ---- by the kind of a part ------------------------------------------------------------------------------------------

// Bytes of a part in a slot.
struct SizeOf {
  backend::StateDTypes dtypes;

  std::size_t operator()(const DenseState& state) const {
    return nbytes_of({num_elements(state.shape)}, dtypes.kept(state.dtype));
  }
  std::size_t operator()(const RingState& state) const {
    const std::size_t nbytes = nbytes_of({2, state.rows, state.num_heads, state.head_dim}, dtypes.model);
    return nbytes < kLargeRing ? nbytes : 0;  // StatePlaces
  }
  std::size_t operator()(const TaylorState& state) const {
    nbytes_of({num_elements(state.saved_shape())}, DType::float32);
    nbytes_of({state.num_heads, kPendingTokens, state.feature_dim + state.head_dim}, dtypes.model);
    return linear_attention_state_bytes(config_of(state)) + PendingLayout(config_of(state), dtypes.model).nbytes;
  }
  std::size_t operator()(const ContextState& state) const {
    nbytes_of({2, limits::kSize, state.num_heads, state.head_dim}, dtypes.model);
    return 0;
  }
};

// Writes a part's saved tensors.
struct Save {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  int layer;
  const std::byte* data;
  std::optional<HostRows> kept;  // of keys and values
  backend::StateWriter& writer;

  void operator()(const DenseState& state) const { save_dense(state, dtypes, data, layer, writer); }
  void operator()(const RingState& state) const { save_rows(state); }
  void operator()(const ContextState& state) const { save_rows(state); }

  template <class State>
  void save_rows(const State& state) const {
    const std::size_t nbytes = static_cast<std::size_t>(state.head_dim) * size_of(dtypes.model);
    for (const auto& [name, behind] : {std::pair("keys", std::size_t{0}), {"values", kept->values}}) {
      std::byte* saved = writer.add(layer, name, dtypes.model, state.saved_shape(num_tokens));
      for_each_row(state, num_tokens, [&, distance = behind](std::int64_t to, std::int64_t from) {
        for (std::int64_t head = 0; head < state.num_heads; ++head)
          std::memcpy(saved + static_cast<std::size_t>(to * state.num_heads + head) * nbytes,
                      kept->key(from, head) + distance, nbytes);
      });
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

// Its inverse, into zeros.
struct Restore {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  std::byte* data;
  std::optional<HostRows> kept;
  backend::StateReader& reader;

  void operator()(const DenseState& state) const { restore_dense(state, dtypes, reader, data); }
  void operator()(const RingState& state) const { restore_rows(state); }
  void operator()(const ContextState& state) const { restore_rows(state); }

  template <class State>
  void restore_rows(const State& state) const {
    const std::size_t nbytes = static_cast<std::size_t>(state.head_dim) * size_of(dtypes.model);
    for (const std::size_t distance : {std::size_t{0}, kept->values}) {
      const std::vector<std::byte> saved = backend::converted(reader.take(), dtypes.model);
      for_each_row(state, num_tokens, [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t head = 0; head < state.num_heads; ++head)
          std::memcpy(kept->key(to, head) + distance,
                      saved.data() + static_cast<std::size_t>(from * state.num_heads + head) * nbytes, nbytes);
      });
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

// Rows of a part that is apart from the slot.
struct RowsOutside {
  backend::StateDTypes dtypes;

  std::optional<std::int64_t> operator()(const RingState& state) const {
    if (SizeOf{dtypes}(state) > 0) return std::nullopt;
    return state.rows;
  }
  std::optional<std::int64_t> operator()(const ContextState& state) const { return rows_of(state); }
  template <class Other>
  std::optional<std::int64_t> operator()(const Other&) const {
    return std::nullopt;
  }
};

// Bytes of a head's key outside, and of a row of keys: whole words of 16.
struct KeysNbytes {
  DType model;

  template <class State>
  std::pair<std::size_t, std::size_t> operator()(const State& state) const {
    if constexpr (requires { rows_of(state); }) {
      const std::size_t of_head = round_up(nbytes_of({state.head_dim}, model), 16);
      return {of_head, nbytes_of({state.num_heads, static_cast<std::int64_t>(of_head)}, DType::uint8)};
    } else {
      return {};
    }
  }
};

// ---- places ---------------------------------------------------------------------------------------------------------

StatePlaces::StatePlaces(const ModelConfig& config, DType model)
    : slot(config, kAlignment, [&](const StatePart& state) { return std::visit(SizeOf{dtypes_of(model)}, state); }),
      growing(slot.parts().size()) {
  for (std::size_t i = 0; i < growing.size(); ++i) {
    const StatePart& part = slot.parts()[i].state;
    const auto rows = std::visit(RowsOutside{dtypes_of(model)}, part);
    if (!rows) continue;
    auto region = std::ranges::find(regions, *rows, &Region::rows);
    if (region == regions.end()) region = regions.insert(region, Region{.rows = *rows});
    const auto [head_nbytes, keys_nbytes] = std::visit(KeysNbytes{model}, part);
    growing[i] =
        Growing{static_cast<std::size_t>(region - regions.begin()), region->row_nbytes, head_nbytes, keys_nbytes};
    region->row_nbytes += 2 * keys_nbytes;
  }
  for (Region& region : regions) {
    // Of small rows as many as a page holds.
    region.piece_rows = kPieceRows;
    while (region.piece_rows < kMaxPieceRows &&
           static_cast<std::size_t>(2 * region.piece_rows) * region.row_nbytes <= kPage)
      region.piece_rows *= 2;
    region.piece_nbytes =
        round_up(nbytes_of({region.piece_rows, static_cast<std::int64_t>(region.row_nbytes)}, DType::uint8), kPage);
    if (region.rows != kNoEnd) region.nbytes(region.rows);
  }
}

std::size_t StatePlaces::Region::nbytes(std::int64_t num_tokens) const {
  const std::int64_t used = std::min(num_tokens, rows);
  const std::int64_t pieces = used / piece_rows + (used % piece_rows > 0 ? 1 : 0);
  return nbytes_of({pieces, static_cast<std::int64_t>(piece_nbytes)}, DType::uint8);
}

std::size_t StatePlaces::state_nbytes(std::int64_t num_tokens) const {
  std::size_t total = slot.slot_nbytes();
  for (const Region& region : regions) total += region.nbytes(num_tokens);
  return total;
}

// ---- the pool -------------------------------------------------------------------------------------------------------

CudaStatePool::CudaStatePool(const ModelConfig& config, DType dtype, int capacity)
    : places_(config, dtype), dtype_(dtype), capacity_(capacity), sums_nbytes_(config.layers.size()) {
  for (const auto& part : places_.slot.parts())
    if (const auto* taylor = std::get_if<TaylorState>(&part.state))
      sums_nbytes_[static_cast<std::size_t>(part.layer)] = linear_attention_state_bytes(config_of(*taylor));
}

CudaStatePool::~CudaStatePool() {
  if (addresses_ == nullptr) return;
  try {
    stream_->synchronize("ending a pool of states");
  } catch (const std::exception&) {
    // A device that has failed: there is nothing left to wait for.
  }
}

std::size_t CudaStatePool::nbytes_per_slot() const {
  std::size_t total = slot_nbytes();
  for (const StatePlaces::Region& region : places_.regions)
    if (region.rows != StatePlaces::kNoEnd) total += region.nbytes(region.rows);
  return total;
}

void CudaStatePool::attach(backend::Buffer memory, std::shared_ptr<const Stream> stream,
                           std::shared_ptr<backend::MemoryCounters> counters) {
  buffer_ = std::move(memory);
  data_ = static_cast<std::byte*>(buffer_.data.get());
  stream_ = std::move(stream);
  counters_ = std::move(counters);
  if (places_.regions.empty()) return;
  const int device = stream_->device();
  if (const std::size_t granularity = AddressRange::granularity(device); kPage % granularity != 0)
    throw UnsupportedError("cuda:" + std::to_string(device) + " maps memory in pieces of " +
                           std::to_string(granularity) + " bytes, expected a divisor of " + std::to_string(kPage));
  const UseDevice use(device);
  const std::size_t memory_nbytes = device_memory().total;
  for (const StatePlaces::Region& region : places_.regions) {
    region_offsets_.push_back(growing_nbytes_);
    const std::size_t room =
        region.rows != StatePlaces::kNoEnd
            ? region.nbytes(region.rows)
            : round_up(std::min(memory_nbytes, kOvercommit * memory_nbytes / static_cast<std::size_t>(capacity_)),
                       region.piece_nbytes);
    room_.push_back(room);
    growing_nbytes_ += room;
  }
  const std::int64_t nbytes = num_elements({capacity_, static_cast<std::int64_t>(growing_nbytes_)});
  addresses_ = std::make_shared<AddressRange>(device, static_cast<std::size_t>(nbytes));
  mapped_.resize(static_cast<std::size_t>(capacity_) * places_.regions.size());
  grown_.resize(mapped_.size());
}

KeyValueView CudaStatePool::keys_and_values(int layer) const {
  const std::size_t part = places_.slot.index(layer);
  const auto elements = [&](std::size_t nbytes) { return static_cast<std::int64_t>(nbytes / size_of(dtype_)); };
  if (const auto& growing = places_.growing[part]) {
    const StatePlaces::Region& region = places_.regions[growing->region];
    const auto piece_rows = static_cast<std::size_t>(region.piece_rows);
    return {{addresses_->data() + offset(0, growing->region) + growing->row * piece_rows, growing_nbytes_},
            elements(growing->head_nbytes),
            elements(growing->keys_nbytes),
            elements(growing->keys_nbytes * piece_rows),
            elements(region.piece_nbytes),
            std::countr_zero(piece_rows)};
  }
  const auto& state = std::get<RingState>(places_.slot.parts()[part].state);
  const std::int64_t row = state.num_heads * state.head_dim;
  return {this->layer(layer), state.head_dim, row, state.rows * row};
}

void CudaStatePool::reserve(int slot, std::int64_t num_tokens) {
  for (std::size_t i = 0; i < places_.regions.size(); ++i) {
    const StatePlaces::Region& region = places_.regions[i];
    const std::size_t at = static_cast<std::size_t>(slot) * places_.regions.size() + i;
    const std::size_t wanted = region.nbytes(num_tokens);
    if (wanted <= mapped_[at]) continue;
    if (wanted > room_[i])
      throw OutOfMemory("out of memory: keys and values of " + std::to_string(num_tokens) + " tokens take " +
                        std::to_string(wanted) + " bytes, but each of " + std::to_string(capacity_) +
                        " sequences has addresses for " + std::to_string(room_[i]) +
                        ": take fewer sequences at a time, or shorter ones");
    const std::size_t nbytes = wanted - mapped_[at];
    grown_[at].reserve(grown_[at].size() + 1);
    grown_[at].push_back(backend::counted({addresses_->map(offset(slot, i) + mapped_[at], nbytes), nbytes}, counters_,
                                          backend::MemoryKind::states));
    mapped_[at] = wanted;
  }
}

void CudaStatePool::release(int slot, const Stream& user) {
  for (std::size_t i = 0; i < places_.regions.size(); ++i) {
    const std::size_t at = static_cast<std::size_t>(slot) * places_.regions.size() + i;
    if (mapped_[at] == 0) continue;
    user.synchronize("resetting a state");
    grown_[at].clear();
    mapped_[at] = 0;
  }
}

std::vector<CudaStatePool::Block> CudaStatePool::blocks(int slot, std::int64_t num_tokens) const {
  std::vector<Block> result{{this->slot(slot), slot_nbytes()}};
  for (std::size_t i = 0; i < places_.regions.size(); ++i)
    result.push_back({addresses_->data() + offset(slot, i), places_.regions[i].nbytes(num_tokens)});
  return result;
}

std::optional<HostRows> CudaStatePool::host_rows(std::size_t part, std::span<const Block> blocks) const {
  if (const auto& growing = places_.growing[part]) {
    const StatePlaces::Region& region = places_.regions[growing->region];
    const auto piece_rows = static_cast<std::size_t>(region.piece_rows);
    return HostRows{blocks[1 + growing->region].data + growing->row * piece_rows,
                    growing->head_nbytes,
                    growing->keys_nbytes,
                    growing->keys_nbytes * piece_rows,
                    region.piece_rows,
                    region.piece_nbytes};
  }
  const auto* state = std::get_if<RingState>(&places_.slot.parts()[part].state);
  if (state == nullptr) return std::nullopt;
  const std::size_t row = static_cast<std::size_t>(state->num_heads * state->head_dim) * size_of(dtype_);
  return HostRows{blocks[0].data + places_.slot.parts()[part].offset,
                  static_cast<std::size_t>(state->head_dim) * size_of(dtype_),
                  row,
                  static_cast<std::size_t>(state->rows) * row,
                  state->rows,
                  0};
}

std::vector<backend::NamedTensor> CudaStatePool::save(std::span<const Block> blocks, std::int64_t num_tokens) const {
  backend::StateWriter writer;
  const auto& parts = places_.slot.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    std::visit(Save{dtypes_of(dtype_), num_tokens, parts[i].layer, blocks[0].data + parts[i].offset,
                    host_rows(i, blocks), writer},
               parts[i].state);
  }
  return std::move(writer.tensors);
}

void CudaStatePool::restore(std::span<const Block> blocks, std::int64_t num_tokens,
                            std::span<const backend::NamedView> tensors) const {
  for (const Block& block : blocks) std::fill_n(block.data, block.nbytes, std::byte{0});
  backend::StateReader reader(tensors);
  const auto& parts = places_.slot.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    std::visit(Restore{dtypes_of(dtype_), num_tokens, blocks[0].data + parts[i].offset, host_rows(i, blocks), reader},
               parts[i].state);
  }
}

}  // namespace based::cuda
