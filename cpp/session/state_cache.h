#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "based/model.h"
#include "based/state.h"
#include "based/state_cache.h"

namespace based {

/// States by the tokens that led to them: a radix tree, with a state at any token. Evicts by what a state saves; copies
/// to the host and to files on a thread of its own (docs/state-cache.md). Any thread; a call waits for another one only
/// where both change the tree, never for a copy or a file of another one.
class StateCache {
 public:
  /// Throws InvalidArgument for options that contradict each other, IoError for a folder that cannot be used.
  StateCache(std::shared_ptr<const Model> model, const StateCacheOptions& options);
  /// What waits to be written is not: call flush() before.
  ~StateCache();
  StateCache(const StateCache&) = delete;
  StateCache& operator=(const StateCache&) = delete;

  bool enabled() const { return options_.device_nbytes > 0; }
  const StateCacheOptions& options() const { return options_; }

  struct Match {
    std::int64_t num_tokens = 0;         // of the state; 0: none
    std::shared_ptr<const State> state;  // counts all of its tokens as a prompt's
    CacheTier tier = CacheTier::device;

    /// Where `tokens` leave what the cache has seen, behind num_tokens: others have gone on from there, so a state is
    /// worth keeping there (insert). At most `most`; 0: nowhere.
    std::int64_t branch = 0;
  };

  /// The state after the longest prefix of at most `most` tokens that is worth taking: a state on the host or in a file
  /// must save min_host_tokens or min_file_tokens, and more time than reading it takes. It is copied or read here, and
  /// then is on the device, too. What cannot be read is no hit: never throws for want of memory or for a file.
  Match find(std::span<const std::int32_t> tokens, std::int64_t most);

  /// Keeps the state after these tokens. Evicts others, or keeps nothing, for want of room: never throws for that. The
  /// caller answers for what a hit promises: to the bit, a state also depends on where its prompt was cut and on what
  /// was read by steps. `branch` may thus have to be rounded down. A model with a prefix (ModelConfig::prefix_tokens)
  /// must have read at least that many in its first call; states inside a prefix are left out here. Throws
  /// InvalidArgument when the state has seen another number of tokens, StateError when it is of another model.
  void insert(std::span<const std::int32_t> tokens, std::shared_ptr<const State> state);

  /// Seconds that the model takes for a token of a prompt, which decide what a file may take; 0: not known.
  void set_seconds_per_token(double seconds);

  /// Gives back states of the device until `nbytes` bytes are free or nothing is left; returns the bytes.
  std::size_t release(std::size_t nbytes);

  /// Forgets all states in memory. Files stay.
  void clear();

  /// Waits until what waits to be copied and written is, and writes now what waits for write_delay.
  void flush();

  StateCacheStats stats() const;

 private:
  class Impl;
  StateCacheOptions options_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
