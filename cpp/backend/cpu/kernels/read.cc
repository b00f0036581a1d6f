#include "backend/cpu/kernels/read.h"

#include "backend/cpu/kernels/simd.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

std::uint32_t fold(const void* data, std::size_t nbytes) {
  // Four places at once keep more lines in flight than one: some 5 % faster.
  constexpr int kStreams = 4, kUnroll = 2;
  const std::size_t stream = nbytes / kStreams;
  const char* p = static_cast<const char*>(data);
  i32v acc[kStreams][kUnroll] = {};
  for (std::size_t i = 0; i < stream; i += kUnroll * sizeof(i32v))
    for (int s = 0; s < kStreams; ++s)
      for (int u = 0; u < kUnroll; ++u) {
        i32v x;
        __builtin_memcpy(&x, p + static_cast<std::size_t>(s) * stream + i + static_cast<std::size_t>(u) * sizeof x,
                         sizeof x);
        acc[s][u] ^= x;
      }
  i32v all{};
  for (auto& s : acc)
    for (const i32v& a : s) all ^= a;
  std::uint32_t total = 0;
  for (int l = 0; l < kLanes; ++l) total ^= static_cast<std::uint32_t>(all[l]);
  return total;
}

}  // namespace
}  // namespace BASED_ISA

const ReadKernels& read_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr ReadKernels table{BASED_ISA::fold};
  return table;
}

}  // namespace based::cpu
