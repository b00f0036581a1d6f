#include "backend/cpu/kernels/rwkv4.h"

#include "backend/cpu/kernels/token_shift_kernel.h"

// Channels lie in lanes, token by token: a token's numbers depend on nothing but the state and its inputs.

namespace based::cpu {
namespace BASED_ISA {
namespace {

void shift(const TokenShiftTask<3>& task) {
  token_shift(task, [](f32v x, f32v before, f32v mu) { return fmadd(mu, x, (splat(1.0f) - mu) * before); });
}

constexpr float kNothing = -1e30f;  // the exponent of empty sums

void advance(const Rwkv4Task& task) {
  const std::int64_t e = task.inner_size;
  for (std::int64_t c = task.channel_begin; c < task.channel_end; c += kLanes) {
    const std::int64_t n = task.channel_end - c < kLanes ? task.channel_end - c : kLanes;
    const f32v decay = load_n(task.decay + c, n), first = load_n(task.first + c, n);
    f32v p = load_n(task.state + c, n), q = load_n(task.state + e + c, n), o = load_n(task.state + 2 * e + c, n);
    // A fresh state is zeros. After any token q ≥ 1: the term of the largest exponent counts 1.
    o = q == f32v{} ? splat(kNothing) : o;
    for (std::int64_t t = 0; t < task.num_tokens; ++t) {
      const std::int64_t at = t * e + c;
      const f32v k = load_n(task.k + at, n), v = load_n(task.v + at, n), present = first + k;
      const f32v most = vmax(o, present);  // of two numbers, one NaN, this gives the second
      const f32v past = vexp(o - most), own = vexp(present - most);
      const f32v y = fmadd(past, p, own * v) / fmadd(past, q, own);
      store_as(task.out, at, sigmoid(load_n(task.r + at, n)) * y, n, task.out_bf16);
      const f32v next = vmax(decay + o, k), kept = vexp(decay + o - next), added = vexp(k - next);
      p = fmadd(kept, p, added * v);
      q = fmadd(kept, q, added);
      o = next;
    }
    store_n(task.state + c, p, n);
    store_n(task.state + e + c, q, n);
    store_n(task.state + 2 * e + c, o, n);
  }
}

}  // namespace
}  // namespace BASED_ISA

const Rwkv4Kernels& rwkv4_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr Rwkv4Kernels kernels{BASED_ISA::shift, BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
