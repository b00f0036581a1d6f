#include "backend/cpu/kernels/selective_scan.h"

#include "backend/cpu/kernels/simd.h"

// Channels lie in lanes, and a channel's sum over n is one chain: its numbers depend on nothing but its inputs. Tokens
// are taken some at a time for all channels of a task: the rows that they are read from stay in L1. The state of one
// vector of channels is copied to where its rows lie side by side: in place, e floats apart, they might all fall into
// one set of the cache.

namespace based::cpu {
namespace BASED_ISA {
namespace {

constexpr std::int64_t kTokens = 16;
static_assert(2 * kLanes <= kScanScratch);

/// log(1 + e^v) to about 4 ulp; v itself from v = 20 on, as there e^−v is below half an ulp of v. NaN stays NaN.
BASED_INLINE f32v softplus(f32v v) {
  // max(v, 0) + log(1 + w), w = e^−|v| ≤ 1; log(1 + w) = 2 artanh(s), s = w / (2 + w) ≤ 1/3, by its Taylor series.
  const f32v zero{};
  const f32v w = vexp(v < zero ? v : -v);
  const f32v s = w / (splat(2.0f) + w), s2 = s * s;
  f32v p = splat(1.0f / 17);
  p = fmadd(p, s2, splat(1.0f / 15));
  p = fmadd(p, s2, splat(1.0f / 13));
  p = fmadd(p, s2, splat(1.0f / 11));
  p = fmadd(p, s2, splat(1.0f / 9));
  p = fmadd(p, s2, splat(1.0f / 7));
  p = fmadd(p, s2, splat(1.0f / 5));
  p = fmadd(p, s2, splat(1.0f / 3));
  const f32v twice = s + s;
  const f32v log = fmadd(twice * s2, p, twice);
  return vmax(zero, v) + log;  // of two numbers, one NaN, vmax gives the second
}

template <bool kWhole>  // whether all lanes are channels
BASED_INLINE void scan_vector(const SelectiveScanTask& task, std::int64_t c, std::int64_t lanes, std::int64_t begin,
                              std::int64_t end) {
  const std::int64_t e = task.inner_size, size = task.state_size;
  const auto get = [lanes](const float* p) { return kWhole ? load(p) : load_n(p, lanes); };
  float *h = task.scratch, *a = h + size * kLanes;
  for (std::int64_t n = 0; n < size; ++n) {
    store(h + n * kLanes, get(task.state + n * e + c));
    store(a + n * kLanes, get(task.a + n * e + c));
  }
  const f32v d = get(task.d + c);
  for (std::int64_t t = begin; t < end; ++t) {
    const f32v x = get(task.x + t * e + c), delta = softplus(get(task.dt + t * e + c)), dx = delta * x;
    const float* b = task.bc + t * 2 * size;
    f32v y{};
    for (std::int64_t n = 0; n < size; ++n) {
      const f32v decay = vexp(delta * load(a + n * kLanes));
      const f32v next = fmadd(decay, load(h + n * kLanes), dx * splat(b[n]));
      store(h + n * kLanes, next);
      y = fmadd(splat(b[size + n]), next, y);
    }
    const f32v z = get(task.xz + (t * 2 + 1) * e + c);
    store_as(task.out, t * e + c, fmadd(d, x, y) * silu(z), lanes, task.out_bf16);
  }
  for (std::int64_t n = 0; n < size; ++n) store_n(task.state + n * e + c, load(h + n * kLanes), lanes);
}

void scan(const SelectiveScanTask& task) {
  for (std::int64_t begin = 0; begin < task.num_tokens; begin += kTokens) {
    const std::int64_t end = begin + kTokens < task.num_tokens ? begin + kTokens : task.num_tokens;
    std::int64_t c = task.channel_begin;
    for (; c + kLanes <= task.channel_end; c += kLanes) scan_vector<true>(task, c, kLanes, begin, end);
    if (c < task.channel_end) scan_vector<false>(task, c, task.channel_end - c, begin, end);
  }
}

}  // namespace
}  // namespace BASED_ISA

const SelectiveScanKernels& selective_scan_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr SelectiveScanKernels kernels{BASED_ISA::scan};
  return kernels;
}

}  // namespace based::cpu
