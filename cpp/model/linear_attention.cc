#include "model/mixer.h"

namespace based {

namespace {

class LinearAttention final : public Mixer {
 public:
  LinearAttention(const LinearAttentionConfig& config, MixerWeights& weights)
      : config_(config), projections_(weights, "proj_q", "out_proj") {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& qkv, const backend::Matrix& y) {
      backend.linear_attention(config_, batch, qkv, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  LinearAttentionConfig config_;
  InOutProjections projections_;
};

}  // namespace

std::unique_ptr<Mixer> LinearAttentionConfig::make(MixerWeights& weights) const {
  return std::make_unique<LinearAttention>(*this, weights);
}

}  // namespace based
