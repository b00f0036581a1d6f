#pragma once

#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

struct NormTask {
  const float* x;       // (size)
  const float* weight;  // (size)
  const float* bias;    // (size) or null
  std::int64_t size;
  double eps;
  void* out;  // (size) float, or bfloat16 when out_bf16
  bool out_bf16;
};

struct NormKernels {
  void (*rms_norm)(const NormTask& task);
  void (*layer_norm)(const NormTask& task);
};

const NormKernels& norm_kernels(IsaTag<Isa::baseline>);
const NormKernels& norm_kernels(IsaTag<Isa::avx2>);
const NormKernels& norm_kernels(IsaTag<Isa::avx512>);
const NormKernels& norm_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
