#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "based/config.h"
#include "based/tensor.h"

namespace based {

/// Called every few milliseconds during a long computation, on the calling thread. It cancels by throwing; the
/// exception comes out of the call unchanged, and the session is as it was before.
using InterruptCheck = std::function<void()>;

struct LoadOptions {
  Device device;
  std::optional<DType> dtype;  // float32, bfloat16 or (CUDA) float16; none: as a 16-bit file's, for a float32 file
                               // float32 on the CPU and bfloat16 on a GPU
  int num_threads = 0;         // CPU threads of this model; 0: the CPUs that this process may use

  /// A sequence's results do not depend, to the bit, on what else is in its batch. On a GPU every matrix product then
  /// runs by one algorithm for any number of rows, which is slower. On the CPU it is always so: nothing changes.
  bool deterministic = false;

  /// Tokens that a sequence of a model with full attention may have, 1 to limits::kSize; none: as many as the device
  /// has memory for when the model is loaded. At most ModelConfig::max_tokens. A model with neither has no such limit,
  /// and takes none.
  std::optional<std::int64_t> max_context;
};

/// Bytes of the device's memory that one model and its sessions hold now.
struct MemoryUse {
  std::size_t weights = 0;
  std::size_t states = 0;     // of sessions, forks and checkpoints
  std::size_t workspace = 0;  // activations, logits, sampling
};

/// Activations of one forward pass, float32 on the host (docs: `Model::trace`).
struct LayerTrace {
  Tensor embed;                   // (T, d)
  std::vector<Tensor> mixer_out;  // per layer (T, d): output of the mixer before the residual add
  std::vector<Tensor> block_out;  // per layer (T, d): residual stream after mixer and MLP
  Tensor final_norm;              // (T, d)
  Tensor logits;                  // (T, padded_vocab_size)
};

/// Immutable weights on one device. All methods are const and may be called from any number of threads at once.
/// Shared ownership: every Session keeps its model alive.
class Model {
 public:
  /// Reads a model directory (config.json, model.safetensors or its shards). Throws IoError, FormatError,
  /// UnsupportedError, InvalidArgument.
  static std::shared_ptr<const Model> load(const std::filesystem::path& directory, const LoadOptions& options = {});

  /// A model of this shape with seeded random weights, scaled so that activations stay finite: for benchmarks.
  static std::shared_ptr<const Model> random(const ModelConfig& config, std::uint64_t seed,
                                             const LoadOptions& options = {});
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const;
  Device device() const;
  DType dtype() const;
  int num_threads() const;
  std::int64_t num_parameters() const;
  std::size_t weight_nbytes() const;  // device memory held by the weights
  std::size_t state_nbytes() const;   // device memory of the state of one sequence, of max_context() tokens if it grows

  /// The same of a sequence of num_tokens tokens.
  std::size_t state_nbytes(std::int64_t num_tokens) const;

  /// The most tokens that a sequence may have; none: any number, as of every model without full
  /// attention and without ModelConfig::max_tokens.
  std::optional<std::int64_t> max_context() const;
  MemoryUse memory() const;

  /// Name of the instruction set or GPU architecture whose kernels run, e.g. "avx512bf16".
  std::string kernel_isa() const;

  /// 16 hex digits over config and weight samples; a state file carries it.
  const std::string& fingerprint() const;

  /// Logits (T, padded_vocab_size) float32 at every position of one sequence that starts from nothing, given as one
  /// prompt: inside a prefix (ModelConfig::prefix_tokens) they depend on the tokens that follow.
  Tensor forward(std::span<const std::int32_t> tokens, const InterruptCheck& interrupt = {}) const;

  /// (T − 1) natural-log probabilities: entry t is log p(tokens[t+1] | tokens[..t]). Memory does not grow with T. Of a
  /// model with a prefix: after a prompt of one token, tokens[0].
  std::vector<float> score(std::span<const std::int32_t> tokens, const InterruptCheck& interrupt = {}) const;

  /// forward, keeping every layer's activations: to compare with another implementation.
  LayerTrace trace(std::span<const std::int32_t> tokens, const InterruptCheck& interrupt = {}) const;

  class Impl;
  const Impl& impl() const { return *impl_; }

 private:
  explicit Model(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
