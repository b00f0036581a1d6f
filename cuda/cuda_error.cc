#include "cuda_error.h"

#include <array>
#include <cstdlib>
#include <string>

#include "based/error.h"

namespace based::cuda {

namespace {

// The operations that this thread enqueued last, the newest at `next` − 1.
struct Recent {
  std::array<const char*, 4> names{};
  std::size_t next = 0;
};
thread_local Recent recent;

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

void note_operation(const char* name, cudaStream_t stream) {
  recent.names[recent.next++ % recent.names.size()] = name;
  if (!waits_for_each()) return;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), name);
  if (capturing == cudaStreamCaptureStatusNone) check(cudaStreamSynchronize(stream), name);
}

}  // namespace based::cuda
