#include <memory>
#include <string>

#include "backend/backend.h"
#include "backend/cpu/cpu_backend.h"
#include "based/error.h"

namespace based::backend {

std::unique_ptr<Backend> make_backend(Device device, int num_threads, const Backend* share) {
  if (num_threads < 0 || num_threads > 1024)
    throw InvalidArgument("num_threads is " + std::to_string(num_threads) +
                          ", expected 0 (the CPUs that this process may use) to 1024");
  if (device.type == Device::Type::cuda)
    throw UnsupportedError("this build has no CUDA: device " + device.str() + " is not available, \"cpu\" is");
  if (device.index != 0)
    throw UnsupportedError("there is one CPU device, index 0: found index " + std::to_string(device.index));
  if (const auto* other = dynamic_cast<const cpu::CpuBackend*>(share))
    return std::make_unique<cpu::CpuBackend>(other->pool(), other->isa());
  auto pool = std::make_shared<cpu::ThreadPool>(num_threads == 0 ? cpu::available_cpus() : num_threads);
  return std::make_unique<cpu::CpuBackend>(std::move(pool), cpu::choose_isa());
}

}  // namespace based::backend
