#include "backend/cpu/kernels/gated_delta_net.h"

#include "backend/cpu/kernels/matrix_state.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

constexpr float kLengthEps = 1e-6f;  // added to the squared length of q and k

/// SiLU of the convolution of channels [channel, channel + count) at token t; zeros up to whole vectors.
void convolve(const GatedDeltaNetTask& task, std::int64_t channel, std::int64_t count, std::int64_t t, float* out) {
  const std::int64_t k = task.kernel_size, channels = task.num_heads * (2 * task.key_dim + task.head_dim);
  for (std::int64_t c = 0; c < count; c += kLanes) {
    const std::int64_t n = count - c < kLanes ? count - c : kLanes;
    f32v sum{};
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t s = t - k + 1 + j;  // the tap's token
      const float* x = (s < 0 ? task.past + (s + k - 1) * channels : task.u + s * task.width) + channel + c;
      f32v w{};
      for (std::int64_t i = 0; i < n; ++i) w[i] = task.taps[(channel + c + i) * k + j];
      sum = fmadd(w, load_n(x, n), sum);
    }
    store(out + c, silu(sum));
  }
}

void scale(float* x, std::int64_t count, float factor) {
  for (std::int64_t c = 0; c < count; c += kLanes) store(x + c, load(x + c) * splat(factor));
}

float root(float x) { return __builtin_sqrtf(x); }

/// S ← α S + k (β (v − α Sᵀk))ᵀ and y = Sᵀq of columns [c, c + n).
BASED_INLINE void update(const GatedDeltaNetTask& task, const float* q, const float* k, const float* v, float alpha,
                         float beta, std::int64_t c, std::int64_t n, float* y) {
  const MatrixColumns s{task.state + c, task.key_dim, task.head_dim, n};
  const f32v a = splat(alpha), change = splat(beta) * fnmadd(a, read_matrix(s, k), load(v + c));
  store(y + c, write_matrix(s, q, k, change, [a](std::int64_t, f32v row) { return a * row; }));
}

/// past ← the last K − 1 rows of [past; u], of channels [channel, channel + count).
void keep(const GatedDeltaNetTask& task, std::int64_t channel, std::int64_t count) {
  const std::int64_t rows = task.kernel_size - 1, channels = task.num_heads * (2 * task.key_dim + task.head_dim);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t s = task.num_tokens - rows + r;  // the row's token; those before the call lie further behind
    const float* from = (s < 0 ? task.past + (s + rows) * channels : task.u + s * task.width) + channel;
    float* to = task.past + r * channels + channel;
    for (std::int64_t c = 0; c < count; ++c) to[c] = from[c];
  }
}

void advance(const GatedDeltaNetTask& task) {
  const std::int64_t h = task.head, heads = task.num_heads, dk = task.key_dim, dv = task.head_dim;
  const auto whole = [](std::int64_t n) { return (n + 15) / 16 * 16; };
  float *q = task.scratch, *k = q + whole(dk), *v = k + whole(dk), *y = v + whole(dv);
  for (float* x = q; x < y + whole(dv); ++x) *x = 0;
  const std::int64_t query = h * dk, key = (heads + h) * dk, value = 2 * heads * dk + h * dv;
  const std::int64_t b = heads * (2 * dk + dv), a = b + heads, g = task.log_rate == nullptr ? a : a + heads;
  const float rate = task.log_rate == nullptr ? 0 : first_lane(vexp(splat(*task.log_rate)));
  const float inverse_root = 1 / root(static_cast<float>(dk));
  for (std::int64_t t = 0; t < task.num_tokens; ++t) {
    const float* u = task.u + t * task.width;
    convolve(task, query, dk, t, q);
    convolve(task, key, dk, t, k);
    convolve(task, value, dv, t, v);
    scale(q, dk, inverse_root / root(squared_length(q, dk) + kLengthEps));
    scale(k, dk, 1 / root(squared_length(k, dk) + kLengthEps));
    const float beta = first_lane(sigmoid(splat(u[b + h])));
    float alpha = 1;
    if (task.log_rate != nullptr) alpha = first_lane(vexp(splat(-rate) * softplus(splat(u[a + h] + *task.dt_bias))));
    for (std::int64_t c = 0; c < dv; c += kLanes) {
      const std::int64_t n = dv - c < kLanes ? dv - c : kLanes;
      update(task, q, k, v, alpha, beta, c, n, y);
    }
    const float mean = squared_length(y, dv) / static_cast<float>(dv);
    const float factor = 1 / root(mean + task.eps);
    for (std::int64_t c = 0; c < dv; c += kLanes) {
      const std::int64_t n = dv - c < kLanes ? dv - c : kLanes;
      f32v result = load(y + c) * splat(factor) * load_n(task.norm + c, n);
      if (task.output_gate) result = result * silu(load_n(u + g + h * dv + c, n));
      store_as(task.out, (t * heads + h) * dv + c, result, n, task.out_bf16);
    }
  }
  keep(task, query, dk);
  keep(task, key, dk);
  keep(task, value, dv);
}

}  // namespace
}  // namespace BASED_ISA

const GatedDeltaNetKernels& gated_delta_net_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr GatedDeltaNetKernels kernels{BASED_ISA::advance};
  return kernels;
}

}  // namespace based::cpu
