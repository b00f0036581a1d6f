#include "model/mixer.h"

namespace based {

namespace {

class GatedConv final : public Mixer {
 public:
  GatedConv(const GatedConvConfig& config, std::int64_t d, WeightLoader& loader, const std::string& prefix)
      : Mixer({loader.linear({{prefix + "in_proj", 2 * config.inner_size}}, d, config.bias),
               loader.linear({{prefix + "out_proj", d}}, config.inner_size, config.bias)}),
        config_(config),
        taps_(loader.vector(prefix + "conv.weight", {config.inner_size, config.kernel_size})) {}

  std::size_t nbytes() const override { return Mixer::nbytes() + taps_.nbytes; }

 private:
  void mix(backend::Backend& backend, const backend::RaggedBatch& batch, const backend::Matrix& u,
           backend::StatePool& states, int layer, const backend::Matrix& y) const override {
    backend.gated_conv(config_, static_cast<const float*>(taps_.data.get()), batch, u, states, layer, y);
  }

  GatedConvConfig config_;
  backend::Buffer taps_;  // (e, K)
};

}  // namespace

std::unique_ptr<Mixer> make_gated_conv(const GatedConvConfig& config, std::int64_t hidden_size, WeightLoader& loader,
                                       const std::string& prefix) {
  return std::make_unique<GatedConv>(config, hidden_size, loader, prefix);
}

}  // namespace based
