#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "based/config.h"
#include "model/weights.h"

namespace based {

/// A scratch matrix that a mixer or an MLP asks for: N rows of `cols` numbers.
struct ScratchSize {
  std::int64_t cols = 0;
  DType dtype = DType::float32;

  std::size_t row_nbytes() const { return static_cast<std::size_t>(cols) * size_of(dtype); }
};

/// Memory of one forward pass, all (N, …) of the batch at hand.
struct Activations {
  backend::Matrix r;                         // (N, d) float32: the residual stream
  backend::Matrix x;                         // (N, d) activation: its norm
  std::span<const backend::Buffer> buffers;  // of scratch(), by index

  /// Uninitialised, (N, cols). Matrices of different indices do not overlap; one index is one piece of memory. Throws
  /// std::logic_error when the asker's scratch() did not announce it.
  backend::Matrix scratch(std::size_t index, std::int64_t cols, DType dtype) const;
};

/// A sequence mixer with its weights. Immutable. To add one, see CONTRIBUTING.md.
class Mixer {
 public:
  virtual ~Mixer() = default;

  /// out += mixer(a.x), advancing the layer's states. out (N, d) float32.
  virtual void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states,
                       int layer, const Activations& a, const backend::Matrix& out) const = 0;

  /// What forward() asks of Activations::scratch, by index.
  virtual std::vector<ScratchSize> scratch() const = 0;
};

/// Loads the tensors that a mixer's description lists.
class MixerWeights {
 public:
  /// `prefix` is "layers.{i}.mixer.".
  MixerWeights(const MixerConfig& mixer, std::int64_t hidden_size, WeightLoader& loader, std::string prefix);

  /// The projection of this name and those stacked on it, as one matrix.
  std::shared_ptr<const backend::LinearWeight> linear(std::string_view name);

  /// Its rows as several matrices, the first of rows[0] rows, and so on; for a projection without bias and neighbours.
  std::vector<std::shared_ptr<const backend::LinearWeight>> rows_of(std::string_view name,
                                                                    const std::vector<std::int64_t>& rows);

  /// A parameter, in float32.
  backend::Buffer parameter(std::string_view name);

  /// What `change` makes of its numbers: as many.
  using Change = std::function<std::vector<float>(const std::vector<float>&)>;
  backend::Buffer parameter(std::string_view name, const Change& change);

  /// The numbers of a parameter, of which something else is computed for the device; and that, on the device.
  std::vector<float> numbers(std::string_view name);
  backend::Buffer upload(const std::vector<float>& values);

  DType activation_dtype() const { return loader_.backend.activation_dtype(loader_.dtype); }
  DType projection_dtype() const { return loader_.backend.projection_dtype(loader_.dtype); }

  /// Throws std::logic_error when a tensor of the description was not loaded.
  void check_all_loaded() const;

 private:
  WeightLoader& loader_;
  std::string prefix_;
  std::vector<Projection> projections_;
  std::vector<Parameter> parameters_;
  std::set<std::string_view> loaded_;  // names
};

/// The outer products of a mixer that is y = mix(W_in x), out += W_out y, with its scratch: u = W_in x in 0, y in 1.
class InOutProjections {
 public:
  InOutProjections(MixerWeights& weights, std::string_view in, std::string_view out);

  std::vector<ScratchSize> scratch() const {
    return {{in_->out_features(), projection_dtype_}, {out_->in_features(), activation_dtype_}};
  }

  /// `mix` is called with u (N, rows of W_in) projection and y (N, columns of W_out) activation, which it writes.
  template <class Mix>
  void project_mix_project(backend::Backend& backend, const Activations& a, const backend::Matrix& out,
                           Mix&& mix) const {
    const auto u = a.scratch(0, in_->out_features(), projection_dtype_);
    const auto y = a.scratch(1, out_->in_features(), activation_dtype_);
    backend.linear(*in_, a.x, u, false);
    mix(u, y);
    backend.linear(*out_, y, out, true);
  }

 private:
  std::shared_ptr<const backend::LinearWeight> in_, out_;
  DType projection_dtype_, activation_dtype_;
};

/// The layer's mixer with its weights. `prefix` is "layers.{i}.mixer.".
std::unique_ptr<Mixer> make_mixer(const MixerConfig& config, std::int64_t hidden_size, WeightLoader& loader,
                                  const std::string& prefix);

}  // namespace based
