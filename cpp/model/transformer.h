#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "based/model.h"
#include "model/mixer.h"
#include "model/mlp.h"
#include "model/weights.h"

namespace based {

/// Scratch memory of forward passes on one backend; grows to the largest batch it has seen, and then has another id.
struct Workspace : backend::Identified {
  std::int64_t capacity = 0;  // tokens
  backend::Buffer r, x;
  std::vector<backend::Buffer> scratch;  // Activations::scratch
};

/// The forward pass, for every device (MODEL.md's r = E[token]; r += mixer(norm1 r); r += mlp(norm2 r), if any;
/// head(ln_f r)). Immutable weights: may be used by many threads, each with a backend, states and workspace of its own.
class Transformer {
 public:
  /// Throws UnsupportedError naming the first layer whose mixer the device does not implement.
  Transformer(const ModelConfig& config, WeightLoader& loader);

  const ModelConfig& config() const { return config_; }
  std::int64_t prefix_tokens() const { return prefix_tokens_; }  // ModelConfig::prefix_tokens()
  std::size_t nbytes() const { return nbytes_; }

  /// Throws std::bad_alloc, and then nothing has changed.
  void reserve(backend::Backend& backend, Workspace& workspace, std::int64_t num_tokens) const;

  /// Most tokens to advance in one call, of a prompt: the device's chunk, or the whole prefix of a sequence that has
  /// seen nothing (a multiple of the chunk, so that what follows is cut where it would be without a prefix).
  std::int64_t piece_tokens(const backend::Backend& backend, bool begins_a_sequence) const;

  /// Advances the batch's states (the batch is begun); returns the residual stream (N, d) after the last layer, in the
  /// workspace. A throwing `interrupt` (called before each layer) leaves the states half advanced: the caller restores
  /// them.
  backend::Matrix hidden(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states,
                         Workspace& workspace, const InterruptCheck& interrupt, LayerTrace* trace = nullptr) const;

  /// out (M, d) activation = ln_f(r[rows]); rows empty: all; rows < 0: none.
  void final_norm(backend::Backend& backend, const backend::Matrix& r, std::span<const std::int32_t> rows,
                  const backend::Matrix& out) const;

  /// Uninitialised (rows, padded_vocab_size) float32 on the backend's device.
  Tensor new_logits(backend::Backend& backend, std::int64_t rows) const;

  /// logits (M, padded_vocab_size) float32 = x Eᵀ.
  void logits(backend::Backend& backend, const backend::Matrix& x, const backend::Matrix& logits) const;

  DType activation_dtype() const { return activation_dtype_; }

 private:
  struct Norm {
    backend::Buffer weight, bias;  // (d) float32; bias null for RMSNorm
  };
  struct Layer {
    Norm norm1;
    std::unique_ptr<Mixer> mixer;
    Norm norm2;                // empty without an MLP
    std::unique_ptr<Mlp> mlp;  // null where the config has none
  };
  Norm load_norm(WeightLoader& loader, const std::string& name) const;
  void norm(backend::Backend& backend, const Norm& norm, const backend::Matrix& r, std::span<const std::int32_t> rows,
            const backend::Matrix& out) const;

  ModelConfig config_;
  std::int64_t prefix_tokens_;
  DType activation_dtype_;
  std::shared_ptr<const backend::LinearWeight> embedding_;
  std::shared_ptr<const backend::LinearWeight> head_;  // the same object when tied
  std::vector<Layer> layers_;
  Norm final_norm_;
  std::vector<std::size_t> scratch_nbytes_;  // of a token: the most that a layer needs of each scratch matrix
  std::size_t nbytes_ = 0;
};

}  // namespace based
