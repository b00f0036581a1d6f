#pragma once

#include <concepts>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>

namespace based::io {

/// The parts one after another, integers in decimal: for messages.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  const auto append = [&text](const auto& part) {
    using Part = std::remove_cvref_t<decltype(part)>;
    if constexpr (std::integral<Part> && !std::same_as<Part, char>) {
      text += std::to_string(part);
    } else {
      text += part;
    }
  };
  (append(parts), ...);
  return text;
}

/// Appends `item` to a list "a, b, c".
void append_item(std::string& list, std::string_view item);

/// Throws FormatError, opened by `where`, when a file's contents are those of a Git LFS pointer: what a clone without
/// Git LFS has in the place of large files.
void refuse_lfs_pointer(std::string_view contents, const std::string& where);

/// True for well-formed UTF-8 (no surrogates, no overlong forms).
bool is_utf8(std::string_view text);

/// Text from outside, made fit for a message: bytes that are not UTF-8, and characters that would move a terminal's
/// cursor or turn its text around, as \xNN; at most `limit` bytes of it.
std::string printable(std::string_view text, std::size_t limit = 120);

/// printable() in double quotes.
std::string in_quotes(std::string_view text);

}  // namespace based::io
