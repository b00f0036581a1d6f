#pragma once

// bfloat16 and float16 (IEEE binary16) bits to float and back, the only place. Free of branches (the ternaries become
// selects), so that loops over them vectorise. Nothing here has external linkage or calls the standard library: kernels
// that are compiled for several instruction sets include it (cpp/backend/cpu/kernels/simd.h gives the reason).

#include <cstdint>

#define BASED_HALF static inline __attribute__((always_inline))

namespace based::io {

BASED_HALF float float_from_bf16(std::uint16_t h) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(h) << 16);
}

/// Rounded to nearest even; a NaN stays a NaN.
BASED_HALF std::uint16_t bf16_from_float(float x) {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (u >> 16) | 0x40u;
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

BASED_HALF float float_from_f16(std::uint16_t h) {
  const std::uint32_t magnitude = h & 0x7fffu;
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const auto subnormal =
      __builtin_bit_cast(std::uint32_t, static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
  const std::uint32_t u = magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return __builtin_bit_cast(float, u | (h & 0x8000u) << 16);
}

/// Rounded to nearest even; a NaN stays a NaN.
BASED_HALF std::uint16_t f16_from_float(float x) {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^−14: the last place of 0.5f is float16's 2^−24, so the addition rounds.
  const std::uint32_t subnormal =
      __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  const std::uint32_t h = magnitude >= 0x477ff000u ? special : finite;  // from 65520 on: infinity
  return static_cast<std::uint16_t>(h | (u >> 16 & 0x8000u));
}

}  // namespace based::io
