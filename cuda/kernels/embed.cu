#include "kernels/common.cuh"

namespace based::cuda {
namespace {

constexpr int kThreads = 256;

// One block per row. n elements of a row are moved at a time.
template <typename T, int n>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const T* __restrict__ table, std::int64_t d, const std::int32_t* tokens, std::int32_t* slots,
                 const std::int32_t* chosen, float* r) {
  wait_for_predecessors();
  release_successors();
  const std::int64_t row = blockIdx.x;
  std::int64_t token = tokens == nullptr ? chosen_token(row) : tokens[row];
  if (token < 0) {
    const std::int64_t sequence = chosen_token(token);
    const std::int32_t slot = slots[sequence];
    token = slot >= 0 ? chosen[slot] : 0;
    const bool skip = token < 0;
    if (skip) token = 0;
    __syncthreads();  // all threads have read the slot
    if (skip && threadIdx.x == 0) slots[sequence] = kSkippedSlot - slot;
  }
  const T* from = table + token * d;
  float* to = r + row * d;
  for (std::int64_t i = threadIdx.x * n; i < d; i += kThreads * n) {
    const auto x = *reinterpret_cast<const Packed<T, n>*>(from + i);
    Packed < float, n<4 ? n : 4> y;
#pragma unroll
    for (int j = 0; j < n; j += 4) {
#pragma unroll
      for (int l = 0; l < 4 && l < n; ++l) y.x[l] = to_float(x.x[j + l]);
      *reinterpret_cast<decltype(y)*>(to + i + j) = y;
    }
  }
}

}  // namespace

void embed(cudaStream_t stream, DType dtype, const void* table, std::int64_t d, const DeviceBatch& batch,
           const std::int32_t* chosen, float* r) {
  for_dtype(dtype, [&]<typename T>(T) {
    constexpr int n = 16 / sizeof(T);
    const bool vectors = d % n == 0 && is_aligned(table, 16) && is_aligned(r, 16);
    launch(stream, "embed", vectors ? embed_kernel<T, n> : embed_kernel<T, 1>, batch.num_tokens, kThreads, 0,
           static_cast<const T*>(table), d, batch.tokens, batch.slots, chosen, r);
  });
}

}  // namespace based::cuda
