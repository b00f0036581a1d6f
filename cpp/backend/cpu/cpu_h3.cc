// H3: a task is a head of a sequence. The arithmetic is in kernels/.

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/h3.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

struct H3Plan {
  ThreadFloats scratch;

  H3Plan(Carver& carver, const H3Config& config, int num_threads)
      : scratch(carver, num_threads, h3_scratch(config.head_dim)) {}
};

}  // namespace

std::size_t scratch_nbytes(const H3Config& config, const Lengths&, Isa, int num_threads) {
  return plan_nbytes<H3Plan>(config, num_threads);
}

void CpuBackend::h3(const H3Config& config, const backend::H3Operands& operands, const RaggedBatch& batch,
                    const Matrix& qkv, backend::StatePool& states, int layer, const Matrix& out) {
  const H3Kernels& kernels = for_isa(isa_, [](auto tag) -> const H3Kernels& { return h3_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  Carver carver(scratch(plan_nbytes<H3Plan>(config, num_threads())));
  const H3Plan plan(carver, config, num_threads());
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
    task.scratch = plan.scratch.of(thread);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
