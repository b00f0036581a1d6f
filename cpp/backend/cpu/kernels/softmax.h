#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

/// Of one row of logits. NaN counts as −∞, +∞ as the largest float.
struct SoftmaxStats {
  float max;            // −∞ when no logit is finite
  std::int64_t argmax;  // the lowest index of max, −1 when no logit is finite
  double sum;           // Σ e^(x − max)
};

struct SoftmaxKernels {
  SoftmaxStats (*stats)(const float* x, std::int64_t size);
  /// w[i] = e^((x[i] − max) · inverse_temperature).
  void (*weights)(const float* x, std::int64_t size, float max, float inverse_temperature, float* w);
  double (*sum)(const float* w, std::int64_t size);
  /// Number and weight of the x[i] ≥ threshold.
  void (*above)(const float* x, const float* w, std::int64_t size, float threshold, std::int64_t* count,
                double* weight);
};

const SoftmaxKernels& softmax_kernels(IsaTag<Isa::baseline>);
const SoftmaxKernels& softmax_kernels(IsaTag<Isa::avx2>);
const SoftmaxKernels& softmax_kernels(IsaTag<Isa::avx512>);
const SoftmaxKernels& softmax_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
