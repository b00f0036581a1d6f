#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kernels.h"
#include "stream.h"

namespace based::cuda {

/// Tokens of a segment of a sequence that has `length` tokens in the batch: a multiple of kTileTokens; the last segment
/// may be shorter. A function of the length alone, for the order of sums follows from it.
int segment_tokens(std::int64_t length);

/// Copies small arrays to the device, in the order of `stream`, from page-locked memory of its own: `host` may change
/// when copy() has returned. One thread at a time.
class StagedCopies {
 public:
  explicit StagedCopies(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {}

  /// Waits only when kStages copies are still under way.
  void copy(void* device, const void* host, std::size_t nbytes, const char* doing);

 private:
  struct Stage {
    std::shared_ptr<void> memory;
    std::size_t nbytes = 0;
    Event copied;
  };
  static constexpr std::size_t kStages = 8;

  std::shared_ptr<Stream> stream_;
  std::array<Stage, kStages> stages_;
  std::size_t next_stage_ = 0;
};

/// Copies batches to the device, at an address that changes only when a batch is larger than all before. What a batch
/// of single tokens occupies depends on its number of rows alone, so that a recorded step finds every later batch where
/// it found its own. One thread at a time; the work is in the order of `stream`.
class BatchUpload {
 public:
  explicit BatchUpload(std::shared_ptr<Stream> stream) : stream_(std::move(stream)), staged_(stream_) {}

  DeviceBatch upload(const backend::RaggedBatch& batch);

  /// Counts the changes of address.
  std::uint64_t generation() const { return generation_; }

 private:
  std::shared_ptr<Stream> stream_;
  StagedCopies staged_;
  std::shared_ptr<void> device_;
  std::size_t device_nbytes_ = 0;
  std::uint64_t generation_ = 0;
};

}  // namespace based::cuda
