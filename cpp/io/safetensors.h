#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "based/tensor.h"

namespace based::io {

/// A safetensors file, checked whole at the door: header ≤ 16 MiB (see parse_limit) of UTF-8 JSON without duplicate
/// names, known dtypes, sizes equal to offsets, data without overlap, hole or trailing byte. Immutable; any thread.
class SafetensorsFile {
 public:
  /// Memory-maps the data: a process that touches them when another one has shortened the file is killed (SIGBUS).
  /// Throws IoError (cannot be read) or FormatError (path, what was found, what was expected).
  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);
  /// Reads all of it into memory: nothing that happens to the file later matters. Throws as open(), OutOfMemory.
  static std::shared_ptr<const SafetensorsFile> read(const std::filesystem::path& path);
  /// From the bytes of such a file, which are copied. Throws as open(); `where` opens the messages.
  static std::shared_ptr<const SafetensorsFile> parse(std::span<const std::byte> bytes, const std::string& where);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::filesystem::path& path() const;

  /// Views of the data: valid while this lives, possibly misaligned.
  const std::map<std::string, TensorView>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;

  /// Reads out.size() bytes from byte `offset` of one of tensors(), by read() and not through the mapping. Any thread.
  /// Throws IoError, and FormatError when the file has become shorter.
  void read(const TensorView& tensor, std::size_t offset, std::span<std::byte> out) const;

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
  /// As SafetensorsFile::read.
  void read(const std::string& name, std::size_t offset, std::span<std::byte> out) const;

 private:
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> owner_;
  std::map<std::string, TensorView> tensors_;
};

struct TensorToWrite {
  std::string name;
  TensorView tensor;
};

using BlockReader = std::function<void(std::size_t i, std::size_t offset, std::span<std::byte> out)>;

/// Writes a file with these tensors in this order (data aligned to 64 bytes by header padding), into a temporary file
/// of the same folder, fsync, rename. A tensor whose data is in no memory (null) comes from `read`: it is called in
/// order, and writes out.size() bytes of tensors[i] from byte `offset` on to `out`. Throws InvalidArgument on a
/// duplicate name; IoError, and what `read` throws, leave no trace and an older file untouched.
void write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                       const std::map<std::string, std::string>& metadata, const BlockReader& read = {});

}  // namespace based::io
