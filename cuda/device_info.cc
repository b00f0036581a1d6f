#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "cuda_error.h"
#include "kernels.h"

namespace based::cuda {

namespace {

// Calls set() the first time that `kernel` and `what` come on the current device.
template <typename Set>
void once(const void* kernel, cudaFuncAttribute what, Set&& set) {
  static std::mutex mutex;
  static auto& done = *new std::set<std::tuple<int, const void*, cudaFuncAttribute>>;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (done.contains({device, kernel, what})) return;
  set();
  done.emplace(device, kernel, what);
}

}  // namespace

// The most that there is: the limit is the function's, and another thread may launch it with other sizes.
void allow_all_shared_memory(const void* kernel, const char* name) {
  once(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, [&] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), name);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device_info().max_shared_bytes - static_cast<int>(attributes.sharedSizeBytes)),
          name);
  });
}

void prefer_shared_memory(const void* kernel, const char* name) {
  once(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          name);
  });
}

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
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), wgmma_code()};
}

}  // namespace based::cuda
