#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace based::cpu {

/// Instruction sets that kernels are compiled for, ascending. On AArch64 the baseline has NEON.
enum class Isa : std::uint8_t { baseline, avx2, avx512, avx512bf16 };

std::string_view name_of(Isa isa);

/// Those that this build holds and this machine runs, ascending; the first is the baseline.
std::vector<Isa> available_isas();

/// The last of available_isas(). The environment variable BASED_CPU_ISA asks for a lower one by name (to test it); a
/// name that is unknown or not available throws UnsupportedError.
Isa choose_isa();

}  // namespace based::cpu
