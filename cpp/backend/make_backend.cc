#include <memory>
#include <string>
#include <utility>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_memory.h"
#include "backend/cuda.h"
#include "based/device.h"
#include "based/error.h"

namespace based {

std::vector<DeviceDescription> devices() {
  std::vector<DeviceDescription> all{{{}, "CPU", std::string(name_of(cpu::choose_isa())), 0, 0, ""}};
  for (auto& device : cuda::cuda_devices()) all.push_back(std::move(device));
  return all;
}

std::size_t available_memory() { return cpu::available_memory(); }

std::string cuda_problem() { return cuda::cuda_problem(); }

void synchronize(Device device) {
  if (device.type == Device::Type::cuda) cuda::synchronize(device.index);
}

void release_lent(Tensor tensor, bool on_legacy_stream) noexcept {
  if (tensor.device().type == Device::Type::cuda) cuda::release(std::move(tensor), on_legacy_stream);
}

void add_cublas_path(const std::string& path) { cuda::add_library_path(path); }

namespace backend {

std::unique_ptr<Backend> make_backend(Device device, int num_threads, bool deterministic) {
  if (num_threads < 0 || num_threads > 1024)
    throw InvalidArgument("num_threads is " + std::to_string(num_threads) +
                          ", expected 0 (the CPUs that this process may use) to 1024");
  if (device.type == Device::Type::cuda) return cuda::make_cuda_backend(device.index, deterministic);
  if (device.index != 0)
    throw UnsupportedError("there is one CPU device, index 0: found index " + std::to_string(device.index));
  auto pool = std::make_shared<cpu::ThreadPool>(num_threads == 0 ? cpu::available_cpus() : num_threads);
  return std::make_unique<cpu::CpuBackend>(std::move(pool), cpu::choose_isa());
}

}  // namespace backend
}  // namespace based
