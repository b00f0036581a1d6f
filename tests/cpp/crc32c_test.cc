#include "io/crc32c.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace based::io {
namespace {

std::uint32_t checksum(Crc32cUpdate update, const std::string& bytes) {
  return ~update(0xffffffffu, bytes.data(), bytes.size());
}

// RFC 3720, appendix B.4, and the check value of the catalogues of CRCs.
void expect_known_values(Crc32cUpdate update) {
  std::string rising, falling;
  for (int i = 0; i < 32; ++i) {
    rising.push_back(static_cast<char>(i));
    falling.push_back(static_cast<char>(31 - i));
  }
  EXPECT_EQ(checksum(update, ""), 0u);
  EXPECT_EQ(checksum(update, "123456789"), 0xe3069283u);
  EXPECT_EQ(checksum(update, std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(checksum(update, std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(checksum(update, rising), 0x46dd794eu);
  EXPECT_EQ(checksum(update, falling), 0x113fdb5cu);
}

// The definition: one bit at a time.
std::uint32_t by_bits(std::uint32_t crc, const void* data, std::size_t nbytes) {
  for (const auto* byte = static_cast<const unsigned char*>(data); nbytes > 0; --nbytes, ++byte) {
    crc ^= *byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0u);
  }
  return crc;
}

// Every length to 80 at every offset to 8, and in two pieces.
void expect_definition(Crc32cUpdate update) {
  std::mt19937 random(3);
  std::string bytes(88, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  for (std::size_t offset = 0; offset < 8; ++offset)
    for (std::size_t n = 0; n <= 80; ++n) {
      const char* data = bytes.data() + offset;
      const std::uint32_t start = random(), expected = by_bits(start, data, n);
      EXPECT_EQ(update(start, data, n), expected) << offset << " " << n;
      const std::size_t cut = n == 0 ? 0 : random() % n;
      EXPECT_EQ(update(update(start, data, cut), data + cut, n - cut), expected) << offset << " " << n << " " << cut;
    }
}

TEST(Crc32c, ByTables) {
  expect_known_values(update_crc32c_by_tables);
  expect_definition(update_crc32c_by_tables);
}

TEST(Crc32c, ByInstruction) {
  const Crc32cUpdate update = crc32c_instruction();
  if (update == nullptr) GTEST_SKIP() << "this CPU has no instruction for it";
  expect_known_values(update);
  expect_definition(update);
}

TEST(Crc32c, ValueAndDigits) {
  Crc32c none, whole, pieces;
  EXPECT_EQ(none.hex(), "00000000");
  whole.add("123456789");
  EXPECT_EQ(whole.value(), 0xe3069283u);
  EXPECT_EQ(whole.hex(), "e3069283");
  pieces.add("1234");
  pieces.add("");
  pieces.add("56789");
  EXPECT_EQ(pieces.hex(), "e3069283");
}

}  // namespace
}  // namespace based::io
