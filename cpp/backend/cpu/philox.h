#pragma once

#include <array>
#include <cstdint>

namespace based::cpu {

/// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
constexpr std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> counter,
                                                     std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

/// The uniform number in [0, 1) that chooses the token at `position` of a sequence: 53 bits of Philox with key = seed
/// (low word, high word) and counter = (position low, position high, sequence, 0).
constexpr double uniform(std::uint64_t seed, std::uint32_t sequence, std::uint64_t position) {
  const auto random =
      philox4x32_10({static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32), sequence, 0},
                    {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  const std::uint64_t bits = (std::uint64_t{random[0] >> 5} << 26) | (random[1] >> 6);
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace based::cpu
