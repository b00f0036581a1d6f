// RWKV-7: a task of the shift is a sequence and some channels, one of the recurrence a head of a sequence. The
// arithmetic is in kernels/.

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/cpu_token_shift.h"
#include "backend/cpu/kernels/rwkv7.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

std::int64_t thread_floats(const Rwkv7Config& config) { return rwkv7_scratch(config.head_dim); }

const Rwkv7Kernels& rwkv7_kernels_of(Isa isa) {
  return for_isa(isa, [](auto tag) -> const Rwkv7Kernels& { return rwkv7_kernels(tag); });
}

}  // namespace

std::size_t scratch_nbytes(const Rwkv7Config& config, const Lengths&, Isa, int num_threads) {
  return plan_nbytes<ThreadFloats>(num_threads, thread_floats(config));
}

void CpuBackend::rwkv7_shift(const Rwkv7Config&, const std::array<const float*, 6>& mix, const RaggedBatch& batch,
                             const Matrix& x, backend::StatePool& states, int layer,
                             const std::array<Matrix, 6>& mixed) {
  token_shift<6>(*pool_, rwkv7_kernels_of(isa_).shift, mix, batch, x, states, layer, mixed);
}

void CpuBackend::rwkv7_low_rank(const Rwkv7Config&, const Matrix& w, const Matrix& g) {
  const Rwkv7Kernels& kernels = rwkv7_kernels_of(isa_);
  pool_->run(w.rows, [&](std::int64_t t, int) {
    kernels.tanh(static_cast<float*>(element(w, t, 0)), w.cols);
    kernels.sigmoid(static_cast<float*>(element(g, t, 0)), g.cols);
  });
}

void CpuBackend::rwkv7(const Rwkv7Config& config, const backend::Rwkv7Operands& operands, const RaggedBatch& batch,
                       backend::StatePool& states, int layer, const Matrix& out) {
  const Rwkv7Kernels& kernels = rwkv7_kernels_of(isa_);
  const CpuStatePool& pool = pool_of(states);
  Carver carver(scratch(plan_nbytes<ThreadFloats>(num_threads(), thread_floats(config))));
  const ThreadFloats floats(carver, num_threads(), thread_floats(config));
  const std::int64_t heads = config.num_heads, size = config.head_dim;
  pool_->run(batch.num_sequences() * heads, [&](std::int64_t index, int thread) {
    const std::int64_t b = index / heads, begin = index % heads * size, first = batch.offsets[b];
    Rwkv7Task task;
    task.r = row(operands.r, first) + begin;
    task.k = row(operands.k, first) + begin;
    task.v = row(operands.v, first) + begin;
    task.w = row(operands.w, first) + begin;
    task.a = row(operands.a, first) + begin;
    task.g = row(operands.g, first) + begin;
    task.k_k = operands.k_k + begin;
    task.k_a = operands.k_a + begin;
    task.r_k = operands.r_k + begin;
    task.norm = operands.norm + begin;
    task.norm_bias = operands.norm_bias + begin;
    task.width = config.inner_size();
    task.head_dim = size;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.eps = static_cast<float>(config.eps);
    task.state = pool.layer<float>(batch.slots[b], layer, 1) + begin * size;
    task.out = element(out, first, 0);
    task.out_begin = begin;
    task.out_bf16 = is_bf16(out);
    task.scratch = floats.of(thread);
    kernels.advance(task);
  });
}

}  // namespace based::cpu
