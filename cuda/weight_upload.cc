#include "weight_upload.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "backend/backend.h"
#include "based/error.h"
#include "cuda_backend.h"
#include "cuda_error.h"
#include "cuda_linear.h"
#include "kernels.h"

namespace based::cuda {

namespace {

void check_weight_dtype(DType dtype, const char* what) {
  if (dtype != DType::float32 && dtype != DType::bfloat16 && dtype != DType::float16)
    throw InvalidArgument(std::string(what) + ": found " + std::string(name_of(dtype)) +
                          ", expected float32, bfloat16 or float16");
}

}  // namespace

WeightUpload::WeightUpload(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {
  for (Part& part : parts_) part.host = allocate_pinned(kPartBytes);
}

void WeightUpload::put(const TensorView& tensor, DType dtype, void* device) {
  const std::size_t nbytes = tensor.nbytes();
  const std::size_t element = size_of(tensor.dtype);
  for (std::size_t begin = 0; begin < nbytes; begin += kPartBytes) {
    const std::size_t count = std::min(kPartBytes, nbytes - begin);
    Part& part = parts_[next_part_++ % parts_.size()];
    part.copied.wait("loading weights");
    std::memcpy(part.host.get(), tensor.data + begin, count);
    auto* target = static_cast<std::byte*>(device) + begin / element * size_of(dtype);
    if (tensor.dtype != dtype && !part.raw) part.raw = stream_->allocate(kPartBytes);
    void* landing = tensor.dtype == dtype ? target : part.raw.get();
    check(cudaMemcpyAsync(landing, part.host.get(), count, cudaMemcpyHostToDevice, stream_->get()), "loading weights");
    part.copied.record(stream_->get(), "loading weights");
    if (tensor.dtype != dtype)
      convert(stream_->get(), tensor.dtype, landing, dtype, target, static_cast<std::int64_t>(count / element));
  }
}

// ---- CudaBackend: weights ------------------------------------------------------------------------------------------

WeightUpload& CudaBackend::weight_upload() {
  if (!weight_upload_) weight_upload_ = std::make_unique<WeightUpload>(stream_);
  return *weight_upload_;
}

std::shared_ptr<const backend::LinearWeight> CudaBackend::pack_linear(const backend::LinearSource& source,
                                                                      DType dtype) {
  const UseDevice use(device_);
  check_weight_dtype(dtype, "pack_linear: the dtype of the packed weights");
  if (source.weights.empty()) throw InvalidArgument("pack_linear: no weights");
  LinearArguments layer;
  layer.dtype = dtype;
  layer.activation = source.activation;
  layer.gated = source.gated;
  for (const TensorView& weight : source.weights) {
    check_weight_dtype(weight.dtype, "pack_linear");
    if (weight.shape.size() != 2 || weight.shape[1] != source.weights[0].shape[1])
      throw InvalidArgument("pack_linear: found a weight of shape " + shape_str(weight.shape) +
                            ", expected matrices with equal numbers of columns");
    layer.rows += weight.shape[0];
  }
  layer.k = source.weights[0].shape[1];
  if (layer.gated && layer.rows % 2 != 0)
    throw InvalidArgument("pack_linear: " + std::to_string(layer.rows) + " rows cannot be halved into value and gate");
  if (!source.biases.empty() && source.biases.size() != source.weights.size())
    throw InvalidArgument("pack_linear: found " + std::to_string(source.biases.size()) + " biases for " +
                          std::to_string(source.weights.size()) + " weights");

  const auto stack = [&](const std::vector<TensorView>& parts, std::int64_t cols, DType to) {
    backend::Buffer stacked =
        allocate(static_cast<std::size_t>(layer.rows * cols) * size_of(to), backend::MemoryKind::weights);
    auto* at = static_cast<std::byte*>(stacked.data.get());
    for (const TensorView& part : parts) {
      weight_upload().put(part, to, at);
      at += static_cast<std::size_t>(part.size()) * size_of(to);
    }
    return stacked;
  };
  backend::Buffer weight = stack(source.weights, layer.k, dtype), bias, bias_t;
  if (!source.biases.empty()) {
    for (std::size_t i = 0; i < source.biases.size(); ++i) {
      check_weight_dtype(source.biases[i].dtype, "pack_linear");
      if (source.biases[i].shape != std::vector<std::int64_t>{source.weights[i].shape[0]})
        throw InvalidArgument("pack_linear: found a bias of shape " + shape_str(source.biases[i].shape) +
                              " for a weight of shape " + shape_str(source.weights[i].shape));
    }
    bias = stack(source.biases, 1, DType::float32);
    bias_t = dtype == DType::float32 ? bias : stack(source.biases, 1, dtype);
  }
  return std::make_shared<CudaLinearWeight>(layer, std::move(weight), std::move(bias), std::move(bias_t));
}

backend::Buffer CudaBackend::pack_float32(const TensorView& tensor) {
  const UseDevice use(device_);
  check_weight_dtype(tensor.dtype, "pack_float32");
  backend::Buffer out = allocate(static_cast<std::size_t>(tensor.size()) * sizeof(float), backend::MemoryKind::weights);
  weight_upload().put(tensor, DType::float32, out.data.get());
  return out;
}

}  // namespace based::cuda
