#include <algorithm>

#include "kernels/common.cuh"

namespace based::cuda {
namespace {

constexpr int kVector = 4;   // floats of a load
constexpr int kVectors = 4;  // of a thread, at most: a row of ≤ 16 · threads numbers stays in registers
constexpr int kMaxThreads = 1024;

struct NormArguments {
  NormKind kind;
  float eps;
  const float *weight, *bias, *r;
  std::int64_t d;
  const std::int32_t* rows;
};

// Sum over the block, the same bits in every thread. `shared` holds 32 floats, of one use each.
__device__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  const unsigned num_warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (num_warps == 1) return x;
  if (lane == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(lane < num_warps ? shared[lane] : 0.0f);
}

// One block per row, d a multiple of kVector. Variance in a second pass over the registers.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const NormArguments a, T* out) {
  __shared__ float sums[2][32];
  using Vector = Packed<float, kVector>;
  const int num_vectors = static_cast<int>(a.d / kVector);
  Vector weight[kVectors], x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (v < num_vectors) weight[i] = reinterpret_cast<const Vector*>(a.weight)[v];
  }
  wait_for_predecessors();
  release_successors();
  const std::int64_t row = a.rows == nullptr ? static_cast<std::int64_t>(blockIdx.x) : a.rows[blockIdx.x];
  if (row < 0) return;
  const Vector* r = reinterpret_cast<const Vector*>(a.r + row * a.d);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (v < num_vectors) {
      x[i] = r[v];
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[i].x[j] = 0;
    }
  }
  float mean = 0;
  if (a.kind == NormKind::layer_norm) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += x[i].x[j];
    mean = block_sum(sum, sums[0]) / static_cast<float>(a.d);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (static_cast<int>(threadIdx.x + i * blockDim.x) < num_vectors) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        x[i].x[j] -= mean;
        squares += x[i].x[j] * x[i].x[j];
      }
    }
  }
  const float scale = rsqrtf(block_sum(squares, sums[1]) / static_cast<float>(a.d) + a.eps);
  T* to = out + blockIdx.x * a.d;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = static_cast<int>(threadIdx.x + i * blockDim.x);
    if (v >= num_vectors) continue;
    Packed<T, kVector> y;
    const Vector bias = a.bias == nullptr ? Vector{} : reinterpret_cast<const Vector*>(a.bias)[v];
#pragma unroll
    for (int j = 0; j < kVector; ++j) y.x[j] = from_float<T>(x[i].x[j] * scale * weight[i].x[j] + bias.x[j]);
    reinterpret_cast<Packed<T, kVector>*>(to)[v] = y;
  }
}

// Any d and alignment: reads the row once per pass.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_any_kernel(const NormArguments a, T* out) {
  __shared__ float sums[2][32];
  wait_for_predecessors();
  release_successors();
  const std::int64_t row = a.rows == nullptr ? static_cast<std::int64_t>(blockIdx.x) : a.rows[blockIdx.x];
  if (row < 0) return;
  const float* r = a.r + row * a.d;
  float mean = 0;
  if (a.kind == NormKind::layer_norm) {
    float sum = 0;
    for (std::int64_t i = threadIdx.x; i < a.d; i += blockDim.x) sum += r[i];
    mean = block_sum(sum, sums[0]) / static_cast<float>(a.d);
  }
  float squares = 0;
  for (std::int64_t i = threadIdx.x; i < a.d; i += blockDim.x) squares += (r[i] - mean) * (r[i] - mean);
  const float scale = rsqrtf(block_sum(squares, sums[1]) / static_cast<float>(a.d) + a.eps);
  T* to = out + blockIdx.x * a.d;
  for (std::int64_t i = threadIdx.x; i < a.d; i += blockDim.x) {
    const float bias = a.bias == nullptr ? 0.0f : a.bias[i];
    to[i] = from_float<T>((r[i] - mean) * scale * a.weight[i] + bias);
  }
}

}  // namespace

void norm(cudaStream_t stream, NormKind kind, float eps, const float* weight, const float* bias, const float* r,
          std::int64_t d, const std::int32_t* rows, std::int64_t num_rows, DType out_dtype, void* out) {
  const NormArguments arguments{kind, eps, weight, bias, r, d, rows};
  for_dtype(out_dtype, [&]<typename T>(T) {
    const bool in_registers = d % kVector == 0 && d <= kMaxThreads * kVectors * kVector && is_aligned(weight, 16) &&
                              is_aligned(bias, 16) && is_aligned(r, 16) && is_aligned(out, kVector * sizeof(T));
    const std::int64_t per_thread = in_registers ? kVectors * kVector : kVectors;
    const unsigned threads = std::min<unsigned>(kMaxThreads, 32 * blocks_for(d, 32 * per_thread));
    launch(stream, "norm", in_registers ? norm_kernel<T> : norm_any_kernel<T>, static_cast<unsigned>(num_rows), threads,
           0, arguments, static_cast<T*>(out));
  });
}

}  // namespace based::cuda
