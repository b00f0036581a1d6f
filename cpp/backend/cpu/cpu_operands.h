#pragma once

// What the operations' task-cutting code shares.

#include <cstdint>
#include <memory>
#include <new>

#include "backend/backend.h"
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

// Uninitialised, aligned to 64 bytes. From the heap, which keeps its pages from call to call.
struct FreeFloats {
  void operator()(float* data) const { ::operator delete(data, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats make_floats(std::int64_t size) {
  return Floats(
      static_cast<float*>(::operator new(static_cast<std::size_t>(size) * sizeof(float), std::align_val_t{64})));
}

// `size` floats for each thread.
class Scratch {
 public:
  Scratch(int num_threads, std::int64_t size)
      : stride_(round_up(size, kStateLanes)), data_(make_floats(stride_ * num_threads)) {}
  float* of(int thread) const { return data_.get() + thread * stride_; }

 private:
  std::int64_t stride_;
  Floats data_;
};

}  // namespace based::cpu
