#include <map>
#include <mutex>

#include "cuda_error.h"
#include "kernels.h"

namespace based::cuda {

const DeviceInfo& device_info() {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;  // elements stay where they are
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (const auto it = known.find(device); it != known.end()) return it->second;
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return known[device] = {capability, code_capability(), attribute(cudaDevAttrMultiProcessorCount),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

}  // namespace based::cuda
