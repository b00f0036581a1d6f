#include "model/weights.h"

#include <algorithm>
#include <cmath>

#include "based/error.h"
#include "io/hash.h"

namespace based {

namespace {

bool is_float(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16; }

// splitmix64: one multiply-xor chain per number.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

TensorView FileWeights::take(const std::string& name, const std::vector<std::int64_t>& shape) {
  const auto it = files_.tensors().find(name);
  if (it == files_.tensors().end())
    throw FormatError(where_ + ": tensor " + name + " " + shape_str(shape) + " is missing");
  const TensorView& tensor = it->second;
  if (tensor.shape != shape)
    throw FormatError(where_ + ": tensor " + name + " has shape " + shape_str(tensor.shape) + ", the config makes it " +
                      shape_str(shape));
  if (!is_float(tensor.dtype))
    throw FormatError(where_ + ": tensor " + name + " has dtype " + std::string(name_of(tensor.dtype)) +
                      ", expected float32, bfloat16 or float16");
  taken_.insert(name);
  held_.push_back(name);
  return tensor;
}

void FileWeights::release() {
  for (const auto& name : held_) files_.release(name);
  held_.clear();
}

void FileWeights::check_all_taken() const {
  std::string extra;
  int count = 0;
  for (const auto& [name, tensor] : files_.tensors()) {
    if (taken_.contains(name)) continue;
    if (++count <= 5) extra += (count > 1 ? ", " : "") + name;
  }
  if (count > 0)
    throw FormatError(where_ + ": " + std::to_string(count) + " tensors that the config has no place for: " + extra +
                      (count > 5 ? ", …" : ""));
}

std::string FileWeights::fingerprint(const ModelConfig& config) const {
  constexpr std::size_t kBlocks = 64, kBlockBytes = 64;
  io::Fnv1a hash;
  hash.add(config.to_json());
  for (const auto& [name, tensor] : files_.tensors()) {
    hash.add(name);
    hash.add(name_of(tensor.dtype));
    hash.add(shape_str(tensor.shape));
    const std::size_t nbytes = tensor.nbytes();
    if (nbytes <= kBlocks * kBlockBytes) {
      hash.add(tensor.data, nbytes);
      continue;
    }
    for (std::size_t i = 0; i < kBlocks; ++i)
      hash.add(tensor.data + (nbytes - kBlockBytes) / (kBlocks - 1) * i, kBlockBytes);
    files_.release(name);  // a fault maps the pages around it too
  }
  return hash.hex();
}

TensorView RandomWeights::take(const std::string& name, const std::vector<std::int64_t>& shape) {
  Tensor tensor = Tensor::empty(DType::float32, shape);
  auto* x = tensor.data_as<float>();
  const std::int64_t n = tensor.size();
  io::Fnv1a hash;
  hash.add(name);
  const std::uint64_t key = mix(seed_ ^ hash.value());
  const bool norm_weight = shape.size() == 1 && name.find("norm") != std::string::npos && name.ends_with(".weight");
  if (norm_weight) {
    std::fill(x, x + n, 1.0f);
  } else {
    // Uniform on ±√3·std; std = 1/√fan_in, biases small.
    const double std_dev = shape.size() == 2 ? 1.0 / std::sqrt(static_cast<double>(shape[1])) : 0.02;
    const float scale = static_cast<float>(std::sqrt(3.0) * std_dev * 0x1p-31);
    for (std::int64_t i = 0; i < n; i += 2) {
      const std::uint64_t bits = mix(key + static_cast<std::uint64_t>(i));
      x[i] = scale * static_cast<float>(static_cast<std::int32_t>(bits));
      if (i + 1 < n) x[i + 1] = scale * static_cast<float>(static_cast<std::int32_t>(bits >> 32));
    }
  }
  held_.push_back(tensor);
  return tensor.view();
}

std::shared_ptr<const backend::LinearWeight> WeightLoader::linear(const std::vector<Matrix>& stacked,
                                                                  std::int64_t in_features, bool bias,
                                                                  Activation activation, bool gated) {
  backend::LinearSource parts;
  parts.activation = activation;
  parts.gated = gated;
  for (const auto& [name, rows] : stacked) {
    parts.weights.push_back(source.take(name + ".weight", {rows, in_features}));
    if (bias) parts.biases.push_back(source.take(name + ".bias", {rows}));
  }
  auto packed = backend.pack_linear(parts, dtype);
  source.release();
  nbytes += packed->nbytes();
  return packed;
}

backend::Buffer WeightLoader::vector(const std::string& name, const std::vector<std::int64_t>& shape) {
  auto packed = backend.pack_float32(source.take(name, shape));
  source.release();
  nbytes += packed.nbytes;
  return packed;
}

}  // namespace based
