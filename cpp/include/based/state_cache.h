#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace based {

/// What a cache of states may take (docs/state-cache.md). Without bytes it keeps nothing.
struct StateCacheOptions {
  /// Memory of the model's device. The other tiers need some: what they hold goes through it.
  std::size_t device_nbytes = 0;

  /// Page-locked memory of the host, for the states of a GPU. A CPU's states are in that memory already: there it is
  /// refused.
  std::size_t host_nbytes = 0;

  /// Folder of state files, made if it is missing, and the most bytes that its files may have, those of other models
  /// and processes included. Neither or both.
  std::filesystem::path folder;
  std::size_t folder_nbytes = 0;

  /// Tokens between the states that are kept inside a long prompt: for the caller, who cuts prompts.
  std::int64_t interval = 256;

  /// Tokens that a branch must lie behind the state that was found, to be worth a state of its own.
  std::int64_t min_branch_tokens = 16;

  /// Tokens that must be saved for a state to be copied from the host, or read from a file.
  std::int64_t min_host_tokens = 64;
  std::int64_t min_file_tokens = 512;

  /// How long a state waits before it is written to a file. One that became an interior point of a longer path
  /// meanwhile is not written.
  std::chrono::milliseconds write_delay{1000};
};

enum class CacheTier : std::uint8_t { device, host, files };

/// Counts since the cache was made, and what it holds now.
struct StateCacheStats {
  struct Tier {
    std::int64_t num_states = 0;
    std::size_t nbytes = 0;
    std::size_t max_nbytes = 0;
    std::int64_t hit_tokens = 0;      // found there
    std::int64_t stored_tokens = 0;   // that its new states save, each from the nearest state before it on
    std::int64_t evicted_tokens = 0;  // the same of the states that it gave up
    std::int64_t num_evicted = 0;     // states; of files: those that this process deleted
  };
  Tier device, host, files;

  std::int64_t query_tokens = 0;  // that find() was asked for
  std::int64_t hit_tokens = 0;    // that it found, in all tiers

  std::int64_t num_not_stored = 0;     // states that found no room
  std::int64_t num_not_copied = 0;     // states that were not copied to the host or to a file: the queue was full
  std::int64_t num_failed_copies = 0;  // copies and files that failed
  std::int64_t num_refused_files = 0;  // files that are damaged, or hold something else than their name says
  std::string last_error;              // of the last failure or refusal
};

}  // namespace based
