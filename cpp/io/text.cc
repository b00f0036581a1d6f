#include "io/text.h"

#include <algorithm>

#include "based/error.h"

namespace based {
namespace io {

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

/// Of a well-formed character of n bytes: C0 and C1 controls (a terminal obeys both), line and paragraph separators,
/// and the marks that change the direction of text or take no place (U+200B to U+200F, U+202A to U+202E, U+2060 to
/// U+206F, U+FEFF).
bool is_control(std::string_view character) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(character[k]); };
  if (character.size() == 1) return byte(0) < 0x20 || byte(0) == 0x7f;
  if (character.size() == 2) return byte(0) == 0xc2 && byte(1) < 0xa0;
  if (character.size() != 3) return false;
  const unsigned code = (byte(0) & 0xfu) << 12 | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu);
  return (code >= 0x200b && code <= 0x200f) || (code >= 0x2028 && code <= 0x202e) ||
         (code >= 0x2060 && code <= 0x206f) || code == 0xfeff;
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
    const std::size_t n = utf8_length(text, i);
    const std::string_view character = text.substr(i, std::max<std::size_t>(n, 1));
    if (n > 0 && !is_control(character)) {
      out += character;
    } else {
      for (const char c : character) {
        out += "\\x";
        out += kHexDigits[static_cast<unsigned char>(c) >> 4];
        out += kHexDigits[static_cast<unsigned char>(c) & 15];
      }
    }
    i += character.size();
  }
  return out;
}

}  // namespace io

namespace detail {

std::string message(std::string_view text) {
  std::string out;
  for (std::size_t begin = 0;;) {  // lines stay: some messages have several
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    out += io::printable(text.substr(begin, end - begin), text.npos);
    if (end == text.size()) return out;
    out += '\n';
    begin = end + 1;
  }
}

}  // namespace detail

namespace io {

std::string in_quotes(std::string_view text) { return concat("\"", printable(text), "\""); }

}  // namespace io
}  // namespace based
