#include "model/mixer.h"

namespace based {

namespace {

void attend(backend::Backend& backend, const SlidingWindowConfig& config, const backend::RaggedBatch& batch,
            const backend::Matrix& qkv, backend::StatePool& states, int layer, const backend::Matrix& out) {
  backend.sliding_window(config, batch, qkv, states, layer, out);
}

void attend(backend::Backend& backend, const FullAttentionConfig& config, const backend::RaggedBatch& batch,
            const backend::Matrix& qkv, backend::StatePool& states, int layer, const backend::Matrix& out) {
  backend.full_attention(config, batch, qkv, states, layer, out);
}

template <class Config>
class SoftmaxAttention final : public Mixer {
 public:
  SoftmaxAttention(const Config& config, MixerWeights& weights)
      : config_(config), projections_(weights, "qkv_proj", "out_proj") {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& qkv, const backend::Matrix& y) {
      attend(backend, config_, batch, qkv, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  Config config_;
  InOutProjections projections_;
};

}  // namespace

std::unique_ptr<Mixer> SlidingWindowConfig::make(MixerWeights& weights) const {
  return std::make_unique<SoftmaxAttention<SlidingWindowConfig>>(*this, weights);
}

std::unique_ptr<Mixer> FullAttentionConfig::make(MixerWeights& weights) const {
  return std::make_unique<SoftmaxAttention<FullAttentionConfig>>(*this, weights);
}

}  // namespace based
