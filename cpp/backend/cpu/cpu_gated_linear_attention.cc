// Gated linear attention: a task is a head of a sequence. The arithmetic is in kernels/.

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/gated_linear_attention.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

std::int64_t thread_floats(const GatedLinearAttentionConfig& config) {
  return gated_linear_scratch(config.key_dim, config.head_dim);
}

}  // namespace

std::size_t scratch_nbytes(const GatedLinearAttentionConfig& config, const Lengths&, Isa, int num_threads) {
  return plan_nbytes<ThreadFloats>(num_threads, thread_floats(config));
}

void CpuBackend::gated_linear_attention(const GatedLinearAttentionConfig& config, const float* norm,
                                        const RaggedBatch& batch, const Matrix& u, const Matrix& a,
                                        backend::StatePool& states, int layer, const Matrix& out) {
  const GatedLinearAttentionKernels& kernels =
      for_isa(isa_, [](auto tag) -> const GatedLinearAttentionKernels& { return gated_linear_attention_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  Carver carver(scratch(plan_nbytes<ThreadFloats>(num_threads(), thread_floats(config))));
  const ThreadFloats floats(carver, num_threads(), thread_floats(config));
  const std::int64_t heads = config.num_heads, dk = config.key_dim, dv = config.head_dim;
  pool_->run(batch.num_sequences() * heads, [&](std::int64_t index, int thread) {
    const std::int64_t b = index / heads, h = index % heads, first = batch.offsets[b];
    const float* const values = row(u, first) + 2 * heads * dk;
    GatedLinearAttentionTask task;
    task.q = row(u, first) + h * dk;
    task.k = task.q + heads * dk;
    task.v = values + h * dv;
    task.gate = task.v + heads * dv;
    task.a = row(a, first) + h * dk;
    task.norm = norm;
    task.u_width = u.cols;
    task.a_width = a.cols;
    task.key_dim = dk;
    task.head_dim = dv;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.gate_normalizer = static_cast<float>(config.gate_normalizer);
    task.eps = static_cast<float>(config.eps);
    task.state = pool.layer<float>(batch.slots[b], layer) + h * dk * dv;
    task.out = element(out, first, 0);
    task.out_begin = h * dv;
    task.out_width = out.cols;
    task.out_bf16 = is_bf16(out);
    task.scratch = floats.of(thread);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
