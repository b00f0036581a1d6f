#include <type_traits>

#include "kernels/common.cuh"

namespace based::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* __restrict__ source, To* __restrict__ target, std::int64_t n, bool vectors) {
  wait_for_predecessors();
  release_successors();
  const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (vectors && begin + kVector <= n) {
    const auto x = *reinterpret_cast<const Packed<From, kVector>*>(source + begin);
    Packed<To, kVector> y;
#pragma unroll
    for (int i = 0; i < kVector; ++i) y.x[i] = from_float<To>(to_float(x.x[i]));
    *reinterpret_cast<Packed<To, kVector>*>(target + begin) = y;
  } else {
    for (std::int64_t i = begin; i < n && i < begin + kVector; ++i) target[i] = from_float<To>(to_float(source[i]));
  }
}

}  // namespace

int code_capability() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, convert_kernel<float, bf16>), "device_info");
  return attributes.ptxVersion;
}

void convert(cudaStream_t stream, DType from, const void* source, DType to, void* target, std::int64_t n) {
  if (n == 0) return;
  if (from == to) {
    check(
        cudaMemcpyAsync(target, source, static_cast<std::size_t>(n) * size_of(from), cudaMemcpyDeviceToDevice, stream),
        "convert");
    note_operation("convert", stream);
    return;
  }
  for_dtype(from, [&]<typename From>(From) {
    for_dtype(to, [&]<typename To>(To) {
      if constexpr (!std::is_same_v<From, To>) {
        const bool vectors = is_aligned(source, kVector * sizeof(From)) && is_aligned(target, kVector * sizeof(To));
        launch(stream, "convert", convert_kernel<From, To>, blocks_for(n, kThreads * kVector), kThreads, 0,
               static_cast<const From*>(source), static_cast<To*>(target), n, vectors);
      }
    });
  });
}

}  // namespace based::cuda
