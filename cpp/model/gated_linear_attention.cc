#include "model/mixer.h"

namespace based {

namespace {

class GatedLinearAttention final : public Mixer {
 public:
  GatedLinearAttention(const GatedLinearAttentionConfig& config, MixerWeights& weights)
      : config_(config),
        projections_(weights, "qkv_proj", "out_proj"),
        down_(weights.linear("a_down_proj")),
        up_(weights.linear("a_up_proj")),
        norm_(weights.parameter("norm.weight")),
        low_{down_->out_features(), weights.projection_dtype()},
        a_{up_->out_features(), weights.projection_dtype()} {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& u, const backend::Matrix& y) {
      const auto low = a.scratch(2, low_.cols, low_.dtype), gate = a.scratch(3, a_.cols, a_.dtype);
      backend.linear(*down_, a.x, low, false);
      backend.linear(*up_, low, gate, false);
      backend.gated_linear_attention(config_, static_cast<const float*>(norm_.data.get()), batch, u, gate, states,
                                     layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override {
    std::vector<ScratchSize> sizes = projections_.scratch();
    sizes.insert(sizes.end(), {low_, a_});
    return sizes;
  }

 private:
  GatedLinearAttentionConfig config_;
  InOutProjections projections_;
  std::shared_ptr<const backend::LinearWeight> down_, up_;  // W₁, W₂
  backend::Buffer norm_;                                    // (head_dim)
  ScratchSize low_, a_;                                     // W₁ u, W₂ W₁ u + b
};

}  // namespace

std::unique_ptr<Mixer> GatedLinearAttentionConfig::make(MixerWeights& weights) const {
  return std::make_unique<GatedLinearAttention>(*this, weights);
}

}  // namespace based
