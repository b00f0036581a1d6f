#include "backend/cpu/kernels/mamba2.h"

#include "backend/cpu/kernels/matrix_state.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

void advance(const Mamba2Task& task) {
  const f32v rate = vexp(splat(*task.log_rate)), d = splat(*task.d);
  for (std::int64_t t = 0; t < task.num_tokens; ++t) {
    float* x = task.x + t * task.xbc_width;
    const float *b = task.b + t * task.xbc_width, *c = task.c + t * task.xbc_width, *z = task.z + t * task.u_width;
    const f32v delta = softplus(splat(task.dt[t * task.u_width] + *task.bias));
    const f32v alpha = vexp(-rate * delta);
    for_each_vector(task.head_dim, [&](std::int64_t col, std::int64_t n) {
      const f32v input = load_n(x + col, n);
      const f32v y = write_matrix({task.state + col, task.state_size, task.head_dim, n}, c, b, delta * input,
                                  [alpha](std::int64_t, f32v row) { return alpha * row; });
      store_n(x + col, fmadd(d, input, y) * silu(load_n(z + col, n)), n);
    });
  }
}

}  // namespace
}  // namespace BASED_ISA

const Mamba2Kernels& mamba2_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr Mamba2Kernels kernels{BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
