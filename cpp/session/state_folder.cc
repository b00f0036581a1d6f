#include "session/state_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <optional>
#include <string_view>
#include <thread>

#include "based/error.h"
#include "io/text.h"
#include "model/model_impl.h"
#include "session/state_impl.h"

namespace based {

namespace {

constexpr std::string_view kExtension = ".safetensors";
constexpr std::size_t kHashDigits = 16;

// Of a growing prefix: 1 ns a token.
class PrefixHash {
 public:
  void add(std::int32_t token) {
    hash_ = std::rotl(hash_ ^ (static_cast<std::uint32_t>(token) * 0x9e3779b97f4a7c15u), 29) * 0xbf58476d1ce4e5b9u;
  }
  std::uint64_t value() const {
    std::uint64_t x = hash_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

 private:
  std::uint64_t hash_ = 0x243f6a8885a308d3u;
};

// "{num_tokens}-{hash, 16 hex digits}.safetensors".
std::string name_of(std::int64_t num_tokens, std::uint64_t hash) {
  std::string digits(kHashDigits, '0');
  for (std::size_t i = 0; i < kHashDigits; ++i)
    digits[kHashDigits - 1 - i] = "0123456789abcdef"[(hash >> (4 * i)) & 15];
  return io::concat(num_tokens, "-", digits, kExtension);
}

std::optional<std::pair<std::int64_t, std::uint64_t>> parse_name(std::string_view name) {
  if (!name.ends_with(kExtension)) return std::nullopt;
  const std::string_view stem = name.substr(0, name.size() - kExtension.size());
  const std::size_t dash = stem.find('-');
  if (dash == stem.npos) return std::nullopt;
  std::int64_t num_tokens = 0;
  std::uint64_t hash = 0;
  std::from_chars(stem.data(), stem.data() + dash, num_tokens);
  std::from_chars(stem.data() + dash + 1, stem.data() + stem.size(), hash, 16);
  if (num_tokens < 1 || name_of(num_tokens, hash) != name) return std::nullopt;
  return std::pair(num_tokens, hash);
}

std::int64_t nanoseconds(const timespec& time) { return std::int64_t{1'000'000'000} * time.tv_sec + time.tv_nsec; }

// Results are equal to the bit where the kernels, the dtype that they work in, and the cuts of prompts are.
std::string folder_name(const Model& model) {
  std::string name = io::concat(model.fingerprint(), "-", name_of(model.dtype()), "-", model.kernel_isa());
  const backend::Backend& device = model.impl().executors.device();
  if (!device.deterministic())
    name += "-fast";
  else if (device.cut_tokens() == device.piece_tokens())
    name += "-" + std::to_string(device.cut_tokens());
  return name;
}

// 0700 when it is new: states tell of the tokens that they have seen.
void make_folder(const std::filesystem::path& path) {
  if (::mkdir(path.c_str(), 0700) == 0) return;
  const int error = errno;
  struct stat info;
  if (error == EEXIST && ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return;
  throw IoError(error == EEXIST ? ENOTDIR : error, "cannot make the folder " + path.string());
}

}  // namespace

// Of the whole folder, between processes and threads; ends with the process that holds it.
class StateFolder::Lock {
 public:
  explicit Lock(const std::filesystem::path& root) {
    const auto path = root / ".lock";
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) throw IoError(errno, "cannot open " + path.string());
  }
  ~Lock() {
    ::flock(fd_, LOCK_UN);  // not left to close(): a forked child may have the descriptor, too
    ::close(fd_);
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

  // Tries 100 times a second.
  bool take(int tries, const std::atomic<bool>& stop) {
    for (int i = 0; i < tries && !stop; ++i) {
      if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) return true;
      if (errno != EWOULDBLOCK && errno != EINTR) throw IoError(errno, "cannot lock the folder of states");
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }

 private:
  int fd_;
};

StateFolder::StateFolder(const std::filesystem::path& folder, std::size_t max_nbytes, const Model& model)
    : root_(folder), folder_(folder / folder_name(model)), max_nbytes_(max_nbytes) {
  if (root_.has_parent_path()) {
    std::error_code error;
    std::filesystem::create_directories(root_.parent_path(), error);
    if (error) throw IoError(error.value(), "cannot make the folder " + root_.parent_path().string());
  }
  make_folder(root_);
  make_folder(folder_);
  if (::access(folder_.c_str(), R_OK | W_OK | X_OK) != 0)
    throw IoError(errno, "cannot read and write the folder " + folder_.string());
  scan();
}

StateFolder::~StateFolder() = default;

std::filesystem::path StateFolder::path_of(const Key& key) const { return folder_ / name_of(key.first, key.second); }

std::vector<StateFolder::File> StateFolder::find(std::span<const std::int32_t> tokens, std::int64_t least) const {
  std::vector<File> found;
  const std::lock_guard lock(mutex_);
  PrefixHash hash;
  std::size_t hashed = 0;
  for (auto it = files_.upper_bound({least, ~std::uint64_t{0}}); it != files_.end();) {
    const std::int64_t num_tokens = it->first.first;
    if (static_cast<std::size_t>(num_tokens) > tokens.size()) break;
    for (; hashed < static_cast<std::size_t>(num_tokens); ++hashed) hash.add(tokens[hashed]);
    if (const auto file = files_.find({num_tokens, hash.value()}); file != files_.end())
      found.push_back({num_tokens, hash.value(), file->second});
    it = files_.upper_bound({num_tokens, ~std::uint64_t{0}});
  }
  std::ranges::reverse(found);
  return found;
}

bool StateFolder::reads_within(const File& file, double seconds) const {
  const std::lock_guard lock(mutex_);
  return static_cast<double>(file.nbytes) * seconds_per_byte_ < seconds;
}

void StateFolder::refuse(const Key& key, const std::string& why) {
  struct stat info;
  const bool exists = ::stat(path_of(key).c_str(), &info) == 0;
  const std::lock_guard lock(mutex_);
  files_.erase(key);
  if (!exists) return;
  refused_[key] = {static_cast<std::size_t>(info.st_size), nanoseconds(info.st_mtim)};
  ++stats_.num_refused;
  stats_.last_refusal = why;
}

std::shared_ptr<const State> StateFolder::read(const File& file, std::span<const std::int32_t> tokens,
                                               const std::shared_ptr<const Model>& model) {
  const Key key{file.num_tokens, file.hash};
  const auto path = path_of(key);
  const auto begin = std::chrono::steady_clock::now();
  try {
    const StateFileReader reader(path, *model);
    if (reader.num_sequences() != 1 || !reader.has_tokens(0, tokens)) {
      refuse(key, path.string() + ": holds the state after other tokens than its name says");
      return nullptr;
    }
    const auto lease = model->impl().executors.lease();
    backend::Backend& backend = lease->backend();
    auto impl = std::make_unique<State::Impl>();
    impl->states = backend.make_states(model->config(), model->dtype(), 1);
    impl->progress = reader.read(0, backend, *impl->states, 0);
    backend.synchronize();
    if (!impl->progress.last.rows.data) {
      refuse(key, path.string() + ": lacks last_hidden, without which no token can follow");
      return nullptr;
    }
    impl->model = model;
    ::utimensat(AT_FDCWD, path.c_str(), nullptr, 0);  // used now; a folder that cannot be written stays as it is
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const std::lock_guard lock(mutex_);
    seconds_per_byte_ += (seconds / static_cast<double>(file.nbytes) - seconds_per_byte_) / 4;
    return std::make_shared<State>(std::move(impl));
  } catch (const DeviceError&) {
    throw;
  } catch (const Error& error) {  // its format, another model
    refuse(key, error.what());
  } catch (const InvalidArgument& error) {  // more tokens than max_context
    refuse(key, error.what());
  } catch (const IoError& error) {
    refuse(key, error.what());
  }
  return nullptr;
}

// Deletes files until `nbytes` more fit, or none is left; returns the bytes of those that stay.
std::size_t StateFolder::make_room(std::size_t nbytes) {
  struct Entry {
    std::int64_t used;
    std::size_t nbytes;
    std::int64_t num_tokens;
    std::filesystem::path path;
  };
  std::vector<Entry> entries;
  std::size_t total = 0;
  std::error_code ignored;
  for (const auto& model : std::filesystem::directory_iterator(root_, ignored)) {
    if (!model.is_directory(ignored)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(model.path(), ignored)) {
      const auto name = parse_name(entry.path().filename().string());
      struct stat info;
      if (!name || ::lstat(entry.path().c_str(), &info) != 0 || !S_ISREG(info.st_mode)) continue;
      entries.push_back({nanoseconds(info.st_mtim), static_cast<std::size_t>(info.st_size), name->first, entry.path()});
      total += entries.back().nbytes;
    }
  }
  std::ranges::sort(entries, {}, &Entry::used);
  for (const Entry& entry : entries) {
    if (total + nbytes <= max_nbytes_) break;
    const bool deleted = ::unlink(entry.path.c_str()) == 0;
    if (!deleted && errno != ENOENT) continue;
    total -= entry.nbytes;
    const std::lock_guard lock(mutex_);
    if (deleted) {
      ++stats_.num_evicted;
      stats_.evicted_tokens += entry.num_tokens;
    }
    if (entry.path.parent_path() == folder_) files_.erase(*parse_name(entry.path.filename().string()));
  }
  return total;
}

bool StateFolder::write(std::span<const std::int32_t> tokens, const ExportedStates& state,
                        const std::atomic<bool>& stop) {
  const std::size_t most = state.file_nbytes();
  if (most > max_nbytes_) return false;
  PrefixHash hash;
  for (const std::int32_t token : tokens) hash.add(token);
  const Key key{static_cast<std::int64_t>(tokens.size()), hash.value()};
  const auto path = path_of(key);
  std::size_t total;
  struct stat info;
  {
    make_folder(root_);
    make_folder(folder_);
    Lock lock(root_);
    constexpr int kPatience = 500;  // once: who still holds it then may be a process that stands still
    const bool taken = lock.take(waited_in_vain_ ? 1 : kPatience, stop);
    waited_in_vain_ = !taken;
    if (!taken) return false;
    total = make_room(most);
    if (total + most > max_nbytes_) return false;
    if (::lstat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode))
      throw IoError(EEXIST, "cannot write " + path.string() + ": it is not a regular file");
    state.write(path);
    if (::stat(path.c_str(), &info) != 0) throw IoError(errno, "cannot read " + path.string());
  }
  const std::lock_guard lock(mutex_);
  files_[key] = static_cast<std::size_t>(info.st_size);
  refused_.erase(key);
  stats_.nbytes = total + static_cast<std::size_t>(info.st_size);
  return true;
}

void StateFolder::scan() {
  struct stat info;
  if (::stat(folder_.c_str(), &info) != 0) {  // somebody deleted it
    const std::lock_guard lock(mutex_);
    files_.clear();
    scanned_ = -1;
    return;
  }
  const std::int64_t changed = nanoseconds(info.st_mtim);
  {
    const std::lock_guard lock(mutex_);
    // A clock of file times may stand still for some milliseconds.
    timespec now;
    ::clock_gettime(CLOCK_REALTIME, &now);
    if (changed == scanned_ && nanoseconds(now) - changed > 2'000'000'000) return;
  }
  std::map<Key, std::size_t> found;
  std::map<Key, Version> versions;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
    const auto key = parse_name(entry.path().filename().string());
    if (!key || ::lstat(entry.path().c_str(), &info) != 0 || !S_ISREG(info.st_mode)) continue;
    const auto nbytes = static_cast<std::size_t>(info.st_size);
    if (nbytes == 0 || nbytes > max_nbytes_) continue;
    found[*key] = nbytes;
    versions[*key] = {nbytes, nanoseconds(info.st_mtim)};
  }
  if (error) return;
  const std::lock_guard lock(mutex_);
  for (auto it = refused_.begin(); it != refused_.end();) {
    const auto version = versions.find(it->first);
    if (version != versions.end() && version->second == it->second) {
      found.erase((it++)->first);
    } else {
      it = refused_.erase(it);
    }
  }
  std::size_t nbytes = 0;
  for (const auto& [key, version] : versions) nbytes += version.nbytes;
  files_ = std::move(found);
  if (scanned_ < 0 || stats_.nbytes < nbytes) stats_.nbytes = nbytes;
  scanned_ = changed;
}

StateFolder::Stats StateFolder::stats() const {
  const std::lock_guard lock(mutex_);
  Stats stats = stats_;
  stats.num_files = static_cast<std::int64_t>(files_.size());
  return stats;
}

}  // namespace based
