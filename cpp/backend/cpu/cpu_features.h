#pragma once

#include <cstdint>
#include <string_view>

namespace based::cpu {

/// Instruction sets that kernels are compiled for, ascending.
enum class Isa : std::uint8_t { baseline, avx2, avx512, avx512bf16 };

std::string_view name_of(Isa isa);

/// The best one that this build holds and this machine runs. The environment variable BASED_CPU_ISA asks for a lower
/// one by name (to test it); a name that is unknown or beyond this machine throws UnsupportedError.
Isa choose_isa();

}  // namespace based::cpu
