// The gated delta rule: a task is a head of a sequence. The arithmetic is in kernels/.

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/gated_delta_net.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

std::int64_t thread_floats(const GatedDeltaNetConfig& config) { return delta_scratch(config.key_dim, config.head_dim); }

}  // namespace

std::size_t scratch_nbytes(const GatedDeltaNetConfig& config, const Lengths&, Isa, int num_threads) {
  return plan_nbytes<ThreadFloats>(num_threads, thread_floats(config));
}

void CpuBackend::gated_delta_net(const GatedDeltaNetConfig& config, const backend::DeltaOperands& operands,
                                 const RaggedBatch& batch, const Matrix& u, backend::StatePool& states, int layer,
                                 const Matrix& out) {
  const GatedDeltaNetKernels& kernels =
      for_isa(isa_, [](auto tag) -> const GatedDeltaNetKernels& { return gated_delta_net_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  Carver carver(scratch(plan_nbytes<ThreadFloats>(num_threads(), thread_floats(config))));
  const ThreadFloats floats(carver, num_threads(), thread_floats(config));
  pool_->run(batch.num_sequences() * config.num_heads, [&](std::int64_t index, int thread) {
    const std::int64_t b = index / config.num_heads, h = index % config.num_heads, first = batch.offsets[b];
    GatedDeltaNetTask task;
    task.taps = operands.taps;
    task.norm = operands.norm;
    task.log_rate = config.decay ? operands.log_rate + h : nullptr;
    task.dt_bias = config.decay ? operands.dt_bias + h : nullptr;
    task.u = row(u, first);
    task.num_heads = config.num_heads;
    task.key_dim = config.key_dim;
    task.head_dim = config.head_dim;
    task.kernel_size = config.kernel_size;
    task.width = u.cols;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.head = h;
    task.eps = static_cast<float>(config.eps);
    task.output_gate = config.output_gate;
    task.past = pool.layer<float>(batch.slots[b], layer, 0);
    task.state = pool.layer<float>(batch.slots[b], layer, 1) + h * config.key_dim * config.head_dim;
    task.out = element(out, first, 0);
    task.out_bf16 = is_bf16(out);
    task.scratch = floats.of(thread);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
