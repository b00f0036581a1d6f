#include "io/state_file.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "based/error.h"
#include "io/crc32c.h"
#include "io/hash.h"
#include "io/json.h"
#include "io/text.h"

namespace based::io {

namespace {

constexpr std::string_view kFormat = "based-state";
constexpr std::string_view kFormatVersion = "3";
constexpr std::string_view kSecondVersion = "2";  // the checksum is FNV-1a, otherwise the same
constexpr std::string_view kFirstVersion = "1";   // and there are no pending tokens
constexpr std::string_view kPending = ".pending_";
constexpr std::string_view kSequences = "sequences.";
constexpr std::string_view kLayers = "layers.";             // the only tensors before version 3
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 53;  // positions stay exact as doubles, and never overflow

/// A decimal without sign or leading zeros.
std::optional<std::int64_t> parse_decimal(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool canonical = !text.empty() && text[0] != '-' && (text[0] != '0' || text.size() == 1);
  if (error != std::errc() || end != text.data() + text.size() || !canonical) return std::nullopt;
  return value;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Orders names with runs of digits by their value: layers.2 before layers.10, so the order of the layers.
bool natural_less(std::string_view a, std::string_view b) {
  const auto take_digits = [](std::string_view& text) {
    std::size_t n = 0;
    while (n < text.size() && is_digit(text[n])) ++n;
    std::string_view digits = text.substr(0, n);
    text.remove_prefix(n);
    while (digits.size() > 1 && digits[0] == '0') digits.remove_prefix(1);
    return digits;
  };
  const std::string_view whole_a = a, whole_b = b;
  while (!a.empty() && !b.empty()) {
    if (is_digit(a[0]) && is_digit(b[0])) {
      const std::string_view x = take_digits(a), y = take_digits(b);
      if (x.size() != y.size()) return x.size() < y.size();
      if (x != y) return x < y;
    } else {
      if (a[0] != b[0]) return a[0] < b[0];
      a.remove_prefix(1);
      b.remove_prefix(1);
    }
  }
  return a.empty() != b.empty() ? a.empty() : whole_a < whole_b;
}

void sort_tensors(SavedState& state) {
  std::sort(state.tensors.begin(), state.tensors.end(),
            [](const TensorToWrite& a, const TensorToWrite& b) { return natural_less(a.name, b.name); });
}

/// Over what the header says of the states and over their data. `states` have their tensors sorted.
template <typename Hash>
std::string checksum(const std::vector<SavedState>& states) {
  Hash hash;
  for (const SavedState& state : states) {
    hash.add(std::to_string(state.num_tokens) + ';');
    for (const auto& [name, tensor] : state.tensors) {
      hash.add(name + ';' + std::string(name_of(tensor.dtype)) + ';' + shape_str(tensor.shape) + ';');
      hash.add(tensor.data, tensor.nbytes());
    }
  }
  return hash.hex();
}

}  // namespace

void write_state_file(const std::filesystem::path& path, const std::string& fingerprint,
                      const std::vector<SavedState>& states) {
  std::vector<SavedState> sorted = states;
  std::vector<TensorToWrite> tensors;
  std::string num_tokens;
  for (std::size_t b = 0; b < sorted.size(); ++b) {
    sort_tensors(sorted[b]);
    for (const auto& [name, tensor] : sorted[b].tensors) {
      tensors.push_back({concat(kSequences, b, ".", name), tensor});
    }
    num_tokens += concat(b ? "," : "", sorted[b].num_tokens);
  }
  write_safetensors(path, tensors,
                    {{"format", std::string(kFormat)},
                     {"format_version", std::string(kFormatVersion)},
                     {"fingerprint", fingerprint},
                     {"num_tokens", num_tokens},
                     {"checksum", checksum<Crc32c>(sorted)}});
}

namespace {

using Metadata = std::map<std::string, std::string>;

const std::string& value_in(const Metadata& metadata, const char* key, const std::string& where) {
  const auto it = metadata.find(key);
  if (it == metadata.end()) {
    throw FormatError(concat(where, "found no ", key, " in the metadata, expected the state file of a session"));
  }
  return it->second;
}

/// `fingerprints`: of the model, the newest first.
void check_kind(const Metadata& metadata, const std::vector<std::string>& fingerprints, const std::string& where) {
  const auto value = [&](const char* key) -> const std::string& { return value_in(metadata, key, where); };
  if (value("format") != kFormat) {
    throw FormatError(concat(where, "format: found ", in_quotes(value("format")), ", expected ", in_quotes(kFormat)));
  }
  const std::string& version = value("format_version");
  if (version != kFirstVersion && version != kSecondVersion && version != kFormatVersion) {
    throw StateError(concat(where, "format_version: found ", in_quotes(version), ", expected ",
                            in_quotes(kFirstVersion), ", ", in_quotes(kSecondVersion), " or ",
                            in_quotes(kFormatVersion)));
  }
  if (std::ranges::find(fingerprints, value("fingerprint")) == fingerprints.end()) {
    throw StateError(concat(where, "a state of another model: found the state of the model ",
                            in_quotes(value("fingerprint")), ", expected that of the model ",
                            in_quotes(fingerprints.front()), ". Load the model that saved it (--model)"));
  }
}

}  // namespace

StateFile StateFile::open(const std::filesystem::path& path, const std::vector<std::string>& fingerprints) {
  // Before all of it is read into memory: it might be a model's weights.
  check_kind(SafetensorsFile::open(path)->metadata(), fingerprints, concat(path.string(), ": "));
  return check(SafetensorsFile::read(path), fingerprints);
}

StateFile StateFile::check(std::shared_ptr<const SafetensorsFile> file, const std::vector<std::string>& fingerprints) {
  StateFile result;
  result.file = std::move(file);
  const std::string where = concat(result.file->path().string(), ": ");
  const auto& metadata = result.file->metadata();
  check_kind(metadata, fingerprints, where);
  const auto value = [&](const char* key) -> const std::string& { return value_in(metadata, key, where); };
  const std::string& version = value("format_version");
  const bool first_version = version == kFirstVersion;
  for (const char* key : {"num_tokens", "checksum"}) value(key);
  if (metadata.size() != 5) throw FormatError(concat(where, "found unknown keys in the metadata"));

  std::string_view rest = value("num_tokens");
  while (true) {
    const auto comma = rest.find(',');
    const auto count = parse_decimal(rest.substr(0, comma));
    if (!count || *count > kMaxTokens) {
      throw FormatError(concat(where, "num_tokens: found ", in_quotes(value("num_tokens")),
                               ", expected integers from 0 to 2^53, separated by commas"));
    }
    result.states.push_back({*count, {}});
    if (comma == rest.npos) break;
    rest.remove_prefix(comma + 1);
  }

  for (const auto& [name, tensor] : result.file->tensors()) {
    // sequences.{b}.{the tensor's name in the state}
    std::string_view text = name;
    const bool prefixed = text.starts_with(kSequences);
    if (prefixed) text.remove_prefix(kSequences.size());
    const auto dot = text.find('.');
    const auto b = parse_decimal(text.substr(0, dot));
    if (!prefixed || dot == text.npos || dot + 1 == text.size() || !b ||
        static_cast<std::uint64_t>(*b) >= result.states.size()) {
      throw FormatError(concat(where, "found the tensor ", in_quotes(name), ", expected sequences.{0 to ",
                               result.states.size() - 1, "}.{name}"));
    }
    const bool of_a_layer = text.substr(dot + 1).starts_with(kLayers);
    if ((first_version && text.find(kPending) != text.npos) || (version != kFormatVersion && !of_a_layer)) {
      throw FormatError(concat(where, "found the tensor ", in_quotes(name), ", expected none such in format_version ",
                               in_quotes(version)));
    }
    result.states[static_cast<std::size_t>(*b)].tensors.push_back({std::string(text.substr(dot + 1)), tensor});
  }
  for (SavedState& state : result.states) sort_tensors(state);
  const auto checksum_of = version == kFormatVersion ? checksum<Crc32c> : checksum<Fnv1a>;
  if (const std::string found = checksum_of(result.states); found != value("checksum")) {
    throw FormatError(concat(where, "found data with the checksum ", found, ", expected ", in_quotes(value("checksum")),
                             " (damaged file)"));
  }
  return result;
}

}  // namespace based::io
