#include <cerrno>
#include <string_view>
#include <utility>

#include "based/error.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "io/text.h"

namespace based::io {

namespace {

constexpr std::size_t kMaxIndex = std::size_t{16} << 20;  // of 685 billion parameters: 9 MB

/// Names no other folder: a plain file name.
bool is_plain_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
}

/// tensor → shard file name.
std::map<std::string, std::string> read_index(const std::filesystem::path& path) {
  const std::string where = path.string();
  const Json root = Json::parse(read_file(path, parse_limit(kMaxIndex)), where);
  JsonObject index(root, where, "");
  if (const Json* metadata = index.find("metadata"))
    JsonObject(*metadata, where, "metadata");  // an object; no use for it
  const Json& weight_map = index.get("weight_map", "an object");
  index.finish();

  std::map<std::string, std::string> shard_of;
  JsonObject object(weight_map, where, "weight_map");
  for (const Json::Member& member : *weight_map.as_object()) {
    const std::string& shard = object.string(member.key);
    if (!is_plain_name(shard)) object.fail(member.key, in_quotes(shard), "the name of a file in the same folder");
    shard_of.emplace(member.key, shard);
  }
  return shard_of;
}

}  // namespace

WeightFiles WeightFiles::open(const std::filesystem::path& directory) {
  const auto single = directory / "model.safetensors";
  const auto index = directory / "model.safetensors.index.json";
  std::error_code unreadable;  // opening it will say why
  const bool has_single = std::filesystem::exists(single, unreadable);
  const bool has_index = std::filesystem::exists(index, unreadable);
  if (has_single && has_index) {
    throw FormatError(directory.string() +
                      ": found both model.safetensors and model.safetensors.index.json, expected one");
  }

  WeightFiles weights;
  if (!has_index) {
    const auto file = SafetensorsFile::open(single);
    weights.files_ = {file};
    weights.tensors_ = file->tensors();
    for (const auto& [name, _] : weights.tensors_) weights.owner_.emplace(name, file);
    return weights;
  }

  const auto shard_of = read_index(index);
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> shards;
  for (const auto& [_, shard] : shard_of) {
    if (shards.contains(shard)) continue;
    const auto file = SafetensorsFile::open(directory / shard);
    shards.emplace(shard, file);
    weights.files_.push_back(file);
    for (const auto& [name, tensor] : file->tensors()) {
      const auto listed = shard_of.find(name);
      if (listed == shard_of.end() || listed->second != shard) {
        throw FormatError(concat(file->path().string(), ": found the tensor ", in_quotes(name), ", expected it in ",
                                 listed == shard_of.end() ? "no shard" : in_quotes(listed->second),
                                 ", as the index says"));
      }
      weights.tensors_.emplace(name, tensor);
      weights.owner_.emplace(name, file);
    }
  }
  for (const auto& [name, shard] : shard_of) {
    if (!weights.tensors_.contains(name)) {
      throw FormatError(concat((directory / shard).string(), ": found no tensor ", in_quotes(name),
                               ", expected it, as the index says"));
    }
  }
  return weights;
}

void WeightFiles::read(const std::string& name, std::size_t offset, std::span<std::byte> out) const {
  owner_.at(name)->read(tensors_.at(name), offset, out);
}

}  // namespace based::io
