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
/// behind their sums. Large rings and contexts are apart, where memory is mapped as a sequence grows. Those of one
/// length share a region, whose memory is mapped in pieces of so many positions: of all their layers, one after the
/// other, so that what a position needs is mapped at once and what a layer reads lies together.
struct StatePlaces {
  struct Region {
    std::int64_t rows = 0;        // of its rings; kNoEnd
    std::size_t row_nbytes = 0;   // of all its layers
    std::int64_t piece_rows = 0;  // a power of two
    std::size_t piece_nbytes = 0;

    /// Of what a sequence of num_tokens tokens has written, whole pieces.
    std::size_t nbytes(std::int64_t num_tokens) const;
  };
  static constexpr std::int64_t kNoEnd = backend::Backend::kAnyNumber;  // rows of a context

  /// Keys and values of a layer in a region: the first rows of a piece lie `row` · piece_rows bytes from its start.
  struct Growing {
    std::size_t region = 0, row = 0, head_nbytes = 0, keys_nbytes = 0;  // of a head's key, of a row's keys
  };

  /// `model`: the model's dtype, "T" of kernels.h. Throws when a size overflows.
  StatePlaces(const ModelConfig& config, DType model);

  std::size_t state_nbytes(std::int64_t num_tokens) const;

  backend::StateLayout slot;
  std::vector<std::optional<Growing>> growing;  // by part of `slot`, where it has no bytes then
  std::vector<Region> regions;
};

/// Keys and values on the host: row r at keys + r / piece_rows · piece_nbytes + r mod piece_rows · row_nbytes, a head
/// `head_nbytes` behind the head before it, its values `values` bytes behind its keys.
struct HostRows {
  std::byte* keys;
  std::size_t head_nbytes, row_nbytes, values;
  std::int64_t piece_rows;
  std::size_t piece_nbytes;

  std::byte* key(std::int64_t row, std::int64_t head) const {
    return keys + static_cast<std::size_t>(row / piece_rows) * piece_nbytes +
           static_cast<std::size_t>(row % piece_rows) * row_nbytes + static_cast<std::size_t>(head) * head_nbytes;
  }
};

/// One thread at a time. The memory of the slots is in the order of `stream`; what grows is mapped and unmapped at
/// once, by a host that waits first for the work that uses it.
class CudaStatePool final : public backend::StatePool {
 public:
  CudaStatePool(const ModelConfig& config, DType dtype, int capacity);
  ~CudaStatePool() override;

  int capacity() const override { return capacity_; }
  std::size_t nbytes_per_slot() const override;

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
  /// A layer whose first part is a ring or a context.
  KeyValueView keys_and_values(int layer) const;

  /// Memory for a sequence of num_tokens tokens. Throws OutOfMemory, and then the slot keeps what it had. A state
  /// without an end has as many addresses as the card has memory, and all slots kOvercommit times as many.
  void reserve(int slot, std::int64_t num_tokens);
  /// Gives back what has grown, after the work of `user`.
  void release(int slot, const Stream& user);

  /// Blocks of memory that hold the state of a sequence of num_tokens tokens, for which `slot` has memory.
  using Block = backend::MemoryPiece;
  std::vector<Block> blocks(int slot, std::int64_t num_tokens) const;

  /// Between copies of these blocks on the host and the saved form.
  std::vector<backend::NamedTensor> save(std::span<const Block> blocks, std::int64_t num_tokens) const;
  void restore(std::span<const Block> blocks, std::int64_t num_tokens,
               std::span<const backend::NamedView> tensors) const;

 private:
  std::optional<HostRows> host_rows(std::size_t part, std::span<const Block> blocks) const;
  std::size_t offset(int slot, std::size_t region) const {
    return static_cast<std::size_t>(slot) * growing_nbytes_ + region_offsets_[region];
  }

  static constexpr int kOvercommit = 32;

  StatePlaces places_;
  DType dtype_;
  int capacity_;
  std::vector<std::size_t> sums_nbytes_;  // by layer: of its Taylor sums; 0 without
  std::shared_ptr<const Stream> stream_;
  backend::Buffer buffer_;
  std::byte* data_ = nullptr;

  std::shared_ptr<backend::MemoryCounters> counters_;
  std::shared_ptr<AddressRange> addresses_;          // null when nothing grows
  std::vector<std::size_t> region_offsets_, room_;   // by region: where its addresses begin in a slot's, how many
  std::size_t growing_nbytes_ = 0;                   // addresses of a slot
  std::vector<std::vector<backend::Buffer>> grown_;  // by slot and region: its pieces
  std::vector<std::size_t> mapped_;                  // bytes of them
};

}  // namespace based::cuda
