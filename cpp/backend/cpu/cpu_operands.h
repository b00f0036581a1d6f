#pragma once

// What the operations' task-cutting code shares.

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "backend/backend.h"
#include "backend/cpu/cpu_features.h"
#include "backend/cpu/cpu_states.h"

namespace based::cpu {

inline std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

inline bool is_bf16(const backend::Matrix& matrix) { return matrix.dtype == DType::bfloat16; }

inline void* element(const backend::Matrix& matrix, std::int64_t row, std::int64_t col) {
  return static_cast<std::byte*>(matrix.data) +
         static_cast<std::size_t>(row * matrix.cols + col) * size_of(matrix.dtype);
}

inline const float* row(const backend::Matrix& matrix, std::int64_t row) {
  return static_cast<const float*>(element(matrix, row, 0));
}

inline const CpuStatePool& pool_of(const backend::StatePool& states) {
  return static_cast<const CpuStatePool&>(states);
}
inline CpuStatePool& pool_of(backend::StatePool& states) { return static_cast<CpuStatePool&>(states); }

// ---- scratch --------------------------------------------------------------------------------------------------------

// Cuts arrays out of one piece of memory; without memory, only counts what they take. An operation has a plan: a class
// whose constructor cuts all arrays that the operation needs. The plan is made twice, to count and to cut, so that the
// two cannot differ; CpuBackend::reserve_step counts the same plans before a step.
class Carver {
 public:
  explicit Carver(std::byte* memory = nullptr) : memory_(memory) {}

  // Uninitialised, aligned to 64 bytes; null when counting.
  template <typename T>
  T* take(std::int64_t count) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::byte* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up_64(static_cast<std::size_t>(count) * sizeof(T));
    return reinterpret_cast<T*>(at);
  }
  std::size_t used() const { return used_; }

 private:
  static std::size_t round_up_64(std::size_t n) { return (n + 63) / 64 * 64; }
  std::byte* memory_;
  std::size_t used_ = 0;
};

template <typename Plan, typename... Args>
std::size_t plan_nbytes(const Args&... args) {
  Carver counting;
  const Plan plan(counting, args...);
  return counting.used();
}

// `size` floats for each thread.
class ThreadFloats {
 public:
  ThreadFloats(Carver& carver, int num_threads, std::int64_t size)
      : stride_(round_up(size, kStateLanes)), data_(carver.take<float>(stride_ * num_threads)) {}
  float* of(int thread) const { return data_ + thread * stride_; }

 private:
  std::int64_t stride_;
  float* data_;
};

// What a plan depends on of a step: how many tokens its sequences have, and where those of several tokens start.
class Lengths {
 public:
  explicit Lengths(const backend::RaggedBatch& batch)
      : num_sequences_(batch.num_sequences()), offsets_(batch.offsets), positions_(batch.positions) {}
  // One token each, at any position.
  static Lengths of_step(std::int64_t num_sequences) { return Lengths(num_sequences); }

  std::int64_t num_sequences() const { return num_sequences_; }
  std::int64_t num_tokens() const { return offsets_.empty() ? num_sequences_ : offsets_.back(); }
  std::int64_t tokens(std::int64_t b) const {
    const auto i = static_cast<std::size_t>(b);
    return offsets_.empty() ? 1 : offsets_[i + 1] - offsets_[i];
  }
  std::int64_t start(std::int64_t b) const { return positions_.empty() ? 0 : positions_[static_cast<std::size_t>(b)]; }

 private:
  explicit Lengths(std::int64_t num_sequences) : num_sequences_(num_sequences) {}
  std::int64_t num_sequences_;
  std::span<const std::int32_t> offsets_ = {};
  std::span<const std::int64_t> positions_ = {};
};

}  // namespace based::cpu
