#include "backend/cpu/kernels/softmax.h"

#include "backend/cpu/kernels/simd.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr std::int64_t kBlock = 1024;  // numbers: stays in the first cache; partial sums of a block are float

BASED_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Logits, −∞ beyond n; +∞ is made finite, NaN stays.
BASED_INLINE f32v load_logits(const float* p, std::int64_t n) {
  f32v x;
  if (n >= kLanes) {
    x = load(p);
  } else {
    float a[kLanes];
    for (float& ai : a) ai = -kInfinity;
    __builtin_memcpy(a, p, static_cast<std::size_t>(n) * sizeof(float));
    x = load(a);
  }
  return vmin(splat(__FLT_MAX__), x);
}

// e^x, 0 for NaN.
BASED_INLINE f32v exp_or_zero(f32v x) { return x > splat(-87.0f) ? vexp(x) : f32v{}; }

SoftmaxStats stats(const float* x, std::int64_t size) {
  SoftmaxStats s{-kInfinity, -1, 0.0};
  std::int64_t max_block = 0;
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const std::int64_t end = least(begin + kBlock, size);
    f32v max = splat(-kInfinity);
    for (std::int64_t i = begin; i < end; i += kLanes) max = vmax(load_logits(x + i, end - i), max);
    const float block_max = hmax(max);
    if (block_max > s.max) {
      s.sum *= __builtin_exp(static_cast<double>(s.max) - static_cast<double>(block_max));
      s.max = block_max;
      max_block = begin;
    }
    if (s.max == -kInfinity) continue;
    const f32v m = splat(s.max);
    f32v sum{};
    for (std::int64_t i = begin; i < end; i += kLanes) sum += exp_or_zero(load_logits(x + i, end - i) - m);
    s.sum += hsum(sum);
  }
  if (s.max == -kInfinity) return s;
  s.argmax = max_block;
  while (!(x[s.argmax] >= s.max)) ++s.argmax;
  return s;
}

void weights(const float* x, std::int64_t size, float max, float inverse_temperature, float* w) {
  const f32v m = splat(max), scale = splat(inverse_temperature);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const f32v e = exp_or_zero((load_logits(x + i, size - i) - m) * scale);
    store_as(w, i, e, least(kLanes, size - i), false);
  }
}

double sum(const float* w, std::int64_t size) {
  double total = 0;
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const std::int64_t end = least(begin + kBlock, size);
    f32v acc{};
    for (std::int64_t i = begin; i < end; i += kLanes) acc += end - i < kLanes ? load_n(w + i, end - i) : load(w + i);
    total += hsum(acc);
  }
  return total;
}

void above(const float* x, const float* w, std::int64_t size, float threshold, std::int64_t* count, double* weight) {
  const f32v limit = splat(threshold);
  *count = 0;
  *weight = 0;
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const std::int64_t end = least(begin + kBlock, size);
    i32v found{};
    f32v acc{};
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const auto in = load_logits(x + i, end - i) >= limit;
      found -= in;
      acc += in ? (end - i < kLanes ? load_n(w + i, end - i) : load(w + i)) : f32v{};
    }
    for (int lane = 0; lane < kLanes; ++lane) *count += found[lane];
    *weight += hsum(acc);
  }
}

}  // namespace
}  // namespace BASED_ISA

const SoftmaxKernels& softmax_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr SoftmaxKernels kernels{BASED_ISA::stats, BASED_ISA::weights, BASED_ISA::sum, BASED_ISA::above};
  return kernels;
}

}  // namespace based::cpu
