#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace based::io {

/// FNV-1a, 64 bits: detects damage and mix-ups, not malice.
class Fnv1a {
 public:
  void add(const void* data, std::size_t nbytes);
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::uint64_t value() const { return state_; }
  /// 16 lower-case hex digits.
  std::string hex() const;

 private:
  std::uint64_t state_ = 0xcbf29ce484222325u;
};

}  // namespace based::io
