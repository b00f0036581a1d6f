#include "io/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace based::io {

namespace {

static_assert(std::endian::native == std::endian::little, "words are read as their bytes stand");

std::uint64_t word_at(const unsigned char* bytes) {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

// Row k, entry b: what byte b does to the register when k bytes follow it. The polynomial 0x1edc6f41, bits reversed.
constexpr auto kTables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0u);
    tables[0][b] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k)
    for (std::size_t b = 0; b < 256; ++b) {
      const std::uint32_t before = tables[k - 1][b];
      tables[k][b] = before >> 8 ^ tables[0][before & 0xff];
    }
  return tables;
}();

#if defined(__x86_64__)

bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }

__attribute__((target("sse4.2"))) std::uint32_t update_by_instruction(std::uint32_t crc, const void* data,
                                                                      std::size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint64_t wide = crc;
  for (; nbytes >= 8; nbytes -= 8, bytes += 8) wide = _mm_crc32_u64(wide, word_at(bytes));
  crc = static_cast<std::uint32_t>(wide);
  for (; nbytes > 0; --nbytes, ++bytes) crc = _mm_crc32_u8(crc, *bytes);
  return crc;
}

#elif defined(__aarch64__)

bool has_instruction() {
#if defined(__ARM_FEATURE_CRC32)
  return true;  // of every CPU that this build is for
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & (1u << 7)) != 0;  // HWCAP_CRC32
#else
  return false;
#endif
}

// Written as assembly: compilers declare the intrinsics only where all of a build may use them.
std::uint32_t update_by_instruction(std::uint32_t crc, const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (; nbytes >= 8; nbytes -= 8, bytes += 8)
    asm(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word_at(bytes)));
  for (; nbytes > 0; --nbytes, ++bytes)
    asm(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(static_cast<std::uint32_t>(*bytes)));
  return crc;
}

#endif

}  // namespace

std::uint32_t update_crc32c_by_tables(std::uint32_t crc, const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (; nbytes >= 8; nbytes -= 8, bytes += 8) {
    const std::uint64_t word = word_at(bytes) ^ crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][word >> 8 * k & 0xff];
  }
  for (; nbytes > 0; --nbytes, ++bytes) crc = crc >> 8 ^ kTables[0][(crc ^ *bytes) & 0xff];
  return crc;
}

Crc32cUpdate crc32c_instruction() {
#if defined(__x86_64__) || defined(__aarch64__)
  if (has_instruction()) return update_by_instruction;
#endif
  return nullptr;
}

void Crc32c::add(const void* data, std::size_t nbytes) {
  static const Crc32cUpdate update = crc32c_instruction() ? crc32c_instruction() : update_crc32c_by_tables;
  register_ = update(register_, data, nbytes);
}

std::string Crc32c::hex() const {
  std::string text(8, '0');
  for (int i = 0; i < 8; ++i) text[static_cast<std::size_t>(i)] = "0123456789abcdef"[(value() >> (28 - 4 * i)) & 15];
  return text;
}

}  // namespace based::io
