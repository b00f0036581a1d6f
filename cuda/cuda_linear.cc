#include "cuda_linear.h"

#include <algorithm>
#include <utility>

namespace based::cuda {
namespace {

/// Rows that go through scratch at a time: enough for whole waves of cuBLASLt's tiles, few enough that what it leaves
/// for the epilogue (29 MB at 7168 rows of W) is still in L2.
constexpr std::int64_t kScratchRows = 2048;

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
  m = std::min(m, kScratchRows);
  const std::size_t hidden =
      needs_epilogue(layer) ? static_cast<std::size_t>(m * layer.rows) * size_of(layer.dtype) : 0;
  return converted_bytes(layer, x_dtype, m) + hidden;
}

void run_linear(cudaStream_t stream, CublasLt& cublas_lt, const CudaLinearWeight& weight, const backend::Matrix& x,
                const backend::Matrix& y, bool accumulate, void* scratch) {
  LinearArguments part = weight.layer();
  part.x_dtype = x.dtype;
  part.y_dtype = y.dtype;
  part.accumulate = accumulate;
  part.m = x.rows;
  part.x = x.data;
  part.y = y.data;
  if (part.m == 0) return;
  if (!cublas_lt.row_invariant() && skinny_linear_takes(part)) return skinny_linear(stream, part);

  const bool epilogue = needs_epilogue(part), converts = x.dtype != part.dtype;
  const std::int64_t step = epilogue || converts ? std::min(x.rows, kScratchRows) : x.rows;
  const std::int64_t x_row = part.k * static_cast<std::int64_t>(size_of(x.dtype));  // bytes
  const std::int64_t y_row = weight.out_features() * static_cast<std::int64_t>(size_of(y.dtype));
  for (std::int64_t first = 0; first < x.rows; first += step) {
    part.m = std::min(step, x.rows - first);
    part.x = static_cast<const std::byte*>(x.data) + first * x_row;
    part.y = static_cast<std::byte*>(y.data) + first * y_row;
    Product product;
    product.dtype = part.dtype;
    product.rows = part.rows;
    product.k = part.k;
    product.m = part.m;
    product.weight = part.weight;
    product.x = converts ? scratch : part.x;
    if (epilogue) {
      product.y = static_cast<std::byte*>(scratch) + converted_bytes(part, x.dtype, step);
      product.y_dtype = part.dtype;
    } else {
      product.y = part.y;
      product.y_dtype = y.dtype;
      product.accumulate = accumulate;
      if (part.bias != nullptr) product.bias = y.dtype == DType::float32 ? part.bias : weight.bias_t();
    }
    if (!cublas_lt.takes(product)) {
      general_linear(stream, part);
      continue;
    }
    if (converts) convert(stream, x.dtype, part.x, part.dtype, scratch, part.m * part.k);
    cublas_lt.matmul(stream, product);
    if (epilogue) linear_epilogue(stream, part, product.y_dtype, product.y);  // adds the bias too
  }
}

}  // namespace based::cuda
