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

/// A stream of one device, and memory in its order. Kept alive by what was allocated on it. Memory may be freed by any
/// thread at any time, while the stream is captured too: it is then freed by a later allocation, free, or
/// free_waiting() of any stream. A free that fails is reported by report_failures().
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  explicit Stream(int device);

  /// Another owner's stream, which outlives this object and what was allocated on it. While its owner captures it,
  /// what is allocated belongs to the graph, and is freed within it.
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

/// Held while a step is recorded. What waits for a whole device, as taking and freeing page-locked memory, graphs and
/// library handles does, would break the record, from any thread, and holds it too; so does what frees memory in the
/// order of a stream, for it would become a part of the record.
std::recursive_mutex& recording_mutex();

/// Frees what was let go while its stream was captured. Frees that still cannot be made wait on.
void free_waiting() noexcept;

/// Waits for all streams of the current device.
void synchronize_device(const char* doing);

/// For an allocation that failed, on the current device: waits for what other streams have freed, and gives back to the
/// device what no allocation uses.
void return_unused(int device, const char* doing);

/// Bytes of the current device.
struct DeviceMemory {
  std::size_t free = 0, total = 0;
};
DeviceMemory device_memory();

/// Throws OutOfMemory with the bytes needed and free, on the current device.
[[noreturn]] void throw_out_of_memory(int device, std::size_t nbytes);

/// While it lives, this thread may do what CUDA refuses to every thread when somebody captures a stream for all of
/// them: allocate, free, ask events. None of it is for the captured stream.
class OutsideCapture {
 public:
  OutsideCapture();
  ~OutsideCapture();
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Keeps `memory` of `device` until what others have enqueued that uses it is done. `on_legacy_stream`: all of that is
/// on the legacy default stream, and nothing is waited for; otherwise waits for the device. Where a capture forbids
/// that, the memory is kept until a later call of this, synchronize_device() or Stream::allocate() can do it.
void release_lent(int device, std::shared_ptr<void> memory, bool on_legacy_stream) noexcept;

/// Shared by those who use a device's memory: when the last one goes, memory that no allocation uses goes back to the
/// device. Until then it stays with the process, for allocating from the device takes a hundred times as long.
class MemoryReturn {
 public:
  explicit MemoryReturn(int device) : device_(device) {}
  ~MemoryReturn();
  MemoryReturn(const MemoryReturn&) = delete;
  MemoryReturn& operator=(const MemoryReturn&) = delete;

 private:
  int device_;
};

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

  /// The point last recorded is reached; true when there is none.
  bool reached(const char* doing) const;

  /// What is enqueued on `stream` from now on comes after the point last recorded, if there is one.
  void hold(cudaStream_t stream, const char* doing) const;

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace based::cuda
