#include "io/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <system_error>
#include <utility>

#include "based/error.h"
#include "io/text.h"

namespace based::io {

namespace {

/// Closes a descriptor at the end of a scope.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

[[noreturn]] void fail(int error, const char* action, const std::filesystem::path& path) {
  throw IoError(error, concat("cannot ", action, " ", path.string()));
}

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

// The path that opening `path` for writing leads to, whether it exists or not. Links among its folders may stay: a
// rename follows those.
std::filesystem::path follow_links(const std::filesystem::path& path) {
  std::filesystem::path found = path;
  for (int links = 0; links < 40; ++links) {  // as many as Linux follows
    struct stat info;
    if (::lstat(found.c_str(), &info) != 0 || !S_ISLNK(info.st_mode)) return found;
    std::error_code error;
    const auto target = std::filesystem::read_symlink(found, error);
    if (error) fail(error.value(), "read the link", found);
    found = folder_of(found) / target;
  }
  fail(ELOOP, "write", path);
}

// Gives a new file the owner, group and permissions of the one that it will replace. Only a privileged process may give
// files away, and some filesystems have no permissions to change: the new file is then as this process makes files
// there. What the old group may do is not handed to another group.
void keep_permissions(int fd, const struct stat& old) {
  const bool same_group = ::fchown(fd, old.st_uid, old.st_gid) == 0 || ::fchown(fd, ::geteuid(), old.st_gid) == 0;
  static_cast<void>(::fchmod(fd, old.st_mode & (same_group ? 0777 : 0707)) == 0);
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a pipe must not wait for its writer.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(errno, "open", path);
  struct stat info;
  if (::fstat(file.fd, &info) != 0) fail(errno, "read", path);
  if (S_ISDIR(info.st_mode)) fail(EISDIR, "read", path);
  if (!S_ISREG(info.st_mode)) fail(EINVAL, "read (not a regular file)", path);
  size_ = static_cast<std::size_t>(info.st_size);
  if (size_ == 0) return;
  void* const data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) fail(errno, "map", path);
  ::madvise(data, size_, MADV_SEQUENTIAL);  // a hint: readahead from a cold disk
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(std::span<const std::byte> part) const {
  // Elsewhere the pages might be the only copy of their data.
  const auto offset = reinterpret_cast<std::uintptr_t>(part.data()) - reinterpret_cast<std::uintptr_t>(data_);
  if (offset > size_ || part.size() > size_ - offset) throw InvalidArgument("found memory outside the mapped file");
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(part.data()) + page - 1) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(part.data() + part.size()) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

std::string read_file(const std::filesystem::path& path, std::size_t limit) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  if (bytes.size() > limit) {
    throw FormatError(concat(path.string(), ": found ", bytes.size(), " bytes, expected at most ", limit));
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(follow_links(path)) {
  struct stat old;
  const bool exists = ::stat(path_.c_str(), &old) == 0;
  // A rename would put a file in the place of /dev/null as gladly as of a file.
  if (exists && !S_ISREG(old.st_mode))
    fail(S_ISDIR(old.st_mode) ? EISDIR : EINVAL, "replace (not a regular file)", path_);
  const mode_t mode = exists ? old.st_mode & 0777 : 0666;
  static std::atomic<unsigned> counter{0};
  for (int attempt = 0; attempt < 100; ++attempt) {
    // Not made from the file's name: that may already have the longest length allowed.
    temporary_ = folder_of(path_) / concat(".based-", ::getpid(), "-", counter++, ".tmp");
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd_ >= 0 || errno != EEXIST) break;
  }
  if (fd_ < 0) fail(errno, "create a temporary file for", path_);
  if (exists) keep_permissions(fd_, old);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    ::unlink(temporary_.c_str());
  }
}

void AtomicFile::write(const void* data, std::size_t nbytes) {
  const char* next = static_cast<const char*>(data);
  while (nbytes > 0) {
    const ssize_t n = ::write(fd_, next, nbytes);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(n < 0 ? errno : EIO, "write", path_);
    next += n;
    nbytes -= static_cast<std::size_t>(n);
  }
}

void AtomicFile::commit() {
  const Descriptor folder{::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (folder.fd < 0) fail(errno, "open the folder of", path_);
  if (::fsync(fd_) != 0) fail(errno, "write", path_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(errno, "replace", path_);
  ::close(std::exchange(fd_, -1));
  // Some filesystems have no fsync of a folder; then the rename is as durable as it gets.
  if (::fsync(folder.fd) != 0 && errno != EINVAL && errno != ENOTSUP) fail(errno, "sync the folder of", path_);
}

}  // namespace based::io
