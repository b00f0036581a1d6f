#include "backend/cpu/kernels/gated_linear_attention.h"

#include "backend/cpu/kernels/matrix_state.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

void advance(const GatedLinearAttentionTask& task) {
  const std::int64_t dk = task.key_dim, dv = task.head_dim;
  float *alpha = task.scratch, *y = alpha + (dk + 15) / 16 * 16;
  const f32v inverse_root = splat(1 / __builtin_sqrtf(static_cast<float>(dk)));
  const f32v exponent = splat(-1 / task.gate_normalizer);
  for (std::int64_t t = 0; t < task.num_tokens; ++t) {
    const float *q = task.q + t * task.u_width, *k = task.k + t * task.u_width, *v = task.v + t * task.u_width;
    const float *gate = task.gate + t * task.u_width, *a = task.a + t * task.a_width;
    // log σ(a) = −softplus(−a)
    for_each_vector(
        dk, [&](std::int64_t i, std::int64_t n) { store(alpha + i, vexp(exponent * softplus(-load_n(a + i, n)))); });
    for_each_vector(dv, [&](std::int64_t c, std::int64_t n) {
      const f32v sum = write_matrix({task.state + c, dk, dv, n}, q, k, load_n(v + c, n),
                                    [alpha](std::int64_t i, f32v row) { return splat(alpha[i]) * row; });
      store(y + c, sum * inverse_root);
    });
    const f32v factor = splat(1 / __builtin_sqrtf(squared_length(y, dv) / static_cast<float>(dv) + task.eps));
    for_each_vector(dv, [&](std::int64_t c, std::int64_t n) {
      const f32v result = load(y + c) * factor * load_n(task.norm + c, n) * silu(load_n(gate + c, n));
      store_as(task.out, t * task.out_width + task.out_begin + c, result, n, task.out_bf16);
    });
  }
}

}  // namespace
}  // namespace BASED_ISA

const GatedLinearAttentionKernels& gated_linear_attention_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr GatedLinearAttentionKernels kernels{BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
