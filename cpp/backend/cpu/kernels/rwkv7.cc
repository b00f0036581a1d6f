#include "backend/cpu/kernels/rwkv7.h"

#include "backend/cpu/kernels/matrix_state.h"
#include "backend/cpu/kernels/token_shift_kernel.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

void shift(const TokenShiftTask<6>& task) {
  token_shift(task, [](f32v x, f32v before, f32v mu) { return fmadd(before - x, mu, x); });
}

template <class F>
BASED_INLINE void for_all(float* x, std::int64_t count, F f) {
  for_each_vector(count, [&](std::int64_t i, std::int64_t n) { store_n(x + i, f(load_n(x + i, n)), n); });
}

/// 2 σ(2x) − 1.
void tanh(float* x, std::int64_t count) {
  for_all(x, count, [](f32v v) { return fmadd(splat(2.0f), sigmoid(v + v), splat(-1.0f)); });
}

void logistic(float* x, std::int64_t count) {
  for_all(x, count, [](f32v v) { return sigmoid(v); });
}

float root(float x) { return __builtin_sqrtf(x); }

void advance(const Rwkv7Task& task) {
  const std::int64_t size = task.head_dim, whole = (size + 15) / 16 * 16;
  float *kappa = task.scratch, *key = kappa + whole, *removal = key + whole, *decay = removal + whole;
  float* y = decay + whole;
  const float inverse_size = 1 / static_cast<float>(size);
  const f32v rate = splat(-0.60653066f);  // −e^−½
  for (std::int64_t t = 0; t < task.num_tokens; ++t) {
    const std::int64_t at = t * task.width;
    for_each_vector(size, [&](std::int64_t i, std::int64_t n) {
      store(kappa + i, load_n(task.k + at + i, n) * load_n(task.k_k + i, n));
    });
    const float length = root(squared_length(kappa, size));
    const f32v inverse_length = splat(1 / (length < 1e-12f ? 1e-12f : length));
    f32v products{};
    for_each_vector(size, [&](std::int64_t i, std::int64_t n) {
      const f32v a = sigmoid(load_n(task.a + at + i, n)), unit = load(kappa + i) * inverse_length;
      const f32v k = load_n(task.k + at + i, n) * fmadd(a - splat(1.0f), load_n(task.k_a + i, n), splat(1.0f));
      store(kappa + i, unit);
      store(removal + i, unit * a);
      store(key + i, k);
      store(decay + i, vexp(rate * sigmoid(load_n(task.w + at + i, n))));
      products = fmadd(load_n(task.r + at + i, n) * k, load_n(task.r_k + i, n), products);
    });
    const f32v bonus = splat(hsum(products));
    f32v total{};
    for_each_vector(size, [&](std::int64_t c, std::int64_t n) {
      const MatrixColumns s{task.state + c, size, size, n};
      const f32v seen = read_matrix(s, kappa);
      const f32v sum = write_matrix(s, task.r + at, key, load_n(task.v + at + c, n), [&](std::int64_t i, f32v row) {
        return fnmadd(splat(removal[i]), seen, splat(decay[i]) * row);
      });
      store(y + c, sum);
      total = total + sum;
    });
    const f32v mean = splat(hsum(total) * inverse_size);
    for_each_vector(size, [&](std::int64_t c, std::int64_t n) { store_n(y + c, load(y + c) - mean, n); });
    const f32v factor = splat(1 / root(squared_length(y, size) * inverse_size + task.eps));
    for_each_vector(size, [&](std::int64_t c, std::int64_t n) {
      const f32v normed = fmadd(load(y + c) * factor, load_n(task.norm + c, n), load_n(task.norm_bias + c, n));
      const f32v result = fmadd(bonus, load_n(task.v + at + c, n), normed) * load_n(task.g + at + c, n);
      store_as(task.out, at + task.out_begin + c, result, n, task.out_bf16);
    });
  }
}

}  // namespace
}  // namespace BASED_ISA

const Rwkv7Kernels& rwkv7_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr Rwkv7Kernels kernels{BASED_ISA::shift, BASED_ISA::tanh, BASED_ISA::logistic, BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
