#include "io/file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <system_error>
#include <utility>

#include "based/error.h"
#include "io/hash.h"
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

// Names of temporary files: ".based-HOST-PID-N.tmp". Not made from the file's name: that may already have the longest
// length allowed. HOST is a hash of the machine's name: a process of another machine cannot be asked whether it lives.
constexpr std::string_view kTemporary = ".based-", kSuffix = ".tmp";

std::string host() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  Fnv1a hash;
  hash.add(std::string_view(name));
  return hash.hex().substr(0, 8);
}

std::filesystem::path temporary_name(const std::filesystem::path& folder) {
  static std::atomic<unsigned> counter{0};
  return folder / concat(kTemporary, host(), "-", ::getpid(), "-", counter++, kSuffix);
}

// What processes of this machine have left that were killed while they wrote.
void remove_leftovers(const std::filesystem::path& folder) {
  const std::string prefix = concat(kTemporary, host(), "-");
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || !name.ends_with(kSuffix)) continue;
    pid_t owner = 0;
    const char* const digits = name.data() + prefix.size();
    if (std::from_chars(digits, name.data() + name.size(), owner).ec != std::errc() || owner <= 0) continue;
    if (::kill(owner, 0) != 0 && errno == ESRCH) ::unlink(entry.path().c_str());
  }
}

std::string path_of(int fd) { return concat("/proc/self/fd/", fd); }

// A new file of this folder without a name, which path_of() can be linked from; -1 where there is no such thing.
int open_unnamed(const std::filesystem::path& folder, mode_t mode) {
#if defined(O_TMPFILE)
  const int fd = ::open(folder.c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, mode);
  if (fd >= 0 && ::access(path_of(fd).c_str(), F_OK) == 0) return fd;
  if (fd >= 0) ::close(fd);
#else
  static_cast<void>(folder);
  static_cast<void>(mode);
#endif
  return -1;
}

}  // namespace

InputFile::InputFile(std::filesystem::path path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe must not wait for its writer.
  Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(errno, "open", path_);
  struct stat info;
  if (::fstat(file.fd, &info) != 0) fail(errno, "read", path_);
  if (S_ISDIR(info.st_mode)) fail(EISDIR, "read", path_);
  if (!S_ISREG(info.st_mode)) fail(EINVAL, "read (not a regular file)", path_);
  size_ = static_cast<std::size_t>(info.st_size);
  fd_ = std::exchange(file.fd, -1);
}

InputFile::~InputFile() { ::close(fd_); }

void InputFile::read(std::size_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t n = ::pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(errno, "read", path_);
    if (n == 0) {
      throw FormatError(concat(path_.string(), ": found ", offset, " bytes, expected the ", size_,
                               " that it had when it was opened: another program shortened it meanwhile"));
    }
    out = out.subspan(static_cast<std::size_t>(n));
    offset += static_cast<std::size_t>(n);
  }
}

MappedFile::MappedFile(const InputFile& file) : size_(file.size()) {
  if (size_ == 0) return;
  void* const data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  if (data == MAP_FAILED) fail(errno, "map", file.path());
  ::madvise(data, size_, MADV_SEQUENTIAL);  // a hint: readahead from a cold disk
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

std::size_t parse_limit(std::size_t real_limit) {
  const char* const text = std::getenv("BASED_PARSE_LIMIT");
  if (text == nullptr) return real_limit;
  std::size_t factor = 0;
  const std::string_view digits = text;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), factor);
  if (error != std::errc() || end != digits.data() + digits.size() || factor < 1 || factor > 1000) {
    throw InvalidArgument(concat("the environment variable BASED_PARSE_LIMIT: found ", in_quotes(digits),
                                 ", expected an integer from 1 to 1000"));
  }
  return real_limit * factor;
}

std::string read_file(const std::filesystem::path& path, std::size_t limit) {
  const InputFile file(path);
  if (file.size() > limit) {
    throw FormatError(concat(path.string(), ": found ", file.size(), " bytes, expected at most ", limit, kRaiseLimit));
  }
  std::string text(file.size(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

bool exchange_paths(const std::filesystem::path& a, const std::filesystem::path& b) {
#if defined(__linux__) && defined(SYS_renameat2)
  constexpr unsigned kExchange = 1u << 1;  // RENAME_EXCHANGE of <linux/fs.h>
  if (::syscall(SYS_renameat2, AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), kExchange) == 0) return true;
  // EINVAL: this filesystem cannot. EPERM: a sandbox forbids a call that it does not know.
  if (errno != ENOSYS && errno != EINVAL && errno != EOPNOTSUPP && errno != EPERM) fail(errno, "exchange", a);
#else
  static_cast<void>(a);
  static_cast<void>(b);
#endif
  return false;
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(follow_links(path)) {
  struct stat old;
  const bool exists = ::stat(path_.c_str(), &old) == 0;
  // A rename would put a file in the place of /dev/null as gladly as of a file.
  if (exists && !S_ISREG(old.st_mode))
    fail(S_ISDIR(old.st_mode) ? EISDIR : EINVAL, "replace (not a regular file)", path_);
  const mode_t mode = exists ? old.st_mode & 0777 : 0666;
  fd_ = open_unnamed(folder_of(path_), mode);
  if (fd_ < 0) {
    remove_leftovers(folder_of(path_));
    for (int attempt = 0; attempt < 100; ++attempt) {
      temporary_ = temporary_name(folder_of(path_));
      fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
      if (fd_ >= 0 || errno != EEXIST) break;
    }
  }
  if (fd_ < 0) fail(errno, "create a temporary file for", path_);
  if (exists) keep_permissions(fd_, old);
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
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
  for (int attempt = 0; temporary_.empty(); ++attempt) {  // a link cannot replace a file, a rename can
    const auto name = temporary_name(folder_of(path_));
    if (::linkat(AT_FDCWD, path_of(fd_).c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0) {
      temporary_ = name;
    } else if (errno != EEXIST || attempt == 100) {
      fail(errno, "name the temporary file for", path_);
    }
  }
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(errno, "replace", path_);
  ::close(std::exchange(fd_, -1));
  // Some filesystems have no fsync of a folder; then the rename is as durable as it gets.
  if (::fsync(folder.fd) != 0 && errno != EINVAL && errno != ENOTSUP) fail(errno, "sync the folder of", path_);
}

}  // namespace based::io
