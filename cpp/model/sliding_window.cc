#include "model/mixer.h"

namespace based {

namespace {

class SlidingWindow final : public Mixer {
 public:
  SlidingWindow(const SlidingWindowConfig& config, MixerWeights& weights)
      : config_(config), projections_(weights, "qkv_proj", "out_proj") {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& qkv, const backend::Matrix& y) {
      backend.sliding_window(config_, batch, qkv, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  SlidingWindowConfig config_;
  InOutProjections projections_;
};

}  // namespace

std::unique_ptr<Mixer> SlidingWindowConfig::make(MixerWeights& weights) const {
  return std::make_unique<SlidingWindow>(*this, weights);
}

}  // namespace based
