#include "backend/cpu/kernels/gated_conv.h"

#include "backend/cpu/kernels/simd.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

// Channels are taken kLanes at a time, the last few in a vector with zeros behind. kTaps is K when known, else 0.
template <int kTaps>
void convolve_taps(const GatedConvTask& task) {
  const std::int64_t taps = kTaps > 0 ? kTaps : task.kernel_size;
  const std::int64_t e = task.inner_size;
  const std::int64_t width = (task.channel_end - task.channel_begin + kLanes - 1) / kLanes * kLanes;
  // wt (K, width): taps transposed
  float* wt = task.scratch;
  for (std::int64_t c = 0; c < width; ++c) {
    const std::int64_t channel = task.channel_begin + c;
    for (std::int64_t j = 0; j < taps; ++j)
      wt[j * width + c] = channel < task.channel_end ? task.taps[channel * taps + j] : 0.0f;
  }
  for (std::int64_t t = task.token_begin; t < task.token_end; ++t) {
    const std::int64_t from_past = t < taps - 1 ? taps - 1 - t : 0;  // taps that fall on rows before the call
    const float* gate = task.u + t * task.width + e;
    for (std::int64_t c = task.channel_begin; c < task.channel_end; c += kLanes) {
      const std::int64_t n = task.channel_end - c < kLanes ? task.channel_end - c : kLanes;
      const float* w = wt + (c - task.channel_begin);
      const auto get = [n](const float* p) { return n == kLanes ? load(p) : load_n(p, n); };
      f32v acc = task.bias == nullptr ? f32v{} : get(task.bias + c);
      for (std::int64_t j = 0; j < taps; ++j) {
        const float* x = (j < from_past ? task.past + (t + j) * e : task.u + (t - taps + 1 + j) * task.width) + c;
        acc = fmadd(load(w + j * width), get(x), acc);
      }
      const f32v y = silu(acc);
      store_as(task.out, t * e + c, task.gated ? y * get(gate + c) : y, n, task.out_bf16);
    }
  }
}

void convolve(const GatedConvTask& task) {
  switch (task.kernel_size) {
    case 3:
      return convolve_taps<3>(task);
    case 4:
      return convolve_taps<4>(task);
    default:
      return convolve_taps<0>(task);
  }
}

}  // namespace
}  // namespace BASED_ISA

const GatedConvKernels& gated_conv_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr GatedConvKernels kernels{BASED_ISA::convolve};
  return kernels;
}

}  // namespace based::cpu
