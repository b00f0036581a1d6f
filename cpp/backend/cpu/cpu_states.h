#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/state_layout.h"
#include "based/config.h"
#include "io/half.h"

namespace based::cpu {

/// Widths are padded to this many elements, the longest vector of any instruction set: a state looks the same under
/// all of them.
inline constexpr std::int64_t kStateLanes = 16;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Of one head: S (rows, cols) float32, S[p, c] = Σ φ_p(k) v_c, then z (size_z) float32, Σ φ(k). What is beyond
/// num_features and head_dim is 0.
struct TaylorLayout {
  std::int64_t num_features = 0;
  std::int64_t rows = 0;  // num_features up to a multiple of 4
  std::int64_t cols = 0;
  std::int64_t size_z = 0;
  std::int64_t head_size = 0;  // floats

  explicit TaylorLayout(const TaylorState& state);
};

/// Of one kv head, in the ring's dtype, position p in ring slot p mod slots: keys in blocks of kStateLanes slots, block
/// b being (head_dim, kStateLanes); then values (slots, cols). A key's lane is thus that of its position, wherever it
/// comes from, and sums over keys have one order.
struct RingLayout {
  std::int64_t slots = 0;  // rows up to a multiple of kStateLanes
  std::int64_t cols = 0;   // head_dim up to a multiple of kStateLanes
  std::int64_t keys_size = 0;
  std::int64_t head_size = 0;  // elements

  explicit RingLayout(const RingState& state);
};

/// Tokens of a piece of memory that keys and values of all tokens grow by.
inline constexpr std::int64_t kPieceTokens = 256;

/// Of one kv head in a piece, in the model's dtype: blocks of kStateLanes tokens, each of keys (head_dim, kStateLanes),
/// then values (kStateLanes, cols).
struct ContextLayout {
  std::int64_t cols = 0;        // head_dim up to a multiple of kStateLanes
  std::int64_t block_size = 0;  // elements
  std::int64_t head_size = 0;

  explicit ContextLayout(const ContextState& state);
};

class CpuBackend;

/// The layout of a slot: every part aligned to 64 bytes. Dense parts are as in the saved form; those of the
/// projections' dtype are float32. `model`: the model's dtype. Throws std::bad_alloc for a size that cannot be.
backend::StateLayout state_layout(const ModelConfig& config, DType model);

class CpuStatePool final : public backend::StatePool {
 public:
  /// Memory is taken when it is first written: a pool whose parts are large costs addresses until then. Throws
  /// std::bad_alloc, also when the size overflows.
  CpuStatePool(const ModelConfig& config, DType dtype, int capacity, CpuBackend& memory);

  int capacity() const override { return capacity_; }
  std::size_t nbytes_per_slot() const override { return layout_.slot_nbytes(); }

  const backend::StateLayout& layout() const { return layout_; }
  DType ring_dtype() const { return dtype_; }  // the model's

  /// See Backend::reserve_states. `memory` hands it out.
  void reserve(std::span<const std::int32_t> slots, std::span<const std::int64_t> num_tokens, CpuBackend& memory);

  /// Zeros, with room for num_tokens tokens if it had that; what large parts have taken beyond goes back to the system.
  void clear(int slot, std::int64_t num_tokens);

  /// Makes a slot equal to another one, of a pool of this layout; see Backend::copy_state.
  void copy(int to_slot, const CpuStatePool& from, int from_slot, std::int64_t num_tokens, CpuBackend& memory);

  /// See Backend::state_pieces.
  std::vector<backend::MemoryPiece> pieces(int slot, std::int64_t num_tokens) const;

  std::byte* slot(int slot) const { return data_ + static_cast<std::size_t>(slot) * layout_.slot_nbytes(); }

  /// Of `part` in the layout, in a slot that is full.
  std::size_t part_nbytes(std::size_t part) const;

  /// A part of a layer's state.
  template <typename T>
  T* layer(int slot, int layer, int part = 0) const {
    return reinterpret_cast<T*>(this->slot(slot) + layout_.offset(layer, part));
  }

  /// Head 0 of a layer's ContextState in the piece that holds `position`, for which memory was reserved.
  template <typename T>
  T* context(int slot, int layer, std::int64_t position, int part = 0) const {
    return reinterpret_cast<T*>(context_data(slot, layout_.index(layer, part), position));
  }
  std::byte* context_data(int slot, std::size_t part, std::int64_t position) const {
    const auto& pieces = pieces_[static_cast<std::size_t>(slot)];
    return static_cast<std::byte*>(pieces[static_cast<std::size_t>(position / kPieceTokens)].data.get()) +
           in_piece_[part];
  }

  /// Tokens that the pieces of a slot have room for.
  std::int64_t room(int slot) const {
    return static_cast<std::int64_t>(pieces_[static_cast<std::size_t>(slot)].size()) * kPieceTokens;
  }

 private:
  void copy_context(const ContextState& state, std::size_t part, int to_slot, const CpuStatePool& from, int from_slot,
                    std::int64_t num_tokens) const;
  void keep(int slot, std::int64_t num_tokens);
  // What the parts that take memory as they are used hold of a sequence of num_tokens tokens.
  std::size_t growing_nbytes(std::int64_t num_tokens) const;

  backend::StateLayout layout_;
  DType dtype_;
  int capacity_;
  std::vector<bool> large_rings_;      // by part of the layout
  std::vector<std::size_t> in_piece_;  // by part, of a ContextState: its offset in a piece, in bytes
  std::size_t piece_nbytes_ = 0;       // of all of them; 0: there are none
  bool grows_ = false;
  std::vector<std::vector<backend::Buffer>> pieces_;  // by slot
  std::vector<std::int64_t> reserved_;                // by slot: tokens for which memory was found
  backend::Buffer buffer_;
  std::byte* data_ = nullptr;
};

using io::bf16_from_float;
using io::float_from_bf16;

}  // namespace based::cpu
