#include "model/mixer.h"

namespace based {

void Mixer::forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
                    const Activations& a, const backend::Matrix& out) const {
  const auto u = a.wide_matrix(wide_features());
  const auto y = a.inner_matrix(inner_features());
  backend.linear(*in_proj_, a.x, u, false);
  mix(backend, batch, u, states, layer, y);
  backend.linear(*out_proj_, y, out, true);
}

std::unique_ptr<Mixer> make_mixer(const MixerConfig& config, std::int64_t hidden_size, WeightLoader& loader,
                                  const std::string& prefix) {
  struct Maker {
    std::int64_t d;
    WeightLoader& loader;
    const std::string& prefix;
    auto operator()(const GatedConvConfig& c) const { return make_gated_conv(c, d, loader, prefix); }
    auto operator()(const LinearAttentionConfig& c) const { return make_linear_attention(c, d, loader, prefix); }
    auto operator()(const SlidingWindowConfig& c) const { return make_sliding_window(c, d, loader, prefix); }
  };
  return std::visit(Maker{hidden_size, loader, prefix}, config);
}

}  // namespace based
