#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "based/config.h"
#include "based/tensor.h"
#include "io/safetensors.h"

namespace based {

/// Numbers that WeightLoader made float32; null for none.
inline const float* floats(const backend::Buffer& buffer) { return static_cast<const float*>(buffer.data.get()); }

/// Where a model's tensors come from, by the names of docs/model-format.md.
class WeightSource {
 public:
  virtual ~WeightSource() = default;

  /// The tensor of this name, checked to have this shape and a float dtype; valid until release(). Throws FormatError.
  virtual TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) = 0;

  /// Whatever was taken is no longer needed.
  virtual void release() = 0;
};

/// What tells a model from others, of the config and the weights; 16 hex digits each.
struct Fingerprints {
  std::string all;      // over every byte
  std::string sampled;  // over 64 blocks of 64 bytes of each tensor: in state files that older versions saved
};

/// Reads the tensors of a model directory, each into memory of its own: that costs a copy (0.3 s of CPU time per GB),
/// and a file that is shortened meanwhile is an error; a mapping of it would end the process.
class FileWeights final : public WeightSource {
 public:
  FileWeights(io::WeightFiles files, std::string where) : files_(std::move(files)), where_(std::move(where)) {}

  TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) override;
  void release() override;

  /// The dtype in the file; checks as take() does, and reads nothing.
  DType dtype_of(const std::string& name, const std::vector<std::int64_t>& shape) const;

  /// Throws FormatError naming tensors that nobody took.
  void check_all_taken() const;

  /// When all tensors were taken: their bytes were hashed as they were read.
  Fingerprints fingerprints(const ModelConfig& config) const;

 private:
  struct Memory {
    std::unique_ptr<std::byte[]> bytes;
    std::size_t capacity = 0;
  };
  struct Digest {
    std::vector<std::uint32_t> blocks;  // CRC-32C of each kBlockBytes
    std::string sample;
  };

  const TensorView& find(const std::string& name, const std::vector<std::int64_t>& shape) const;
  std::byte* allocate(std::size_t nbytes);

  io::WeightFiles files_;
  std::string where_;
  std::map<std::string, Digest> digests_;
  std::vector<Memory> held_, spare_;
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

  /// The rows of one matrix as several: rows[0] of them, then rows[1], …
  std::vector<std::shared_ptr<const backend::LinearWeight>> rows_of(const std::string& name,
                                                                    const std::vector<std::int64_t>& rows,
                                                                    std::int64_t in_features);
  backend::Buffer vector(const std::string& name, const std::vector<std::int64_t>& shape);
};

}  // namespace based
