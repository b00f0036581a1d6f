#include "cuda_error.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>

#include "based/error.h"

namespace based::cuda {

namespace {

// The operations that this thread enqueued last, the newest at `next` − 1.
struct Recent {
  std::array<const char*, 4> names{};
  std::size_t next = 0;
};
thread_local Recent recent;

// The first failure kept. `any` is read without the lock: most calls find nothing.
struct Kept {
  std::atomic<bool> any = false;
  std::mutex mutex;
  cudaError_t status = cudaSuccess;
  const char* doing = nullptr;
};
Kept& kept() {
  static auto& all = *new Kept;  // never destroyed: memory may be freed after static objects are
  return all;
}

bool waits_for_each() {
  static const bool on = [] {
    const char* value = std::getenv("BASED_CUDA_SYNC");
    return value != nullptr && std::string(value) == "1";
  }();
  return on;
}

std::string recent_names() {
  std::string names;
  for (std::size_t i = 1; i <= recent.names.size() && i <= recent.next; ++i)
    names += (names.empty() ? "" : ", ") + std::string(recent.names[(recent.next - i) % recent.names.size()]);
  return names;
}

}  // namespace

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky ends here
  std::string message = std::string(doing) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ", " +
                        cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  if (const std::string names = recent_names(); !names.empty())
    message += "; operations enqueued before, the last one first: " + names;
  if (!waits_for_each()) message += " (BASED_CUDA_SYNC=1 waits for each operation, so that the message names the one)";
  throw DeviceError(message);
}

void keep_failure(cudaError_t status, const char* doing) noexcept {
  // At the end of the process the driver may be gone, and everything on the device with it.
  if (status == cudaSuccess || status == cudaErrorCudartUnloading) return;
  cudaGetLastError();
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  if (all.any) return;
  all.status = status;
  all.doing = doing;
  all.any = true;
}

void report_failures() {
  Kept& all = kept();
  if (!all.any) return;
  cudaError_t status;
  const char* doing;
  {
    const std::lock_guard lock(all.mutex);
    status = std::exchange(all.status, cudaSuccess);
    doing = all.doing;
    all.any = false;
  }
  if (status == cudaSuccess) return;  // another thread reports it
  throw DeviceError(std::string("an earlier call failed, whose caller could not be told: ") + doing + ": CUDA error " +
                    std::to_string(static_cast<int>(status)) + ", " + cudaGetErrorString(status));
}

void note_operation(const char* name, cudaStream_t stream) {
  recent.names[recent.next++ % recent.names.size()] = name;
  if (!waits_for_each()) return;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), name);
  if (capturing == cudaStreamCaptureStatusNone) check(cudaStreamSynchronize(stream), name);
}

}  // namespace based::cuda
