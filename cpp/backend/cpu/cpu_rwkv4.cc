// RWKV-4: a task of both operations is a sequence and some channels. The arithmetic is in kernels/.

#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/cpu_token_shift.h"
#include "backend/cpu/kernels/rwkv4.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

constexpr std::int64_t kChannels = 128;  // of a task

const Rwkv4Kernels& kernels_of(Isa isa) {
  return for_isa(isa, [](auto tag) -> const Rwkv4Kernels& { return rwkv4_kernels(tag); });
}

}  // namespace

std::size_t scratch_nbytes(const Rwkv4Config&, const Lengths&, Isa, int) { return 0; }

void CpuBackend::rwkv4_shift(const Rwkv4Config&, const std::array<const float*, 3>& mix, const RaggedBatch& batch,
                             const Matrix& x, backend::StatePool& states, int layer,
                             const std::array<Matrix, 3>& mixed) {
  token_shift<3>(*pool_, kernels_of(isa_).shift, mix, batch, x, states, layer, mixed);
}

void CpuBackend::rwkv4(const Rwkv4Config& config, const backend::Rwkv4Operands& operands, const RaggedBatch& batch,
                       backend::StatePool& states, int layer, const Matrix& out) {
  const Rwkv4Kernels& kernels = kernels_of(isa_);
  const CpuStatePool& pool = pool_of(states);
  const std::int64_t blocks = ceil_div(config.inner_size, kChannels);
  pool_->run(batch.num_sequences() * blocks, [&](std::int64_t index, int) {
    const std::int64_t b = index / blocks, first = batch.offsets[b];
    Rwkv4Task task;
    task.decay = operands.decay;
    task.first = operands.first;
    task.k = row(operands.k, first);
    task.v = row(operands.v, first);
    task.r = row(operands.r, first);
    task.inner_size = config.inner_size;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.channel_begin = index % blocks * kChannels;
    task.channel_end = std::min(task.channel_begin + kChannels, config.inner_size);
    task.state = pool.layer<float>(batch.slots[b], layer, 1);
    task.out = element(out, first, 0);
    task.out_bf16 = is_bf16(out);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
