#include "model/mixer.h"

namespace based {

namespace {

class LinearAttention final : public Mixer {
 public:
  LinearAttention(const LinearAttentionConfig& config, std::int64_t d, WeightLoader& loader, const std::string& prefix)
      : Mixer({loader.linear({{prefix + "proj_q", config.num_heads * config.feature_dim},
                              {prefix + "proj_k", config.num_heads * config.feature_dim},
                              {prefix + "proj_v", config.num_heads * config.head_dim}},
                             d, false),
               loader.linear({{prefix + "out_proj", d}}, config.num_heads * config.head_dim, false)}),
        config_(config) {}

 private:
  void mix(backend::Backend& backend, const backend::RaggedBatch& batch, const backend::Matrix& u,
           backend::StatePool& states, int layer, const backend::Matrix& y) const override {
    backend.linear_attention(config_, batch, u, states, layer, y);
  }

  LinearAttentionConfig config_;
};

}  // namespace

std::unique_ptr<Mixer> make_linear_attention(const LinearAttentionConfig& config, std::int64_t hidden_size,
                                             WeightLoader& loader, const std::string& prefix) {
  return std::make_unique<LinearAttention>(config, hidden_size, loader, prefix);
}

}  // namespace based
