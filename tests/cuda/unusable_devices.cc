// Drivers and cards that cannot be used, on a machine without any: the linker puts the functions below in the place of
// the CUDA runtime's (--wrap in tests/cpp/CMakeLists.txt).

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "based/device.h"
#include "based/error.h"
#include "cuda_test.h"

namespace {

struct Machine {
  int driver = 0;  // 1000 · major + 10 · minor; 0: none
  cudaError_t counting = cudaErrorInsufficientDriver;
  int major = 0, minor = 0;  // of its only card
  cudaError_t memory = cudaSuccess;
} machine;

}  // namespace

extern "C" {

cudaError_t __wrap_cudaGetDeviceCount(int* count) {
  *count = machine.counting == cudaSuccess ? 1 : 0;
  return machine.counting;
}

cudaError_t __wrap_cudaDriverGetVersion(int* version) {
  *version = machine.driver;
  return cudaSuccess;
}

cudaError_t __wrap_cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "A Card");
  properties->major = machine.major;
  properties->minor = machine.minor;
  properties->totalGlobalMem = std::size_t{16} << 30;
  return cudaSuccess;
}

cudaError_t __wrap_cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t __wrap_cudaSetDevice(int) { return cudaSuccess; }

cudaError_t __wrap_cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = std::size_t{15} << 30;
  return machine.memory;
}

}  // extern "C"

namespace based::test {
namespace {

// What loading on the GPU says, which is what cuda_problem() says too.
std::string refusal(const Machine& of) {
  machine = of;
  std::string message;
  try {
    Model::load(BASED_GOLDEN_DIR, on(kCuda));
  } catch (const UnsupportedError& error) {
    message = error.what();
  }
  EXPECT_NE(message.find("device cuda:0 is not available: " + cuda_problem()), std::string::npos) << message;
  return message;
}

TEST(UnusableDevices, NoDriver) { EXPECT_NE(refusal({}).find("no CUDA driver is installed"), std::string::npos); }

TEST(UnusableDevices, ADriverOlderThanTheBuild) {
  const std::string message = refusal({11040});
  const std::string needed = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  EXPECT_NE(message.find("the CUDA driver is too old: it supports CUDA 11.4, this build needs " + needed),
            std::string::npos)
      << message;
}

TEST(UnusableDevices, NoCard) {
  EXPECT_NE(refusal({13000, cudaErrorNoDevice}).find("the CUDA driver finds no GPU"), std::string::npos);
}

TEST(UnusableDevices, ADriverThatDoesNotStart) {
  EXPECT_NE(refusal({13000, cudaErrorSystemDriverMismatch}).find("CUDA cannot be started: "), std::string::npos);
}

TEST(UnusableDevices, ACardBefore80) {
  EXPECT_NE(refusal({13000, cudaSuccess, 7, 5}).find("compute capability 7.5 (A Card), 8.0 or later is needed"),
            std::string::npos);
}

TEST(UnusableDevices, ACardThatAnotherProcessHolds) {
  EXPECT_NE(refusal({13000, cudaSuccess, 9, 0, cudaErrorDevicesUnavailable}).find("it cannot be used: "),
            std::string::npos);
}

TEST(UnusableDevices, AreListedWithTheirProblem) {
  machine = {13000, cudaSuccess, 7, 5};
  const auto all = devices();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[1].name, "A Card");
  EXPECT_EQ(all[1].architecture, "sm_75");
  EXPECT_EQ(all[1].problem, cuda_problem());
  EXPECT_NE(all[1].problem, "");
}

}  // namespace
}  // namespace based::test
