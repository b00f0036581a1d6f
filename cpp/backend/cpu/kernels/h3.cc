#include "backend/cpu/kernels/h3.h"

#include "backend/cpu/kernels/short_conv.h"
#include "backend/cpu/kernels/simd.h"

// Token by token: a token's numbers depend on nothing but the state and its inputs, however a prompt is cut. The modes
// of a product lie in lanes; sums over them, and over the numbers of k, have one order.

namespace based::cpu {
namespace BASED_ISA {
namespace {

/// x ← a x + input, and Σ weight · x, of the modes of one product.
BASED_INLINE float update(const H3Task& task, float* x, float input) {
  const std::int64_t modes = task.num_modes;
  const float *a = task.decay, *w = task.weight;
  f32v sum{};
  for (std::int64_t m = 0; m < modes; m += kLanes) {
    const std::int64_t n = modes - m < kLanes ? modes - m : kLanes;
    const f32v re = load_n(x + m, n), im = load_n(x + modes + m, n);
    const f32v a_re = load_n(a + m, n), a_im = load_n(a + modes + m, n);
    const f32v next_re = fmadd(a_re, re, fnmadd(a_im, im, splat(input)));
    const f32v next_im = fmadd(a_re, im, a_im * re);
    store_n(x + m, next_re, n);
    store_n(x + modes + m, next_im, n);
    sum = fmadd(load_n(w + m, n), next_re, fmadd(load_n(w + modes + m, n), next_im, sum));
  }
  return hsum(sum);
}

void advance(const H3Task& task) {
  const std::int64_t d = task.head_dim, whole = (d + 15) / 16 * 16, width = 3 * task.channels;
  const ShortConv conv{task.taps, task.kernel_size, task.qkv + task.channels, width, task.past, task.channels};
  float *k = task.scratch, *y = k + whole;
  for (std::int64_t t = 0; t < task.num_tokens; ++t) {
    const float* q = task.qkv + t * width + task.channel;
    const float* v = q + 2 * task.channels;
    for (std::int64_t c = 0; c < d; c += kLanes) {
      store(k + c, conv.at(t, task.channel + c, d - c < kLanes ? d - c : kLanes, f32v{}));
      store(y + c, f32v{});
    }
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t j = 0; j < d; ++j) {
        const float kv = k[i] * v[j];
        const float s = update(task, task.state + (i * d + j) * 2 * task.num_modes, kv);
        y[j] = fmadd(q[i], fmadd(task.skip, kv, s), y[j]);
      }
    }
    for (std::int64_t c = 0; c < d; c += kLanes)
      store_as(task.out, t * task.channels + task.channel + c, load(y + c), d - c < kLanes ? d - c : kLanes,
               task.out_bf16);
  }
  conv.keep(task.num_tokens, task.channel, task.channel + d);
}

}  // namespace
}  // namespace BASED_ISA

const H3Kernels& h3_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr H3Kernels kernels{BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
