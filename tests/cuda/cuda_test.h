#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "based/device.h"
#include "tiny_model.h"

namespace based::test {

/// Skips, by name, where no GPU can be used.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string problem = cuda_problem(); !problem.empty()) GTEST_SKIP() << problem;
  }
};

constexpr Device kCuda{Device::Type::cuda, 0};

inline LoadOptions on(Device device, DType dtype = DType::float32) {
  LoadOptions options;
  options.device = device;
  options.dtype = dtype;
  return options;
}

/// A host copy of a float32 tensor of any device.
inline std::vector<float> host_floats(const Tensor& tensor) {
  if (tensor.device().type == Device::Type::cpu) return floats(tensor);
  std::vector<float> values(static_cast<std::size_t>(tensor.size()));
  backend::make_backend(tensor.device(), 0)->copy_to_host(values.data(), tensor.data(), tensor.nbytes());
  return values;
}

/// ‖a − b‖ / ‖b‖; NaN when a has one.
inline double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

}  // namespace based::test
