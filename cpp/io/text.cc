#include "io/text.h"

#include "based/error.h"

namespace based::io {

namespace {

constexpr char kHexDigits[] = "0123456789abcdef";

/// Bytes of the well-formed UTF-8 character that starts at text[i]; 0 when there is none.
std::size_t utf8_length(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u; };
  const auto continuation = [&](std::size_t k, unsigned low = 0x80, unsigned high = 0xbf) {
    return byte(k) >= low && byte(k) <= high;
  };
  const unsigned c = byte(0);
  if (c < 0x80) return 1;
  if (c >= 0xc2 && c <= 0xdf) return continuation(1) ? 2 : 0;
  if (c >= 0xe0 && c <= 0xef) {  // no overlong forms (e0), no surrogates (ed)
    return continuation(1, c == 0xe0 ? 0xa0 : 0x80, c == 0xed ? 0x9f : 0xbf) && continuation(2) ? 3 : 0;
  }
  if (c >= 0xf0 && c <= 0xf4) {  // no overlong forms (f0), nothing beyond U+10FFFF (f4)
    return continuation(1, c == 0xf0 ? 0x90 : 0x80, c == 0xf4 ? 0x8f : 0xbf) && continuation(2) && continuation(3) ? 4
                                                                                                                   : 0;
  }
  return 0;
}

}  // namespace

void append_item(std::string& list, std::string_view item) {
  if (!list.empty()) list += ", ";
  list += item;
}

void refuse_lfs_pointer(std::string_view contents, const std::string& where) {
  if (contents.starts_with("version https://git-lfs.github.com/spec/")) {
    throw FormatError(concat(where,
                             ": found a Git LFS pointer, expected the file that it stands for: run `git lfs pull` "
                             "in its repository, or download the file"));
  }
}

bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t n = utf8_length(text, i);
    if (n == 0) return false;
    i += n;
  }
  return true;
}

std::string printable(std::string_view text, std::size_t limit) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    if (out.size() >= limit) return concat(out, "...");
    const auto c = static_cast<unsigned char>(text[i]);
    const std::size_t n = utf8_length(text, i);
    if (n == 0 || c < 0x20 || c == 0x7f) {
      out += "\\x";
      out += kHexDigits[c >> 4];
      out += kHexDigits[c & 15];
      ++i;
    } else {
      out += text.substr(i, n);
      i += n;
    }
  }
  return out;
}

std::string in_quotes(std::string_view text) { return concat("\"", printable(text), "\""); }

}  // namespace based::io
