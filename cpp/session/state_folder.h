#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "based/model.h"
#include "based/state.h"
#include "session/state_io.h"

namespace based {

/// State files by the tokens that led to them, shared with other processes (docs/state-cache.md has the layout). A
/// file's name is a hint: the tokens in it decide. Any thread; write() and scan() are for one thread at a time.
class StateFolder {
 public:
  /// Makes the folder. Throws IoError.
  StateFolder(const std::filesystem::path& folder, std::size_t max_nbytes, const Model& model);
  ~StateFolder();
  StateFolder(const StateFolder&) = delete;
  StateFolder& operator=(const StateFolder&) = delete;

  struct File {
    std::int64_t num_tokens;
    std::uint64_t hash;  // of the tokens
    std::size_t nbytes;
  };

  /// Files for prefixes of more than `least` tokens, the longest first.
  std::vector<File> find(std::span<const std::int32_t> tokens, std::int64_t least) const;

  /// The state after these tokens, which `file` was found for; null when it is gone, damaged or another one's: then it
  /// is not found again. Counts as a use of the file. Throws OutOfMemory, DeviceError.
  std::shared_ptr<const State> read(const File& file, std::span<const std::int32_t> tokens,
                                    const std::shared_ptr<const Model>& model);

  /// Whether reading the file takes less than so many seconds, by what reading others took.
  bool reads_within(const File& file, double seconds) const;

  /// Writes the state after these tokens, and deletes the files that were not used for longest, of all models, until
  /// the folder is within its limit. False: it does not fit, or another process holds the folder for seconds; also
  /// when `stop` becomes true. Throws IoError.
  bool write(std::span<const std::int32_t> tokens, const ExportedStates& state, const std::atomic<bool>& stop);

  /// Looks for what other processes have written and deleted, if the folder has changed.
  void scan();

  struct Stats {
    std::int64_t num_files = 0;  // of this model
    std::size_t nbytes = 0;      // of all models, when last counted
    std::int64_t num_evicted = 0, evicted_tokens = 0;
    std::int64_t num_refused = 0;
    std::string last_refusal;
  };
  Stats stats() const;

 private:
  using Key = std::pair<std::int64_t, std::uint64_t>;  // number of tokens, hash
  struct Version {                                     // of a file
    std::size_t nbytes = 0;
    std::int64_t time = 0;  // of its last change, ns
    friend bool operator==(const Version&, const Version&) = default;
  };
  class Lock;

  std::filesystem::path path_of(const Key& key) const;
  void refuse(const Key& key, const std::string& why);
  std::size_t make_room(std::size_t nbytes);

  const std::filesystem::path root_, folder_;  // of all models, of this one
  const std::size_t max_nbytes_;
  bool waited_in_vain_ = false;  // for the folder, at the last write

  mutable std::mutex mutex_;          // of what follows
  std::map<Key, std::size_t> files_;  // bytes
  std::map<Key, Version> refused_;    // as they were then
  std::int64_t scanned_ = -1;         // when the folder had changed last, ns
  double seconds_per_byte_ = 0.5e-9;  // of reading
  Stats stats_;
};

}  // namespace based
