#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "based/tensor.h"

namespace based::io {

/// A safetensors file, memory-mapped and checked whole at the door: header ≤ 100 MB of UTF-8 JSON without duplicate
/// names, known dtypes, sizes equal to offsets, data without overlap, hole or trailing byte. Immutable; any thread.
class SafetensorsFile {
 public:
  /// Throws IoError (cannot be read) or FormatError (path, what was found, what was expected).
  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::filesystem::path& path() const;

  /// Views into the mapping: valid while this lives, possibly misaligned.
  const std::map<std::string, TensorView>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;

  /// Drops a tensor's pages from this process's resident memory; reading it again costs page faults.
  void release(const TensorView& tensor) const;

 private:
  class Impl;
  explicit SafetensorsFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// The weights of a model directory: model.safetensors, or the shards of model.safetensors.index.json.
class WeightFiles {
 public:
  /// Throws IoError or FormatError: neither or both present, a shard missing, a tensor in another shard than the index
  /// says, in two, or in none; a shard name that leaves the directory.
  static WeightFiles open(const std::filesystem::path& directory);

  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  void release(const std::string& name) const;

 private:
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> owner_;
  std::map<std::string, TensorView> tensors_;
};

struct TensorToWrite {
  std::string name;
  TensorView tensor;
};

/// Writes a file with these tensors in this order (data aligned to 64 bytes by header padding), into a temporary file
/// of the same folder, fsync, rename. Throws InvalidArgument on a duplicate name; IoError leaves no trace and an older
/// file untouched.
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace based::io
