#pragma once

#include "backend/cpu/kernels/simd.h"

// One token of a recurrence on a matrix S (rows, cols): S ← diag(α) S + k changeᵀ (and more), y = Sᵀq. Columns lie in
// lanes, and a sum over the rows is one chain: a token's numbers depend on nothing but the state and its inputs,
// however a prompt is cut.

namespace based::cpu::BASED_ISA {

/// Columns [c, c + n) of S, n ≤ kLanes; s points to column c of its first row.
struct MatrixColumns {
  float* s;
  std::int64_t rows, stride, n;
};

/// f(c, n) for columns [c, c + n) of `cols`, a vector of them at a time.
template <class F>
BASED_INLINE void for_each_vector(std::int64_t cols, F f) {
  std::int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) f(c, std::int64_t{kLanes});
  if (c < cols) f(c, cols - c);
}

template <bool kWhole>  // whether all lanes are columns
BASED_INLINE f32v read_rows(const MatrixColumns& m, const float* k) {
  f32v sum{};
  for (std::int64_t i = 0; i < m.rows; ++i) {
    const float* row = m.s + i * m.stride;
    sum = fmadd(splat(k[i]), kWhole ? load(row) : load_n(row, m.n), sum);
  }
  return sum;
}

template <bool kWhole, class Rest>
BASED_INLINE f32v write_rows(const MatrixColumns& m, const float* q, const float* k, f32v change, Rest rest) {
  f32v sum{};
  for (std::int64_t i = 0; i < m.rows; ++i) {
    float* row = m.s + i * m.stride;
    const f32v next = fmadd(splat(k[i]), change, rest(i, kWhole ? load(row) : load_n(row, m.n)));
    kWhole ? store(row, next) : store_n(row, next, m.n);
    sum = fmadd(splat(q[i]), next, sum);
  }
  return sum;
}

/// Sᵀk; zeros in lanes that are no columns.
BASED_INLINE f32v read_matrix(const MatrixColumns& m, const float* k) {
  return m.n == kLanes ? read_rows<true>(m, k) : read_rows<false>(m, k);
}

/// Row i of S ← k[i] change + rest(i, the row); returns Sᵀq of the new S.
template <class Rest>
BASED_INLINE f32v write_matrix(const MatrixColumns& m, const float* q, const float* k, f32v change, Rest rest) {
  return m.n == kLanes ? write_rows<true>(m, q, k, change, rest) : write_rows<false>(m, q, k, change, rest);
}

BASED_INLINE float first_lane(f32v v) { return v[0]; }

/// Σ x², x in whole vectors.
BASED_INLINE float squared_length(const float* x, std::int64_t count) {
  f32v sum{};
  for (std::int64_t c = 0; c < count; c += kLanes) sum = fmadd(load(x + c), load(x + c), sum);
  return hsum(sum);
}

}  // namespace based::cpu::BASED_ISA
