#include "cuda_states.h"

#include <algorithm>
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

// The device refuses the mixers that keep these.
[[noreturn]] void refuse(const ContextState&) {
  throw UnsupportedError("a GPU has no place for the keys and values of all tokens: run the model on the CPU");
}

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
    const std::size_t nbytes = nbytes_of({2, state.rows, state.num_heads, state.head_dim}, dtypes.model);
    return nbytes < kLargeRing ? nbytes : 0;  // StatePlaces
  }
  std::size_t operator()(const TaylorState& state) const {
    nbytes_of({num_elements(state.saved_shape())}, DType::float32);
    nbytes_of({state.num_heads, kPendingTokens, state.feature_dim + state.head_dim}, dtypes.model);
    return linear_attention_state_bytes(config_of(state)) + PendingLayout(config_of(state), dtypes.model).nbytes;
  }
  std::size_t operator()(const ContextState& state) const { refuse(state); }
};

// Writes a part's saved tensors.
struct Save {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  int layer;
  const std::byte* data;
  HostRing ring;  // of a RingState
  backend::StateWriter& writer;

  void operator()(const DenseState& state) const { save_dense(state, dtypes, data, layer, writer); }

  void operator()(const RingState& state) const {
    const std::size_t nbytes = static_cast<std::size_t>(state.num_heads * state.head_dim) * size_of(dtypes.model);
    for (const auto& [name, rows] : {std::pair("keys", ring.keys), {"values", ring.keys + ring.values}}) {
      std::byte* saved = writer.add(layer, name, dtypes.model, state.saved_shape(num_tokens));
      for_each_in_ring(state, num_tokens, [&, from_rows = rows](std::int64_t to, std::int64_t from) {
        std::memcpy(saved + static_cast<std::size_t>(to) * nbytes,
                    from_rows + static_cast<std::size_t>(from) * ring.row_nbytes, nbytes);
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

  void operator()(const ContextState& state) const { refuse(state); }
};

// Its inverse, into zeros.
struct Restore {
  backend::StateDTypes dtypes;
  std::int64_t num_tokens;
  std::byte* data;
  HostRing ring;
  backend::StateReader& reader;

  void operator()(const DenseState& state) const { restore_dense(state, dtypes, reader, data); }

  void operator()(const RingState& state) const {
    const std::size_t nbytes = static_cast<std::size_t>(state.num_heads * state.head_dim) * size_of(dtypes.model);
    for (std::byte* const rows : {ring.keys, ring.keys + ring.values}) {
      const std::vector<std::byte> saved = backend::converted(reader.take(), dtypes.model);
      for_each_in_ring(state, num_tokens, [&](std::int64_t from, std::int64_t to) {
        std::memcpy(rows + static_cast<std::size_t>(to) * ring.row_nbytes,
                    saved.data() + static_cast<std::size_t>(from) * nbytes, nbytes);
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

  void operator()(const ContextState& state) const { refuse(state); }
};

}  // namespace

// ---- places ---------------------------------------------------------------------------------------------------------

StatePlaces::StatePlaces(const ModelConfig& config, DType model)
    : slot(config, kAlignment, [&](const StatePart& state) { return std::visit(SizeOf{dtypes_of(model)}, state); }),
      rings(slot.parts().size()) {
  for (std::size_t i = 0; i < rings.size(); ++i) {
    const StatePart& part = slot.parts()[i].state;
    const auto* state = std::get_if<RingState>(&part);
    if (state == nullptr || SizeOf{dtypes_of(model)}(*state) > 0) continue;
    auto region = std::ranges::find(regions, state->rows, &Region::rows);
    if (region == regions.end()) region = regions.insert(region, Region{.rows = state->rows});
    const std::size_t values = round_up(nbytes_of({state->num_heads, state->head_dim}, model), 16);
    rings[i] = Ring{static_cast<std::size_t>(region - regions.begin()), region->row_nbytes, values};
    region->row_nbytes += 2 * values;
  }
  for (Region& region : regions) {
    region.offset = growing_nbytes;
    region.nbytes =
        round_up(nbytes_of({region.rows, static_cast<std::int64_t>(region.row_nbytes)}, DType::uint8), kPage);
    region.piece_nbytes = std::min(region.nbytes, round_up(kPieceRows * region.row_nbytes, kPage));
    growing_nbytes += region.nbytes;
  }
}

std::size_t StatePlaces::Region::used_nbytes(std::int64_t num_tokens) const {
  return static_cast<std::size_t>(std::min(num_tokens, rows)) * row_nbytes;
}

std::size_t StatePlaces::Region::mapped_nbytes(std::int64_t num_tokens) const {
  return std::min(nbytes, round_up(used_nbytes(num_tokens), piece_nbytes));
}

std::size_t StatePlaces::state_nbytes(std::int64_t num_tokens) const {
  std::size_t total = slot.slot_nbytes();
  for (const Region& region : regions) total += region.mapped_nbytes(num_tokens);
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
  const std::int64_t nbytes = num_elements({capacity_, static_cast<std::int64_t>(places_.growing_nbytes)});
  addresses_ = std::make_shared<AddressRange>(device, static_cast<std::size_t>(nbytes));
  mapped_.resize(static_cast<std::size_t>(capacity_) * places_.regions.size());
  grown_.resize(mapped_.size());
}

RingView CudaStatePool::ring(int layer) const {
  const std::size_t part = places_.slot.index(layer);
  const auto width = static_cast<std::int64_t>(size_of(dtype_));
  if (const auto& ring = places_.rings[part]) {
    const StatePlaces::Region& region = places_.regions[ring->region];
    return {{this->region(0, region) + ring->offset, places_.growing_nbytes},
            static_cast<std::int64_t>(region.row_nbytes) / width,
            static_cast<std::int64_t>(ring->values) / width};
  }
  const auto& state = std::get<RingState>(places_.slot.parts()[part].state);
  const std::int64_t row = state.num_heads * state.head_dim;
  return {this->layer(layer), row, state.rows * row};
}

void CudaStatePool::reserve(int slot, std::int64_t num_tokens) {
  for (std::size_t i = 0; i < places_.regions.size(); ++i) {
    const StatePlaces::Region& region = places_.regions[i];
    const std::size_t at = static_cast<std::size_t>(slot) * places_.regions.size() + i;
    const std::size_t wanted = region.mapped_nbytes(num_tokens);
    if (wanted <= mapped_[at]) continue;
    const std::size_t nbytes = wanted - mapped_[at];
    const auto begin = static_cast<std::size_t>(this->region(slot, region) - addresses_->data());
    grown_[at].reserve(grown_[at].size() + 1);
    grown_[at].push_back(backend::counted({addresses_->map(begin + mapped_[at], nbytes), nbytes}, counters_,
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
  for (const StatePlaces::Region& region : places_.regions)
    result.push_back({this->region(slot, region), region.used_nbytes(num_tokens)});
  return result;
}

HostRing CudaStatePool::host_ring(std::size_t part, const RingState& state, std::span<const Block> blocks) const {
  if (const auto& ring = places_.rings[part])
    return {blocks[1 + ring->region].data + ring->offset, places_.regions[ring->region].row_nbytes, ring->values};
  const std::size_t row = static_cast<std::size_t>(state.num_heads * state.head_dim) * size_of(dtype_);
  return {blocks[0].data + places_.slot.parts()[part].offset, row, static_cast<std::size_t>(state.rows) * row};
}

std::vector<backend::NamedTensor> CudaStatePool::save(std::span<const Block> blocks, std::int64_t num_tokens) const {
  backend::StateWriter writer;
  const auto& parts = places_.slot.parts();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto* state = std::get_if<RingState>(&parts[i].state);
    const HostRing ring = state ? host_ring(i, *state, blocks) : HostRing{};
    std::visit(Save{dtypes_of(dtype_), num_tokens, parts[i].layer, blocks[0].data + parts[i].offset, ring, writer},
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
    const auto* state = std::get_if<RingState>(&parts[i].state);
    const HostRing ring = state ? host_ring(i, *state, blocks) : HostRing{};
    std::visit(Restore{dtypes_of(dtype_), num_tokens, blocks[0].data + parts[i].offset, ring, reader}, parts[i].state);
  }
}

}  // namespace based::cuda
