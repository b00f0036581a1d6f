#pragma once

// How a kernel compiled several times is found. kernels/x.h declares a table of function pointers and one overload
// per instruction set that returns it:
//   const XKernels& x_kernels(IsaTag<Isa::baseline>);  … avx2, avx512, avx512bf16
// kernels/x.cc defines the overload of the set that it is being compiled for,
//   const XKernels& x_kernels(IsaTag<BASED_ISA::kIsa>) { static constexpr XKernels table{…}; return table; }
// and the backend, compiled once, chooses:
//   for_isa(isa, [](auto tag) -> const XKernels& { return x_kernels(tag); })

#include "backend/cpu/cpu_features.h"

namespace based::cpu {

template <Isa isa>
struct IsaTag {};

// BASED_ISA, the namespace that a kernel is compiled into, to its Isa.
namespace isa_baseline {
constexpr Isa kIsa = Isa::baseline;
}
namespace isa_avx2 {
constexpr Isa kIsa = Isa::avx2;
}
namespace isa_avx512 {
constexpr Isa kIsa = Isa::avx512;
}
namespace isa_avx512bf16 {
constexpr Isa kIsa = Isa::avx512bf16;
}

/// f(IsaTag<isa>{}). An instruction set that this build does not hold (choose_isa() returns none) is the baseline.
template <typename F>
decltype(auto) for_isa(Isa isa, F&& f) {
  switch (isa) {
#ifdef BASED_HAS_ISA_AVX2
    case Isa::avx2:
      return f(IsaTag<Isa::avx2>{});
#endif
#ifdef BASED_HAS_ISA_AVX512
    case Isa::avx512:
      return f(IsaTag<Isa::avx512>{});
#endif
#ifdef BASED_HAS_ISA_AVX512BF16
    case Isa::avx512bf16:
      return f(IsaTag<Isa::avx512bf16>{});
#endif
    default:
      return f(IsaTag<Isa::baseline>{});
  }
}

}  // namespace based::cpu
