// H3: a task is a head of a sequence. The arithmetic is in kernels/.

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/h3.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

std::int64_t thread_floats(const H3Config& config) { return h3_scratch(config.head_dim); }

}  // namespace

std::size_t scratch_nbytes(const H3Config& config, const Lengths&, Isa, int num_threads) {
  return plan_nbytes<ThreadFloats>(num_threads, thread_floats(config));
}

void CpuBackend::h3(const H3Config& config, const backend::H3Operands& operands, const RaggedBatch& batch,
                    const Matrix& qkv, backend::StatePool& states, int layer, const Matrix& out) {
  const H3Kernels& kernels = for_isa(isa_, [](auto tag) -> const H3Kernels& { return h3_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  Carver carver(scratch(plan_nbytes<ThreadFloats>(num_threads(), thread_floats(config))));
  const ThreadFloats floats(carver, num_threads(), thread_floats(config));
  const std::int64_t modes = config.num_modes, products = config.head_dim * config.head_dim;
  pool_->run(batch.num_sequences() * config.num_heads, [&](std::int64_t index, int thread) {
    const std::int64_t b = index / config.num_heads, h = index % config.num_heads, first = batch.offsets[b];
    H3Task task;
    task.taps = operands.taps;
    task.decay = operands.decay + h * 2 * modes;
    task.weight = operands.weight + h * 2 * modes;
    task.skip = operands.skip[h];
    task.qkv = row(qkv, first);
    task.channels = config.channels();
    task.channel = h * config.head_dim;
    task.head_dim = config.head_dim;
    task.kernel_size = config.kernel_size;
    task.num_modes = modes;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.past = pool.layer<float>(batch.slots[b], layer, 0);
    task.state = pool.layer<float>(batch.slots[b], layer, 1) + h * products * 2 * modes;
    task.out = element(out, first, 0);
    task.out_bf16 = is_bf16(out);
    task.scratch = floats.of(thread);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
