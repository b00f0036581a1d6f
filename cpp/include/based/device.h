#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "based/tensor.h"

namespace based {

struct DeviceDescription {
  Device device;
  std::string name;              // of the processor or card
  std::string architecture;      // instruction set or GPU architecture, e.g. "avx512bf16", "sm_90"
  std::size_t total_nbytes = 0;  // memory; 0 for the CPU
  std::size_t free_nbytes = 0;
  std::string problem;  // why it cannot be used; empty when it can
};

/// The CPU, then every GPU of this machine.
std::vector<DeviceDescription> devices();

/// Bytes of the machine's memory that this process may still take, by the system and its control groups.
std::size_t available_memory();

/// Why no GPU can be used, e.g. "no CUDA driver is installed"; empty when one can.
std::string cuda_problem();

/// Waits for everything that was enqueued on a device, by this library or another.
void synchronize(Device device);

/// Lets go of a tensor that another library has used: a GPU's memory is not freed before what that library has enqueued
/// by now is done. `on_legacy_stream`: all of that is on CUDA's legacy default stream, and nothing is waited for here;
/// otherwise this waits for the device. Any thread.
void release_lent(Tensor tensor, bool on_legacy_stream) noexcept;

/// Folders, or library files, to look into for cuBLASLt before the system's own. Before the first use of CUDA.
void add_cublas_path(const std::string& path);

}  // namespace based
