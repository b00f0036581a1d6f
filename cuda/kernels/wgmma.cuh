#pragma once

// Hopper's asynchronous tensor cores (wgmma, sm_90a) read matrices from shared memory: what its users share.

#include "kernels/common.cuh"

namespace based::cuda {

constexpr int kWarpgroup = 128;

/// Matrices lie as wgmma reads them without swizzling: 8 × 8 elements of 16 bits in 128 consecutive bytes.
template <typename T>
using CoreMatrixOf = T[8][8];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Descriptor of core matrices: `leading` and `stride` bytes from one to the next, along K and along M or N when rows
/// run along K; along K and M or N when they run along M or N.
__device__ __forceinline__ std::uint64_t core_matrices(const void* first, unsigned leading, unsigned stride) {
  return static_cast<std::uint64_t>((shared_address(first) & 0x3ffffu) >> 4) |
         static_cast<std::uint64_t>(leading >> 4) << 16 | static_cast<std::uint64_t>(stride >> 4) << 32;
}

/// Four accumulators of a thread, as an operand.
#define BASED_GROUP(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])

__device__ __forceinline__ void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// Keeps the compiler from reading accumulators before the wait above.
template <int n>
__device__ __forceinline__ void use_after_wait(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

/// What this thread wrote into shared memory is seen by products started after it.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Four 8 × 8 matrices of 16-bit elements; lane l gives the address of row l mod 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(void* row, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(void* row, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

#endif

}  // namespace based::cuda
