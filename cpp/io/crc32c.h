#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace based::io {

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4): detects damage, not malice. Computed with the CPU's instruction for
/// it, where it has one.
class Crc32c {
 public:
  void add(const void* data, std::size_t nbytes);
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::uint32_t value() const { return ~register_; }
  /// 8 lower-case hex digits.
  std::string hex() const;

 private:
  std::uint32_t register_ = 0xffffffff;
};

/// A way to take nbytes bytes into the register of a CRC-32C, whose value is the register's complement.
using Crc32cUpdate = std::uint32_t (*)(std::uint32_t crc, const void* data, std::size_t nbytes);

/// On any CPU: 8 bytes at a time, by 8 tables of 256 numbers.
std::uint32_t update_crc32c_by_tables(std::uint32_t crc, const void* data, std::size_t nbytes);

/// By the instruction of x86 (SSE4.2) or AArch64 (CRC32); null where this CPU has none.
Crc32cUpdate crc32c_instruction();

}  // namespace based::io
