#include "backend/cpu/cpu_features.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "based/error.h"

namespace based::cpu {
namespace {

// Whether machine and operating system run it (the builtins check XCR0).
bool machine_runs(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2: {
      // Clang 16 knows no __builtin_cpu_supports("f16c"): bit 29 of ECX, leaf 1.
      unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
      const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1u) != 0;
      return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    case Isa::avx512:
      return machine_runs(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx512bf16:
      return machine_runs(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

}  // namespace

std::string_view name_of(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {
      Isa::baseline,
#ifdef BASED_HAS_ISA_AVX2
      Isa::avx2,
#endif
#ifdef BASED_HAS_ISA_AVX512
      Isa::avx512,
#endif
#ifdef BASED_HAS_ISA_AVX512BF16
      Isa::avx512bf16,
#endif
  };
  std::erase_if(isas, [](Isa isa) { return !machine_runs(isa); });
  return isas;
}

Isa choose_isa() {
  const std::vector<Isa> isas = available_isas();
  const char* wanted = std::getenv("BASED_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string names;
  for (const Isa isa : isas) {
    if (name_of(isa) == wanted) return isa;
    names += names.empty() ? "" : ", ";
    names += name_of(isa);
  }
  throw UnsupportedError("BASED_CPU_ISA is \"" + std::string(wanted) + "\": this build on this machine has " + names);
}

}  // namespace based::cpu
