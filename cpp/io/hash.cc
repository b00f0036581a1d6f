#include "io/hash.h"

namespace based::io {

void Fnv1a::add(const void* data, std::size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint64_t h = state_;
  for (std::size_t i = 0; i < nbytes; ++i) h = (h ^ bytes[i]) * 0x100000001b3u;
  state_ = h;
}

std::string Fnv1a::hex() const {
  std::string text(16, '0');
  for (int i = 0; i < 16; ++i) text[static_cast<std::size_t>(i)] = "0123456789abcdef"[(state_ >> (60 - 4 * i)) & 15];
  return text;
}

}  // namespace based::io
