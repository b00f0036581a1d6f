#include "cuda_linear.h"

#include <utility>

namespace based::cuda {
namespace {

std::size_t aligned_up(std::size_t nbytes) { return (nbytes + 255) / 256 * 256; }

/// x rounded to W's dtype, which cuBLASLt wants of both.
std::size_t converted_bytes(const LinearArguments& layer, DType x_dtype, std::int64_t m) {
  return x_dtype == layer.dtype ? 0 : aligned_up(static_cast<std::size_t>(m * layer.k) * size_of(layer.dtype));
}

/// cuBLASLt leaves x Wᵀ + b in scratch, in W's dtype, when y is not just that.
bool needs_epilogue(const LinearArguments& layer) { return layer.gated || layer.activation != Activation::identity; }

}  // namespace

CudaLinearWeight::CudaLinearWeight(const LinearArguments& layer, backend::Buffer weight, backend::Buffer bias,
                                   backend::Buffer bias_t)
    : layer_(layer), weight_(std::move(weight)), bias_(std::move(bias)), bias_t_(std::move(bias_t)) {
  layer_.weight = weight_.data.get();
  layer_.bias = static_cast<const float*>(bias_.data.get());
}

std::size_t CudaLinearWeight::nbytes() const {
  return weight_.nbytes + bias_.nbytes + (bias_t_.data == bias_.data ? 0 : bias_t_.nbytes);
}

std::size_t linear_scratch(const CudaLinearWeight& weight, DType x_dtype, std::int64_t m) {
  const LinearArguments& layer = weight.layer();
  const std::size_t hidden =
      needs_epilogue(layer) ? static_cast<std::size_t>(m * layer.rows) * size_of(layer.dtype) : 0;
  return converted_bytes(layer, x_dtype, m) + hidden;
}

void run_linear(cudaStream_t stream, CublasLt& cublas_lt, const CudaLinearWeight& weight, const backend::Matrix& x,
                const backend::Matrix& y, bool accumulate, void* scratch) {
  LinearArguments arguments = weight.layer();
  arguments.x_dtype = x.dtype;
  arguments.x = x.data;
  arguments.m = x.rows;
  arguments.y_dtype = y.dtype;
  arguments.y = y.data;
  arguments.accumulate = accumulate;
  if (arguments.m == 0) return;
  if (skinny_linear_takes(arguments)) return skinny_linear(stream, arguments);

  const std::size_t converted = converted_bytes(arguments, x.dtype, x.rows);
  const bool epilogue = needs_epilogue(arguments);
  Product product;
  product.dtype = arguments.dtype;
  product.rows = arguments.rows;
  product.k = arguments.k;
  product.m = arguments.m;
  product.weight = arguments.weight;
  product.x = converted > 0 ? scratch : x.data;
  if (epilogue) {
    product.y = static_cast<std::byte*>(scratch) + converted;
    product.y_dtype = arguments.dtype;
  } else {
    product.y = y.data;
    product.y_dtype = y.dtype;
    product.accumulate = accumulate;
    if (arguments.bias != nullptr) product.bias = y.dtype == DType::float32 ? arguments.bias : weight.bias_t();
  }
  if (!CublasLt::takes(product)) return general_linear(stream, arguments);
  if (converted > 0) convert(stream, x.dtype, x.data, arguments.dtype, scratch, arguments.m * arguments.k);
  cublas_lt.matmul(stream, product);
  if (epilogue) linear_epilogue(stream, arguments, product.y_dtype, product.y);  // adds the bias too
}

}  // namespace based::cuda
