#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace based::io {

/// A regular file, memory-mapped for reading. It may be renamed or deleted while mapped, but must not be truncated or
/// overwritten in place: reading a page that is gone kills the process (SIGBUS), as for every mapped file. AtomicFile
/// never does that.
class MappedFile {
 public:
  /// Throws IoError.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

  /// Drops the whole pages inside `part` from resident memory. Throws InvalidArgument when it is no part of bytes().
  void release(std::span<const std::byte> part) const;

 private:
  const std::byte* data_ = nullptr;  // null for an empty file
  std::size_t size_ = 0;
};

/// Contents of a file. Throws IoError, and FormatError when it has more than `limit` bytes.
std::string read_file(const std::filesystem::path& path, std::size_t limit);

/// A file that appears whole or not at all: written under another name in the same folder, then renamed. A symbolic
/// link stays: what it leads to is written. A file that exists keeps its permissions, and its owner and group where
/// this process may give files to them; a new file has the permissions that the umask leaves.
class AtomicFile {
 public:
  /// Throws IoError.
  explicit AtomicFile(std::filesystem::path path);
  /// Without commit(): leaves no trace.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Throws IoError (disk full, …).
  void write(const void* data, std::size_t nbytes);

  /// fsync, rename over `path`, fsync of the folder. Throws IoError, the older file untouched; only when the last step
  /// fails is the new file already in place.
  void commit();

 private:
  std::filesystem::path path_;  // behind all links
  std::filesystem::path temporary_;
  int fd_ = -1;
};

}  // namespace based::io
