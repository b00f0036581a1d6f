// The devices of cpp/backend/cuda.h.

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda.h"
#include "based/device.h"
#include "based/error.h"
#include "cuda_backend.h"
#include "cuda_error.h"

namespace based::cuda {

namespace {

constexpr int kMinMajor = 8;  // of the compute capability

std::string version_str(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Number of devices, or why there is none.
int count_devices(std::string& problem) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) cudaGetLastError();
  if (driver == 0)
    problem = "no CUDA driver is installed";
  else if (status == cudaErrorInsufficientDriver)
    problem = "the CUDA driver is too old: it supports CUDA " + version_str(driver) + ", this build needs " +
              version_str(CUDART_VERSION) + " or another of its major version: update the driver";
  else if (status == cudaSuccess || status == cudaErrorNoDevice)
    problem = "the CUDA driver finds no GPU (is CUDA_VISIBLE_DEVICES set?)";
  else
    problem = std::string("CUDA cannot be started: ") + cudaGetErrorString(status);
  return 0;
}

DeviceDescription describe(int index) {
  DeviceDescription description;
  description.device = {Device::Type::cuda, index};
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index), "describing a device");
  description.name = properties.name;
  description.architecture = "sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
  description.total_nbytes = properties.totalGlobalMem;
  if (properties.major < kMinMajor) {
    description.problem = "compute capability " + std::to_string(properties.major) + "." +
                          std::to_string(properties.minor) + " (" + description.name + "), 8.0 or later is needed";
    return description;
  }
  const UseDevice use(index);
  std::size_t total = 0;
  if (const cudaError_t status = cudaMemGetInfo(&description.free_nbytes, &total); status != cudaSuccess) {
    cudaGetLastError();
    description.problem = std::string("it cannot be used: ") + cudaGetErrorString(status);
  }
  return description;
}

}  // namespace

std::vector<DeviceDescription> cuda_devices() {
  std::string problem;
  std::vector<DeviceDescription> all;
  const int count = count_devices(problem);
  for (int i = 0; i < count; ++i) all.push_back(describe(i));
  return all;
}

std::string cuda_problem() {
  std::string problem;
  const int count = count_devices(problem);
  for (int i = 0; i < count; ++i) {
    problem = describe(i).problem;
    if (problem.empty()) return "";
  }
  return problem;
}

void synchronize(int index) {
  const UseDevice use(index);
  synchronize_device("synchronize");
}

void release(Tensor tensor, bool on_legacy_stream) noexcept {
  const int index = tensor.device().index;
  std::shared_ptr<void> memory = tensor.storage();
  tensor = {};
  release_lent(index, std::move(memory), on_legacy_stream);
}

std::unique_ptr<backend::Backend> make_cuda_backend(int index, bool deterministic) {
  const std::string where = "device cuda:" + std::to_string(index) + " is not available: ";
  std::string problem;
  const int count = count_devices(problem);
  if (count == 0) throw UnsupportedError(where + problem);
  if (index < 0 || index >= count)
    throw UnsupportedError(where + "this machine has " + std::to_string(count) + " GPU" + (count > 1 ? "s" : "") +
                           ", cuda:0" + (count > 1 ? " to cuda:" + std::to_string(count - 1) : ""));
  problem = describe(index).problem;
  if (!problem.empty()) throw UnsupportedError(where + problem);
  require_cublas_lt();
  return std::make_unique<CudaBackend>(index, deterministic);
}

}  // namespace based::cuda
