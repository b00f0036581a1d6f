#include "backend/cpu/kernels/hyena.h"

#include "backend/cpu/kernels/short_conv.h"
#include "backend/cpu/kernels/simd.h"

// Channels lie in lanes. A token's sum goes over all tokens so far, oldest first, from the state: its numbers do not
// depend on how a prompt is cut. A prompt of T tokens costs T²/2 multiply-adds per channel.

namespace based::cpu {
namespace BASED_ISA {
namespace {

template <bool kWhole>  // whether all lanes are channels
BASED_INLINE void advance_vector(const HyenaTask& task, const ShortConv& conv, std::int64_t c, std::int64_t n) {
  const std::int64_t e = task.inner_size;
  const auto get = [n](const float* p) { return kWhole ? load(p) : load_n(p, n); };
  const auto convolved = [&](std::int64_t t, std::int64_t part) {
    const std::int64_t channel = part * e + c;
    return conv.at(t, channel, n, get(task.bias + channel));
  };
  const f32v skip = get(task.skip + c);
  for (std::int64_t t = 0; t < task.num_tokens; ++t) {
    const std::int64_t position = task.start + t;
    const f32v product = convolved(t, 0) * convolved(t, 2);
    store_n(task.products + position * e + c, product, n);
    f32v sum{};
    for (std::int64_t s = 0; s <= position; ++s)
      sum = fmadd(get(task.filter + (position - s) * e + c), get(task.products + s * e + c), sum);
    store_as(task.out, t * e + c, fmadd(skip, product, sum) * convolved(t, 1), n, task.out_bf16);
  }
}

void advance(const HyenaTask& task) {
  const std::int64_t e = task.inner_size;
  const ShortConv conv{task.taps, task.kernel_size, task.u, 3 * e, task.past, 3 * e};
  std::int64_t c = task.channel_begin;
  for (; c + kLanes <= task.channel_end; c += kLanes) advance_vector<true>(task, conv, c, kLanes);
  if (c < task.channel_end) advance_vector<false>(task, conv, c, task.channel_end - c);
  for (std::int64_t part = 0; part < 3; ++part)
    conv.keep(task.num_tokens, part * e + task.channel_begin, part * e + task.channel_end);
}

}  // namespace
}  // namespace BASED_ISA

const HyenaKernels& hyena_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr HyenaKernels kernels{BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
