#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace based::io {

/// A regular file, open for reading by read(): what a process that shrinks it takes away is an error here, not a
/// signal.
class InputFile {
 public:
  /// Throws IoError.
  explicit InputFile(std::filesystem::path path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// When it was opened.
  std::size_t size() const { return size_; }
  int descriptor() const { return fd_; }

  /// Reads out.size() bytes from byte `offset`. Any thread. Throws IoError, and FormatError when the file has become
  /// shorter.
  void read(std::size_t offset, std::span<std::byte> out) const;

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  std::size_t size_ = 0;
};

/// A regular file, memory-mapped for reading. It may be renamed or deleted while mapped, but must not be truncated or
/// overwritten in place: reading a page that is gone kills the process (SIGBUS), as for every mapped file. AtomicFile
/// never does that.
class MappedFile {
 public:
  /// Throws IoError.
  explicit MappedFile(const InputFile& file);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;  // null for an empty file
  std::size_t size_ = 0;
};

/// Bytes of what is read and parsed as a whole: headers, configs, indexes. Far above real ones, so that a damaged or
/// hostile file costs little time and memory. The environment variable BASED_PARSE_LIMIT, an integer from 1 to 1000,
/// multiplies every limit. Throws InvalidArgument when it is something else.
std::size_t parse_limit(std::size_t real_limit);

/// How a message tells of that variable.
inline constexpr const char* kRaiseLimit = " (the environment variable BASED_PARSE_LIMIT=N allows N times as much)";

/// Contents of a file. Throws IoError, and FormatError when it has more than `limit` bytes.
std::string read_file(const std::filesystem::path& path, std::size_t limit);

/// Lets two files or directories of one filesystem change names, with no moment at which one of them is missing. False
/// where the system or the filesystem cannot. Throws IoError.
bool exchange_paths(const std::filesystem::path& a, const std::filesystem::path& b);

/// A file that appears whole or not at all: written without a name where the filesystem has that (O_TMPFILE), so that a
/// process that is killed leaves nothing; elsewhere under another name in the same folder, where the next file that is
/// written removes what killed processes of this machine have left. At the end it is renamed. A symbolic link stays:
/// what it leads to is written. A file that exists keeps its permissions, and its owner and group where this process
/// may give files to them; a new file has the permissions that the umask leaves.
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
  std::filesystem::path path_;       // behind all links
  std::filesystem::path temporary_;  // empty while the file has no name
  int fd_ = -1;
};

}  // namespace based::io
