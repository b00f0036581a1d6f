#include "io/json.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <utility>

#include "based/error.h"
#include "io/file.h"
#include "io/text.h"

namespace based::io {

namespace {

constexpr std::size_t kMaxDepth = 100;
constexpr std::size_t kMaxValues = 2'000'000;  // a header has 8 for each tensor

}  // namespace

/// Receives nlohmann's parse events. Its own DOM would keep the last of two equal keys.
class JsonBuilder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonBuilder(const std::string& where) : where_(where) {}

  bool null() override { return add(Json(Json::Value(nullptr))); }
  bool boolean(bool x) override { return add(Json(Json::Value(x))); }
  bool number_integer(std::int64_t x) override { return add(Json(Json::Value(x))); }
  bool number_unsigned(std::uint64_t x) override {
    return std::in_range<std::int64_t>(x) ? number_integer(static_cast<std::int64_t>(x)) : add(Json(Json::Value(x)));
  }
  bool number_float(double x, const std::string&) override { return add(Json(Json::Value(x))); }
  bool string(std::string& text) override { return add(Json(Json::Value(std::move(text)))); }
  bool binary(binary_t&) override { return false; }  // no such thing in a text

  bool start_object(std::size_t) override { return push(false); }
  bool start_array(std::size_t) override { return push(true); }
  bool key(std::string& text) override {
    stack_.back().key = std::move(text);
    return true;
  }

  bool end_object() override {
    Json::Object members = std::move(stack_.back().members);
    std::sort(members.begin(), members.end(), [](const auto& a, const auto& b) { return a.key < b.key; });
    const auto twice =
        std::adjacent_find(members.begin(), members.end(), [](const auto& a, const auto& b) { return a.key == b.key; });
    stack_.pop_back();
    if (twice != members.end()) {
      const std::string place = path();
      throw FormatError(concat(where_, ": ", place, place.empty() ? "" : ": ", "found the key ", in_quotes(twice->key),
                               " twice, expected unique keys"));
    }
    return add(Json(Json::Value(std::move(members))));
  }

  bool end_array() override {
    Json::Array items = std::move(stack_.back().items);
    stack_.pop_back();
    return add(Json(Json::Value(std::move(items))));
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    std::string_view text = error.what();
    if (const auto end = text.find("] "); end != text.npos) text.remove_prefix(end + 2);  // "[json.exception.…] "
    throw FormatError(concat(where_, ": expected JSON, found ", printable(text, 300)));
  }

  Json take() { return std::move(*root_); }

 private:
  struct Frame {
    bool is_array;
    std::string key;  // of the member being read
    Json::Array items;
    Json::Object members;
  };

  bool push(bool is_array) {
    if (stack_.size() == kMaxDepth) {
      throw FormatError(concat(where_, ": found JSON nested deeper than ", kMaxDepth, " levels"));
    }
    stack_.push_back({is_array, {}, {}, {}});
    return true;
  }

  bool add(Json&& value) {
    if (++num_values_ > max_values_) {
      throw FormatError(concat(where_, ": found JSON of more than ", max_values_, " values", kRaiseLimit));
    }
    if (stack_.empty()) {
      root_ = std::move(value);
    } else if (Frame& top = stack_.back(); top.is_array) {
      top.items.push_back(std::move(value));
    } else {
      top.members.push_back({std::move(top.key), std::move(value)});
    }
    return true;
  }

  /// Place of the value being read: "layers[3].norm".
  std::string path() const {
    std::string text;
    for (const Frame& frame : stack_) {
      if (frame.is_array) {
        text += '[' + std::to_string(frame.items.size()) + ']';
      } else {
        text += concat(text.empty() ? "" : ".", printable(frame.key));
      }
    }
    return text;
  }

  const std::string& where_;
  const std::size_t max_values_ = parse_limit(kMaxValues);
  std::size_t num_values_ = 0;
  std::vector<Frame> stack_;
  std::optional<Json> root_;
};

