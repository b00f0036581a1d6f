#pragma once

// Linear layers: y = act(x Wᵀ + b). One layout and one order of summation serve every number of rows, so that a row
// of y has the same bits in any batch.
//
// Packed weights: panels of 32 output columns, zero columns behind the last.
//   float32    (panels, K, 32)
//   bfloat16   (panels, K₂/2, 32, 2): pairs of k side by side, as VDPBF16PS takes them; K₂ = K rounded up to even
// A gated layer's panel holds 16 value columns, then their 16 gate columns: 16 columns of y.
// Packed rows of x: tiles of R ≤ max_rows rows, (K, R) float32, (K₂, R) float32 or (K₂/2, R, 2) bfloat16. R = 1 is the
// plain row. Each column sums over k in ascending order, one accumulator for each.

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"
#include "based/config.h"
#include "based/tensor.h"

namespace based::cpu {

constexpr int kPanelColumns = 32;
constexpr int kMaxTaskPanels = 8;

/// Stacked columns of one panel: rows[c] points to K numbers (may be misaligned), null for a column of zeros.
struct PanelSource {
  const std::byte* rows[kPanelColumns];
  DType dtypes[kPanelColumns];  // float32, bfloat16 or float16
};

/// A tile of R rows times some panels. Pointers are to the tile's first row and the first panel's first column.
struct LinearTask {
  const void* x;        // packed, of LinearKernels::row_dtype
  int num_rows;         // R, 1 … max_rows
  const void* weights;  // packed panels of weight_dtype
  DType weight_dtype;   // float32 or bfloat16
  std::int64_t in_features;
  int num_panels;  // 1 … kMaxTaskPanels
  /// Weights to fetch into the cache meanwhile: `prefetch_step` bytes for each row of a panel (128 bytes).
  const void* prefetch;
  int prefetch_step;
  const float* bias;  // (num_panels · 32) in packed order, null for none
  Activation activation;
  bool gated;
  void* y;  // row stride y_stride numbers
  DType y_dtype;
  std::int64_t y_stride;
  std::int64_t num_columns;  // of y, from the first panel's on
  bool accumulate;           // y float32
};

struct LinearKernels {
  int max_rows;

  /// Of packed rows of x, for weights of this dtype.
  DType (*row_dtype)(DType weights);

  /// Packs one panel as `to`, float32 or bfloat16.
  void (*pack_panel)(const PanelSource& source, std::int64_t in_features, DType to, void* panel);

  /// Packs num_rows rows of x (float32 or bfloat16, row-major without gaps), for weights of `weights`; float32 is
  /// rounded where row_dtype is bfloat16.
  void (*pack_rows)(const void* x, DType dtype, int num_rows, std::int64_t in_features, DType weights, void* packed);

  void (*multiply)(const LinearTask& task);

  /// The weights of column c of a panel, float32.
  void (*unpack_column)(const void* panel, DType dtype, std::int64_t in_features, int c, float* out);

  /// n numbers (may be misaligned) of float32, bfloat16 or float16.
  void (*to_float32)(const std::byte* from, DType dtype, std::int64_t n, float* out);
};

const LinearKernels& linear_kernels(IsaTag<Isa::baseline>);
const LinearKernels& linear_kernels(IsaTag<Isa::avx2>);
const LinearKernels& linear_kernels(IsaTag<Isa::avx512>);
const LinearKernels& linear_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
