#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cpu/kernels/dispatch.h"

namespace based::cpu {

struct ReadKernels {
  /// Exclusive or of the 32-bit words of `data`, nbytes a multiple of 4096: the least that proves that all were read.
  std::uint32_t (*fold)(const void* data, std::size_t nbytes);
};

const ReadKernels& read_kernels(IsaTag<Isa::baseline>);
const ReadKernels& read_kernels(IsaTag<Isa::avx2>);
const ReadKernels& read_kernels(IsaTag<Isa::avx512>);
const ReadKernels& read_kernels(IsaTag<Isa::avx512bf16>);

}  // namespace based::cpu
