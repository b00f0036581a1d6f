#pragma once

#include "backend/cpu/kernels/simd.h"
#include "backend/cpu/kernels/token_shift.h"

namespace based::cpu::BASED_ISA {

/// mixed[i] = mix(x, x', mix[i]) with x' the token before. Channels lie in lanes.
template <int N, class Mix>
BASED_INLINE void token_shift(const TokenShiftTask<N>& task, Mix mix) {
  const auto load_token = [&](std::int64_t at, std::int64_t n) {
    if (!task.bf16) return load_n(static_cast<const float*>(task.x) + at, n);
    std::uint16_t h[kLanes] = {};
    __builtin_memcpy(h, static_cast<const std::uint16_t*>(task.x) + at, static_cast<std::size_t>(n) * sizeof(h[0]));
    return load_bf16(h);
  };
  for (std::int64_t c = task.channel_begin; c < task.channel_end; c += kLanes) {
    const std::int64_t n = task.channel_end - c < kLanes ? task.channel_end - c : kLanes;
    f32v before = load_n(task.before + c, n);
    for (std::int64_t t = 0; t < task.num_tokens; ++t) {
      const std::int64_t at = t * task.hidden_size + c;
      const f32v x = load_token(at, n);
      for (int i = 0; i < N; ++i) store_as(task.mixed[i], at, mix(x, before, load_n(task.mix[i] + c, n)), n, task.bf16);
      before = x;
    }
    store_n(task.before + c, before, n);
  }
}

}  // namespace based::cpu::BASED_ISA
