#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/kernels/linear.h"

namespace based::cpu {

/// Panels as kernels/linear.h defines them: the same for every instruction set. Made by CpuBackend::pack_linear.
struct CpuLinearWeight final : backend::LinearWeight {
  std::int64_t in_features() const override { return k; }
  std::int64_t out_features() const override { return n; }
  std::size_t nbytes() const override { return panels.nbytes + bias.nbytes; }

  /// Columns of y that one panel makes.
  std::int64_t panel_columns() const { return gated ? kPanelColumns / 2 : kPanelColumns; }
  std::int64_t num_panels() const { return (n + panel_columns() - 1) / panel_columns(); }
  std::int64_t padded_k() const { return dtype == DType::bfloat16 ? (k + 1) / 2 * 2 : k; }
  std::size_t panel_nbytes() const { return static_cast<std::size_t>(padded_k()) * kPanelColumns * size_of(dtype); }
  std::byte* panel(std::int64_t i) const {
    return static_cast<std::byte*>(panels.data.get()) + static_cast<std::size_t>(i) * panel_nbytes();
  }

  std::int64_t k = 0;
  std::int64_t n = 0;
  DType dtype = DType::float32;
  Activation activation = Activation::identity;
  bool gated = false;
  backend::Buffer panels;
  backend::Buffer bias;  // (num_panels · 32) float32 in packed order, or null
};

}  // namespace based::cpu
