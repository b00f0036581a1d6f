#include "model/mixer.h"

namespace based {

namespace {

class GatedConv final : public Mixer {
 public:
  GatedConv(const GatedConvConfig& config, MixerWeights& weights)
      : config_(config), projections_(weights, "in_proj", "out_proj"), taps_(weights.parameter("conv.weight")) {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& u, const backend::Matrix& y) {
      backend.gated_conv(config_, static_cast<const float*>(taps_.data.get()), batch, u, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  GatedConvConfig config_;
  InOutProjections projections_;
  backend::Buffer taps_;  // (e, K)
};

}  // namespace

std::unique_ptr<Mixer> GatedConvConfig::make(MixerWeights& weights) const {
  return std::make_unique<GatedConv>(*this, weights);
}

}  // namespace based
