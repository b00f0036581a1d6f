#include "model/mixer.h"

namespace based {

namespace {

class PrefixLinearAttention final : public Mixer {
 public:
  PrefixLinearAttention(const PrefixLinearAttentionConfig& config, MixerWeights& weights)
      : config_(config),
        projections_(weights, "proj_q", "out_proj"),
        encoder_(weights.linear("proj_k_enc")),
        projection_dtype_(weights.projection_dtype()) {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& qkv, const backend::Matrix& y) {
      const auto encoder = a.scratch(2, encoder_->out_features(), projection_dtype_);
      if (batch.begins_a_sequence()) backend.linear(*encoder_, a.x, encoder, false);  // else nobody reads it
      backend.prefix_linear_attention(config_, batch, qkv, encoder, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override {
    std::vector<ScratchSize> sizes = projections_.scratch();
    sizes.push_back({encoder_->out_features(), projection_dtype_});
    return sizes;
  }

 private:
  PrefixLinearAttentionConfig config_;
  InOutProjections projections_;
  std::shared_ptr<const backend::LinearWeight> encoder_;
  DType projection_dtype_;
};

}  // namespace

std::unique_ptr<Mixer> PrefixLinearAttentionConfig::make(MixerWeights& weights) const {
  return std::make_unique<PrefixLinearAttention>(*this, weights);
}

}  // namespace based
