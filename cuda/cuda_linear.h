#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "cublas_lt.h"
#include "kernels.h"

namespace based::cuda {

/// A linear layer's weights on the device, as they are in the model: (rows, K) row-major, [value | gate] when gated.
class CudaLinearWeight final : public backend::LinearWeight {
 public:
  /// The part of LinearArguments that a layer has before it is given x, y: dtype, rows, k, activation, gated.
  /// weight (rows, k) dtype; bias (rows) float32 and bias_t (rows) dtype, both empty for none. When dtype is float32
  /// bias_t may be bias itself.
  CudaLinearWeight(const LinearArguments& layer, backend::Buffer weight, backend::Buffer bias, backend::Buffer bias_t);

  std::int64_t in_features() const override { return layer_.k; }
  std::int64_t out_features() const override { return layer_.gated ? layer_.rows / 2 : layer_.rows; }
  std::size_t nbytes() const override;

  /// With weight and bias filled in; x, y and accumulate are the caller's.
  const LinearArguments& layer() const { return layer_; }
  const void* bias_t() const { return bias_t_.data.get(); }

 private:
  LinearArguments layer_;
  backend::Buffer weight_, bias_, bias_t_;
};

/// Bytes of scratch that run_linear() needs for m rows of x of x_dtype.
std::size_t linear_scratch(const CudaLinearWeight& weight, DType x_dtype, std::int64_t m);

/// y = act(x Wᵀ + b), or y += that: backend::Backend::linear. Few rows: a kernel that streams W; more: cuBLASLt, with
/// an elementwise kernel for what it cannot do; shapes that cuBLASLt refuses: a kernel for any shape.
/// `scratch`: linear_scratch() bytes, aligned to 16; busy until the work on `stream` is done.
void run_linear(cudaStream_t stream, CublasLt& cublas_lt, const CudaLinearWeight& weight, const backend::Matrix& x,
                const backend::Matrix& y, bool accumulate, void* scratch);

}  // namespace based::cuda
