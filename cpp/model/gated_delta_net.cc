#include "model/mixer.h"

namespace based {

namespace {

class GatedDeltaNet final : public Mixer {
 public:
  GatedDeltaNet(const GatedDeltaNetConfig& config, MixerWeights& weights)
      : config_(config),
        projections_(weights, "qkv_proj", "out_proj"),
        taps_(weights.parameter("conv.weight")),
        norm_(weights.parameter("norm.weight")) {
    if (!config.decay) return;
    log_rate_ = weights.parameter("A_log");
    dt_bias_ = weights.parameter("dt_bias");
  }

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& u, const backend::Matrix& y) {
      backend.gated_delta_net(config_, {floats(taps_), floats(norm_), floats(log_rate_), floats(dt_bias_)}, batch, u,
                              states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  GatedDeltaNetConfig config_;
  InOutProjections projections_;
  backend::Buffer taps_, norm_;         // (channels, K), (head_dim)
  backend::Buffer log_rate_, dt_bias_;  // (H), or none
};

}  // namespace

std::unique_ptr<Mixer> GatedDeltaNetConfig::make(MixerWeights& weights) const {
  return std::make_unique<GatedDeltaNet>(*this, weights);
}

}  // namespace based
