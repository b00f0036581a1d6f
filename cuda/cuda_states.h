#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/state_layout.h"
#include "kernels.h"
#include "mapped_memory.h"
#include "stream.h"

namespace based::cuda {

/// Where the parts of a state lie. Most are in a slot, as kernels.h lays them out, aligned to 256 bytes; pending tokens
/// behind their sums. Large rings are apart, where memory is mapped as a sequence grows. Those of one length share a
/// region: a row of it holds the keys and values of one position, of all their layers, so that what a position needs
/// lies together.
struct StatePlaces {
  struct Region {
    std::int64_t rows = 0;
    std::size_t row_nbytes = 0;
    std::size_t offset = 0, nbytes = 0;  // in a sequence's addresses
    std::size_t piece_nbytes = 0;        // of memory that is mapped at a time

    /// Bytes that a sequence of num_tokens tokens has written, from the region's start.
    std::size_t used_nbytes(std::int64_t num_tokens) const;
    /// The same in whole pieces.
    std::size_t mapped_nbytes(std::int64_t num_tokens) const;
  };

  /// A large ring: in a row of a region, its keys at `offset` and its values `values` bytes behind them.
  struct Ring {
    std::size_t region = 0, offset = 0, values = 0;
  };

  /// `model`: the model's dtype, "T" of kernels.h. Throws when a size overflows.
  StatePlaces(const ModelConfig& config, DType model);

  std::size_t state_nbytes(std::int64_t num_tokens) const;

  backend::StateLayout slot;
  std::vector<std::optional<Ring>> rings;  // by part of `slot`, where a large ring has no bytes
  std::vector<Region> regions;
  std::size_t growing_nbytes = 0;  // addresses of a sequence's regions
};

/// A ring on the host: row r at keys + r · row_nbytes, its values `values` bytes behind its keys.
struct HostRing {
  std::byte* keys;
  std::size_t row_nbytes, values;
};

/// One thread at a time. The memory of the slots is in the order of `stream`; what grows is mapped and unmapped at
/// once, by a host that waits first for the work that uses it.
class CudaStatePool final : public backend::StatePool {
 public:
  CudaStatePool(const ModelConfig& config, DType dtype, int capacity);
  ~CudaStatePool() override;

  int capacity() const override { return capacity_; }
  std::size_t nbytes_per_slot() const override { return places_.state_nbytes(backend::Backend::kAnyNumber); }

  /// Size of all slots. Throws OutOfMemory when it overflows.
  std::size_t nbytes() const { return places_.slot.pool_nbytes(capacity_); }
  /// Before any use. `counters` count what grows.
  void attach(backend::Buffer memory, std::shared_ptr<const Stream> stream,
              std::shared_ptr<backend::MemoryCounters> counters);

  const Stream& stream() const { return *stream_; }
  std::byte* slot(int slot) const { return data_ + static_cast<std::size_t>(slot) * slot_nbytes(); }
  std::size_t slot_nbytes() const { return places_.slot.slot_nbytes(); }

  /// A part of a layer's state.
  StateView layer(int layer, int part = 0) const { return {data_ + places_.slot.offset(layer, part), slot_nbytes()}; }
  /// The pending tokens of a layer whose first part is a Taylor state.
  StateView pending(int layer) const {
    return {data_ + places_.slot.offset(layer) + sums_nbytes_[static_cast<std::size_t>(layer)], slot_nbytes()};
  }
  /// A layer whose first part is a ring.
  RingView ring(int layer) const;

  /// Memory for a sequence of num_tokens tokens. Throws OutOfMemory, and then the slot keeps what it had.
  void reserve(int slot, std::int64_t num_tokens);
  /// Gives back what has grown, after the work of `user`.
  void release(int slot, const Stream& user);

  /// Blocks of memory that hold the state of a sequence of num_tokens tokens, for which `slot` has memory.
  struct Block {
    std::byte* data;
    std::size_t nbytes;
  };
  std::vector<Block> blocks(int slot, std::int64_t num_tokens) const;

  /// Between copies of these blocks on the host and the saved form.
  std::vector<backend::NamedTensor> save(std::span<const Block> blocks, std::int64_t num_tokens) const;
  void restore(std::span<const Block> blocks, std::int64_t num_tokens,
               std::span<const backend::NamedView> tensors) const;

 private:
  HostRing host_ring(std::size_t part, const RingState& state, std::span<const Block> blocks) const;
  std::byte* region(int slot, const StatePlaces::Region& region) const {
    return addresses_->data() + static_cast<std::size_t>(slot) * places_.growing_nbytes + region.offset;
  }

  StatePlaces places_;
  DType dtype_;
  int capacity_;
  std::vector<std::size_t> sums_nbytes_;  // by layer: of its Taylor sums; 0 without
  std::shared_ptr<const Stream> stream_;
  backend::Buffer buffer_;
  std::byte* data_ = nullptr;

  std::shared_ptr<backend::MemoryCounters> counters_;
  std::shared_ptr<AddressRange> addresses_;          // null when nothing grows
  std::vector<std::vector<backend::Buffer>> grown_;  // by slot and region: its pieces
  std::vector<std::size_t> mapped_;                  // bytes of them
};

}  // namespace based::cuda
