#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace based::io {

/// An immutable JSON value. Integers that fit 64 bits stay exact and apart from other numbers.
class Json {
 public:
  struct Member;
  using Array = std::vector<Json>;
  using Object = std::vector<Member>;  // sorted by key, keys unique

  /// Throws FormatError, opened by `where`, on anything but one UTF-8 JSON value: bad syntax, text behind it, a
  /// duplicate key, nesting deeper than 100, a number too large for a double, more than 2,000,000 values (40 bytes of
  /// memory each; BASED_PARSE_LIMIT multiplies that, see parse_limit).
  static Json parse(std::string_view text, const std::string& where);

  // Null or none when the value is of another type.
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  const bool* as_bool() const { return std::get_if<bool>(&value_); }
  const std::string* as_string() const { return std::get_if<std::string>(&value_); }
  const Array* as_array() const { return std::get_if<Array>(&value_); }
  const Object* as_object() const { return std::get_if<Object>(&value_); }
  /// None also for 2.0, 1e3 and integers beyond int64.
  std::optional<std::int64_t> as_integer() const;
  /// Any number, rounded to a double.
  std::optional<double> as_number() const;

  /// The value as a message shows it: scalars as they are, strings shortened, "an object", "an array of 3".
  std::string describe() const;

 private:
  friend class JsonBuilder;
  using Value = std::variant<std::nullptr_t, bool, std::int64_t, std::uint64_t, double, std::string, Array, Object>;
  explicit Json(Value value);
  Value value_;
};

struct Json::Member {
  std::string key;
  Json value;
};

inline Json::Json(Value value) : value_(std::move(value)) {}

/// Reads an object strictly: every member is asked for by name, finish() refuses the rest. Failures are FormatErrors
/// "where: path.key: found …, expected …". The Json must outlive this.
class JsonObject {
 public:
  /// `path` is the place of `value` in the document, "" for its root.
  JsonObject(const Json& value, std::string where, std::string path);

  const Json* find(std::string_view key);  // null when missing
  const Json& get(std::string_view key, std::string_view expected);
  std::int64_t integer(std::string_view key);
  std::optional<std::int64_t> integer_or_null(std::string_view key);
  double number(std::string_view key);
  bool boolean(std::string_view key);
  const std::string& string(std::string_view key);
  const Json::Array& array(std::string_view key);

  /// Throws on a member that was not asked for.
  void finish() const;

  /// Place of a member: "path.key".
  std::string path_of(std::string_view key) const;
  [[noreturn]] void fail(std::string_view key, std::string_view found, std::string_view expected) const;

 private:
  std::string where_;
  std::string path_;
  const Json::Object* members_;
  std::vector<bool> asked_;  // parallel to *members_
  std::vector<std::string> missing_;
};

/// A JSON string literal. Throws InvalidArgument when the text is not UTF-8.
std::string json_string(std::string_view text);

/// Shortest number that reads back as the same double; always with a point or an exponent, unless it is not finite.
std::string json_number(double x);

}  // namespace based::io
