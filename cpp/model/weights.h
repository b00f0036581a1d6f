#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "based/config.h"
#include "based/tensor.h"
#include "io/safetensors.h"

namespace based {

/// Where a model's tensors come from, by the names of docs/model-format.md.
class WeightSource {
 public:
  virtual ~WeightSource() = default;

  /// The tensor of this name, checked to have this shape and a float dtype; valid until release(). Throws FormatError.
  virtual TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) = 0;

  /// Whatever was taken is no longer needed.
  virtual void release() = 0;
};

class FileWeights final : public WeightSource {
 public:
  FileWeights(io::WeightFiles files, std::string where) : files_(std::move(files)), where_(std::move(where)) {}

  TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) override;
  void release() override;

  /// Throws FormatError naming tensors that nobody took.
  void check_all_taken() const;

  /// FNV-1a over the config and, of each tensor, name, dtype, shape and 64 evenly spread blocks of 64 bytes.
  std::string fingerprint(const ModelConfig& config) const;

 private:
  io::WeightFiles files_;
  std::string where_;
  std::set<std::string> taken_;
  std::vector<std::string> held_;
};

/// Seeded uniform noise, scaled by fan-in so that activations neither grow nor vanish; norm weights are one.
class RandomWeights final : public WeightSource {
 public:
  explicit RandomWeights(std::uint64_t seed) : seed_(seed) {}
  TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) override;
  void release() override { held_.clear(); }

 private:
  std::uint64_t seed_;
  std::vector<Tensor> held_;
};

/// Takes tensors from a source and packs them for a device.
struct WeightLoader {
  backend::Backend& backend;
  WeightSource& source;
  DType dtype;             // of matrices; vectors are float32
  std::size_t nbytes = 0;  // of all that was loaded, on the device

  struct Matrix {
    std::string name;  // without ".weight" / ".bias"
    std::int64_t rows;
  };
  std::shared_ptr<const backend::LinearWeight> linear(const std::vector<Matrix>& stacked, std::int64_t in_features,
                                                      bool bias, Activation activation = Activation::identity,
                                                      bool gated = false);
  backend::Buffer vector(const std::string& name, const std::vector<std::int64_t>& shape);
};

}  // namespace based
