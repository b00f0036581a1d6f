#pragma once

#include <algorithm>
#include <array>

#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/token_shift.h"
#include "backend/cpu/thread_pool.h"

namespace based::cpu {

constexpr std::int64_t kShiftChannels = 128;  // of a task

/// A task is a sequence and some channels. The token before is the first part of the state.
template <int N>
void token_shift(ThreadPool& threads, void (*kernel)(const TokenShiftTask<N>&),
                 const std::array<const float*, std::size_t{N}>& mix, const backend::RaggedBatch& batch,
                 const backend::Matrix& x, const backend::StatePool& states, int layer,
                 const std::array<backend::Matrix, std::size_t{N}>& mixed) {
  const CpuStatePool& pool = pool_of(states);
  const std::int64_t blocks = ceil_div(x.cols, kShiftChannels);
  threads.run(batch.num_sequences() * blocks, [&](std::int64_t index, int) {
    const std::int64_t b = index / blocks, first = batch.offsets[b];
    TokenShiftTask<N> task;
    task.x = element(x, first, 0);
    for (std::size_t i = 0; i < mix.size(); ++i) {
      task.mix[i] = mix[i];
      task.mixed[i] = element(mixed[i], first, 0);
    }
    task.bf16 = is_bf16(x);
    task.hidden_size = x.cols;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.channel_begin = index % blocks * kShiftChannels;
    task.channel_end = std::min(task.channel_begin + kShiftChannels, x.cols);
    task.before = pool.layer<float>(batch.slots[b], layer, 0);
    kernel(task);
  });
}

}  // namespace based::cpu
