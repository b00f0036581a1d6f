#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>

#include "backend/backend.h"

namespace based::cuda {

/// Makes `device` the calling thread's current one, and puts back the one that was: the thread's is not ours to change.
class UseDevice {
 public:
  explicit UseDevice(int device);
  ~UseDevice();
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// A stream of one device, and memory in its order. Kept alive by what was allocated on it.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  explicit Stream(int device);

  /// Another owner's stream, which outlives this object and what was allocated on it.
  Stream(int device, cudaStream_t borrowed) : device_(device), stream_(borrowed), owned_(false) {}
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  int device() const { return device_; }

  /// Usable by operations on this stream, and by others when it is synchronised; freed in its order. Throws
  /// OutOfMemory with the bytes needed and free.
  std::shared_ptr<void> allocate(std::size_t nbytes);

  void synchronize(const char* doing) const;

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  bool owned_ = true;
};

/// Held while a step is recorded. What waits for a whole device, as taking and freeing page-locked memory and library
/// handles does, would break the record, from any thread, and holds it too.
std::recursive_mutex& recording_mutex();

/// Waits for all streams of the current device.
void synchronize_device(const char* doing);

/// Gives memory that no allocation uses back to the device.
void trim_memory(int device);

/// Page-locked host memory.
std::shared_ptr<void> allocate_pinned(std::size_t nbytes);

/// A point in a stream's work.
class Event {
 public:
  Event() = default;
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  /// After what is enqueued on `stream`, which is of the current device, the same one each time.
  void record(cudaStream_t stream, const char* doing);

  /// Until the point last recorded is reached; at once when there is none.
  void wait(const char* doing) const;

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace based::cuda
