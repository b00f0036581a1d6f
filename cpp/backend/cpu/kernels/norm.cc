#include "backend/cpu/kernels/norm.h"

#include "backend/cpu/kernels/simd.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

// Σ f(x[i]) over kChains vectors of partial sums: short chains, and small rounding errors.
template <typename F>
BASED_INLINE float sum(const float* x, std::int64_t size, F f) {
  constexpr int kChains = 4;
  f32v acc[kChains] = {};
  std::int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) acc[c] += f(load(x + i + c * kLanes));
  for (; i + kLanes <= size; i += kLanes) acc[0] += f(load(x + i));
  float tail = 0;
  for (; i < size; ++i) tail += f(splat(x[i]))[0];
  return hsum((acc[0] + acc[1]) + (acc[2] + acc[3])) + tail;
}

// out = (x − mean) · scale · w + b
BASED_INLINE void write(const NormTask& t, float mean, float scale) {
  const f32v m = splat(mean), s = splat(scale);
  for (std::int64_t i = 0; i < t.size; i += kLanes) {
    const std::int64_t n = t.size - i < kLanes ? t.size - i : kLanes;
    f32v y;
    if (n == kLanes) {
      y = (load(t.x + i) - m) * s * load(t.weight + i);
      if (t.bias != nullptr) y += load(t.bias + i);
    } else {
      y = (load_n(t.x + i, n) - m) * s * load_n(t.weight + i, n);
      if (t.bias != nullptr) y += load_n(t.bias + i, n);
    }
    store_as(t.out, i, y, n, t.out_bf16);
  }
}

float inverse_sqrt(double x) { return static_cast<float>(1.0 / __builtin_sqrt(x)); }

void rms_norm(const NormTask& t) {
  const double squares = sum(t.x, t.size, [](f32v x) { return x * x; });
  write(t, 0.0f, inverse_sqrt(squares / static_cast<double>(t.size) + t.eps));
}

void layer_norm(const NormTask& t) {
  const double size = static_cast<double>(t.size);
  const float mean = static_cast<float>(sum(t.x, t.size, [](f32v x) { return x; }) / size);
  const f32v m = splat(mean);
  const double squares = sum(t.x, t.size, [m](f32v x) { return (x - m) * (x - m); });
  write(t, mean, inverse_sqrt(squares / size + t.eps));
}

}  // namespace
}  // namespace BASED_ISA

const NormKernels& norm_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr NormKernels kernels{BASED_ISA::rms_norm, BASED_ISA::layer_norm};
  return kernels;
}

}  // namespace based::cpu