Json Json::parse(std::string_view text, const std::string& where) {
  refuse_lfs_pointer(text, where);
  // nlohmann takes a NUL for the end of the text and skips a byte order mark.
  if (const auto nul = text.find('\0'); nul != text.npos) {
    throw FormatError(concat(where, ": expected JSON, found a NUL byte at byte ", nul));
  }
  if (text.starts_with("\xef\xbb\xbf")) {
    throw FormatError(concat(where, ": expected JSON, found a byte order mark"));
  }
  JsonBuilder builder(where);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

std::optional<std::int64_t> Json::as_integer() const {
  const auto* x = std::get_if<std::int64_t>(&value_);
  return x ? std::optional(*x) : std::nullopt;
}

std::optional<double> Json::as_number() const {
  if (const auto* x = std::get_if<double>(&value_)) return *x;
  if (const auto* x = std::get_if<std::int64_t>(&value_)) return static_cast<double>(*x);
  if (const auto* x = std::get_if<std::uint64_t>(&value_)) return static_cast<double>(*x);
  return std::nullopt;
}

std::string Json::describe() const {
  if (is_null()) return "null";
  if (const auto* x = as_bool()) return *x ? "true" : "false";
  if (const auto* x = std::get_if<std::int64_t>(&value_)) return std::to_string(*x);
  if (const auto* x = std::get_if<std::uint64_t>(&value_)) return std::to_string(*x);
  if (const auto* x = std::get_if<double>(&value_)) return json_number(*x);
  if (const auto* x = as_string()) return in_quotes(*x);
  if (const auto* x = as_array()) return concat("an array of ", x->size());
  return "an object";
}

JsonObject::JsonObject(const Json& value, std::string where, std::string path)
    : where_(std::move(where)), path_(std::move(path)), members_(value.as_object()) {
  if (!members_) {
    throw FormatError(
        concat(where_, ": ", path_, path_.empty() ? "" : ": ", "found ", value.describe(), ", expected an object"));
  }
  asked_.resize(members_->size());
}

const Json* JsonObject::find(std::string_view key) {
  const auto it = std::lower_bound(members_->begin(), members_->end(), key,
                                   [](const Json::Member& member, std::string_view k) { return member.key < k; });
  if (it == members_->end() || it->key != key) {
    missing_.emplace_back(key);
    return nullptr;
  }
  asked_[static_cast<std::size_t>(it - members_->begin())] = true;
  return &it->value;
}

const Json& JsonObject::get(std::string_view key, std::string_view expected) {
  const Json* value = find(key);
  if (!value) fail(key, "no such key", expected);
  return *value;
}

std::int64_t JsonObject::integer(std::string_view key) {
  const Json& value = get(key, "an integer");
  const auto x = value.as_integer();
  if (!x) fail(key, value.describe(), "an integer");
  return *x;
}

std::optional<std::int64_t> JsonObject::integer_or_null(std::string_view key) {
  constexpr std::string_view kExpected = "an integer or null";
  const Json& value = get(key, kExpected);
  if (value.is_null()) return std::nullopt;
  const auto x = value.as_integer();
  if (!x) fail(key, value.describe(), kExpected);
  return x;
}

double JsonObject::number(std::string_view key) {
  const Json& value = get(key, "a number");
  const auto x = value.as_number();
  if (!x) fail(key, value.describe(), "a number");
  return *x;
}

bool JsonObject::boolean(std::string_view key) {
  const Json& value = get(key, "true or false");
  const bool* x = value.as_bool();
  if (!x) fail(key, value.describe(), "true or false");
  return *x;
}

const std::string& JsonObject::string(std::string_view key) {
  const Json& value = get(key, "a string");
  const std::string* x = value.as_string();
  if (!x) fail(key, value.describe(), "a string");
  return *x;
}

const Json::Array& JsonObject::array(std::string_view key) {
  const Json& value = get(key, "an array");
  const Json::Array* x = value.as_array();
  if (!x) fail(key, value.describe(), "an array");
  return *x;
}

void JsonObject::finish() const {
  std::string known;
  for (std::size_t i = 0; i < members_->size(); ++i) {
    if (asked_[i]) append_item(known, (*members_)[i].key);
  }
  for (const std::string& key : missing_) append_item(known, key);
  for (std::size_t i = 0; i < members_->size(); ++i) {
    if (!asked_[i]) fail((*members_)[i].key, "an unknown key", concat("only ", known));
  }
}

std::string JsonObject::path_of(std::string_view key) const {
  return concat(path_, path_.empty() ? "" : ".", printable(key));
}

void JsonObject::fail(std::string_view key, std::string_view found, std::string_view expected) const {
  throw FormatError(concat(where_, ": ", path_of(key), ": found ", found, ", expected ", expected));
}

std::string json_string(std::string_view text) {
  if (!is_utf8(text)) throw InvalidArgument(concat("found ", in_quotes(text), ", expected UTF-8"));
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00";
      out += "0123456789abcdef"[c >> 4];
      out += "0123456789abcdef"[c & 15];
    } else {
      out += c;
    }
  }
  return concat(out, "\"");
}

std::string json_number(double x) {
  char buffer[40];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, x).ptr;
  std::string text(buffer, end);
  if (text.find_first_of(".en") == text.npos) text += ".0";  // n: inf and nan stay as they are
  return text;
}

}  // namespace based::io
