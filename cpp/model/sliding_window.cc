#include "model/mixer.h"

namespace based {

namespace {

class SlidingWindow final : public Mixer {
 public:
  SlidingWindow(const SlidingWindowConfig& config, std::int64_t d, WeightLoader& loader, const std::string& prefix)
      : Mixer({loader.linear({{prefix + "qkv_proj", (config.num_heads + 2 * config.num_kv_heads) * config.head_dim}}, d,
                             config.qkv_bias),
               loader.linear({{prefix + "out_proj", d}}, config.num_heads * config.head_dim, config.out_bias)}),
        config_(config) {}

 private:
  void mix(backend::Backend& backend, const backend::RaggedBatch& batch, const backend::Matrix& u,
           backend::StatePool& states, int layer, const backend::Matrix& y) const override {
    backend.sliding_window(config_, batch, u, states, layer, y);
  }

  SlidingWindowConfig config_;
};

}  // namespace

std::unique_ptr<Mixer> make_sliding_window(const SlidingWindowConfig& config, std::int64_t hidden_size,
                                           WeightLoader& loader, const std::string& prefix) {
  return std::make_unique<SlidingWindow>(config, hidden_size, loader, prefix);
}

}  // namespace based
