#include "backend/cpu/kernels/norm.h"

#include "backend/cpu/kernels/simd.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

// Σ over x[i], where f(x, acc) adds a term to acc, in kChains vectors of partial sums: short chains, and small rounding
// errors.
template <typename F>
BASED_INLINE float sum(const float* x, std::int64_t size, F f) {
  constexpr int kChains = 4;
  f32v acc[kChains] = {};
  std::int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) acc[c] = f(load(x + i + c * kLanes), acc[c]);
  for (; i + kLanes <= size; i += kLanes) acc[0] = f(load(x + i), acc[0]);
  f32v tail{};
  for (; i < size; ++i) tail = f(splat(x[i]), tail);
  return hsum((acc[0] + acc[1]) + (acc[2] + acc[3])) + tail[0];
}

// out = (x − mean) · scale · w + b
BASED_INLINE void write(const NormTask& t, float mean, float scale) {
  const f32v m = splat(mean), s = splat(scale);
  for (std::int64_t i = 0; i < t.size; i += kLanes) {
    const std::int64_t n = t.size - i < kLanes ? t.size - i : kLanes;
    const auto get = [i, n](const float* p) { return n == kLanes ? load(p + i) : load_n(p + i, n); };
    const f32v x = (get(t.x) - m) * s, w = get(t.weight);
    store_as(t.out, i, t.bias == nullptr ? x * w : fmadd(x, w, get(t.bias)), n, t.out_bf16);
  }
}

float inverse_sqrt(double x) { return static_cast<float>(1.0 / __builtin_sqrt(x)); }

void rms_norm(const NormTask& t) {
  const double squares = sum(t.x, t.size, [](f32v x, f32v acc) { return fmadd(x, x, acc); });
  write(t, 0.0f, inverse_sqrt(squares / static_cast<double>(t.size) + t.eps));
}

void layer_norm(const NormTask& t) {
  const double size = static_cast<double>(t.size);
  const float mean = static_cast<float>(sum(t.x, t.size, [](f32v x, f32v acc) { return acc + x; }) / size);
  const f32v m = splat(mean);
  const double squares = sum(t.x, t.size, [m](f32v x, f32v acc) { return fmadd(x - m, x - m, acc); });
  write(t, mean, inverse_sqrt(squares / size + t.eps));
}

}  // namespace
}  // namespace BASED_ISA

const NormKernels& norm_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr NormKernels kernels{BASED_ISA::rms_norm, BASED_ISA::layer_norm};
  return kernels;
}

}  // namespace based::cpu
