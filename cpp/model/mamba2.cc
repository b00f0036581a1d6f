#include "model/mixer.h"

namespace based {

namespace {

class Mamba2 final : public Mixer {
 public:
  Mamba2(const Mamba2Config& config, MixerWeights& weights)
      : config_(config),
        projections_(weights, "xbc_proj", "out_proj"),
        taps_(weights.parameter("conv.weight")),
        conv_bias_(config.conv_bias ? weights.parameter("conv.bias") : backend::Buffer{}),
        norm_(weights.parameter("norm.weight")),
        log_rate_(weights.parameter("A_log")),
        d_(weights.parameter("D")),
        dt_bias_(weights.parameter("dt_bias")),
        xbc_{config.channels(), weights.projection_dtype()} {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& u, const backend::Matrix& y) {
      backend.mamba2(config_,
                     {floats(taps_), floats(conv_bias_), floats(norm_), floats(log_rate_), floats(d_), floats(dt_bias_),
                      u, a.scratch(2, xbc_.cols, xbc_.dtype)},
                     batch, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override {
    std::vector<ScratchSize> sizes = projections_.scratch();
    sizes.push_back(xbc_);
    return sizes;
  }

 private:
  Mamba2Config config_;
  InOutProjections projections_;
  backend::Buffer taps_, conv_bias_;        // (channels, K), (channels) or none
  backend::Buffer norm_;                    // (e)
  backend::Buffer log_rate_, d_, dt_bias_;  // (H)
  ScratchSize xbc_;                         // [x|B|C] after the convolution
};

}  // namespace

std::unique_ptr<Mixer> Mamba2Config::make(MixerWeights& weights) const {
  return std::make_unique<Mamba2>(*this, weights);
}

}  // namespace based
