#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "based/config.h"
#include "model/weights.h"

namespace based {

/// Scratch of one forward pass, all (N, …) of the batch at hand.
struct Activations {
  backend::Matrix r;      // (N, d) float32: the residual stream
  backend::Matrix x;      // (N, d) activation: its norm
  backend::Buffer wide;   // (N, Block::wide_features()) projection: what a mixer reads
  backend::Buffer inner;  // (N, Block::inner_features()) activation: what an output projection reads
  DType projection = DType::float32;

  backend::Matrix wide_matrix(std::int64_t cols) const { return {wide.data.get(), projection, r.rows, cols}; }
  backend::Matrix inner_matrix(std::int64_t cols) const { return {inner.data.get(), x.dtype, r.rows, cols}; }
};

/// A sequence mixer with its weights: out += W_out mix(W_in x). Immutable. To add one: a config struct in
/// based/config.h, an operation in backend.h, a file beside this one, a line in make_mixer.
class Mixer {
 public:
  virtual ~Mixer() = default;

  /// out += mixer(a.x), advancing the layer's states. out (N, d) float32.
  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const;

  std::int64_t wide_features() const { return in_proj_->out_features(); }
  std::int64_t inner_features() const { return out_proj_->in_features(); }
  virtual std::size_t nbytes() const { return in_proj_->nbytes() + out_proj_->nbytes(); }

 protected:
  struct Projections {  // braces load them in this order
    std::shared_ptr<const backend::LinearWeight> in, out;
  };
  explicit Mixer(Projections projections)
      : in_proj_(std::move(projections.in)), out_proj_(std::move(projections.out)) {}

 private:
  /// u (N, wide_features) projection → y (N, inner_features) activation.
  virtual void mix(backend::Backend& backend, const backend::RaggedBatch& batch, const backend::Matrix& u,
                   backend::StatePool& states, int layer, const backend::Matrix& y) const = 0;

  std::shared_ptr<const backend::LinearWeight> in_proj_;
  std::shared_ptr<const backend::LinearWeight> out_proj_;
};

// One file each. `prefix` is "layers.{i}.mixer.".
std::unique_ptr<Mixer> make_gated_conv(const GatedConvConfig& config, std::int64_t hidden_size, WeightLoader& loader,
                                       const std::string& prefix);
std::unique_ptr<Mixer> make_linear_attention(const LinearAttentionConfig& config, std::int64_t hidden_size,
                                             WeightLoader& loader, const std::string& prefix);
std::unique_ptr<Mixer> make_sliding_window(const SlidingWindowConfig& config, std::int64_t hidden_size,
                                           WeightLoader& loader, const std::string& prefix);

std::unique_ptr<Mixer> make_mixer(const MixerConfig& config, std::int64_t hidden_size, WeightLoader& loader,
                                  const std::string& prefix);

}  // namespace based
