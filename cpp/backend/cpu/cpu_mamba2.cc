// Mamba-2: the convolution is that of gated_conv, the norm that of the residual stream; a task of the recurrence is a
// head of a sequence.

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/mamba2.h"
#include "backend/cpu/kernels/norm.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

std::size_t scratch_nbytes(const Mamba2Config& config, const Lengths& lengths, Isa, int num_threads) {
  return conv_scratch_nbytes(config.kernel_size, lengths, num_threads);
}

void CpuBackend::mamba2(const Mamba2Config& config, const backend::Mamba2Operands& operands, const RaggedBatch& batch,
                        backend::StatePool& states, int layer, const Matrix& out) {
  const Matrix &u = operands.u, &xbc = operands.xbc;
  convolve(config.kernel_size, operands.taps, operands.conv_bias, false, batch, u, states, layer, xbc);

  const Mamba2Kernels& kernels = for_isa(isa_, [](auto tag) -> const Mamba2Kernels& { return mamba2_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  const std::int64_t heads = config.num_heads, dim = config.head_dim, size = config.state_size;
  const std::int64_t e = config.inner_size(), groups = config.num_groups;
  pool_->run(batch.num_sequences() * heads, [&](std::int64_t index, int) {
    const std::int64_t b = index / heads, h = index % heads, first = batch.offsets[b];
    float* const after_conv = static_cast<float*>(element(xbc, first, 0));
    const float* const projected = row(u, first) + config.channels();
    Mamba2Task task;
    task.x = after_conv + h * dim;
    task.b = after_conv + e + h * groups / heads * size;
    task.c = task.b + groups * size;
    task.z = projected + h * dim;
    task.dt = projected + e + h;
    task.log_rate = operands.log_rate + h;
    task.d = operands.d + h;
    task.bias = operands.dt_bias + h;
    task.xbc_width = xbc.cols;
    task.u_width = u.cols;
    task.head_dim = dim;
    task.state_size = size;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.state = pool.layer<float>(batch.slots[b], layer, 1) + h * size * dim;
    kernels.advance(task);
  });

  const NormKernels& norms = for_isa(isa_, [](auto tag) -> const NormKernels& { return norm_kernels(tag); });
  const std::int64_t cols = e / groups;
  pool_->run(batch.num_tokens() * groups, [&](std::int64_t index, int) {
    const std::int64_t t = index / groups, begin = index % groups * cols;
    norms.rms_norm(
        {row(xbc, t) + begin, operands.norm + begin, nullptr, cols, config.eps, element(out, t, begin), is_bf16(out)});
  });
}

}  // namespace based::cpu
