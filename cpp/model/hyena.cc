#include <cmath>
#include <numbers>

#include "model/mixer.h"

namespace based {

namespace {

using Numbers = std::vector<double>;

// The filter (L, e), once for all tokens: a step is then a sum over products with the tokens before.
std::vector<float> filter_table(const HyenaConfig& config, MixerWeights& weights) {
  const auto e = static_cast<std::size_t>(config.inner_size), taps = static_cast<std::size_t>(config.max_length);
  const auto w1 = weights.numbers("filter.w1"), b1 = weights.numbers("filter.b1"), w2 = weights.numbers("filter.w2"),
             b2 = weights.numbers("filter.b2"), w3 = weights.numbers("filter.w3"), b3 = weights.numbers("filter.b3"),
             w4 = weights.numbers("filter.w4"), freq = weights.numbers("filter.freq");
  const auto product = [](const std::vector<float>& w, const Numbers& x, std::size_t row) {
    double sum = 0;
    for (std::size_t i = 0; i < x.size(); ++i) sum += w[row * x.size() + i] * x[i];
    return sum;
  };
  const auto layer = [&](const std::vector<float>& w, const std::vector<float>& b, const Numbers& x) {
    Numbers y;
    for (std::size_t i = 0; i < b.size(); ++i) y.push_back(std::sin(freq[i] * (product(w, x, i) + b[i])));
    return y;
  };
  const double slowest = -std::log(0.01) / 1.5, fastest = -std::log(0.01) / 0.3;
  std::vector<float> table;
  table.reserve(taps * e);
  for (std::size_t n = 0; n < taps; ++n) {
    const double time = taps > 1 ? static_cast<double>(n) / static_cast<double>(taps - 1) : 0;
    const double angle = 2e-4 * std::numbers::pi * static_cast<double>(n) / static_cast<double>(taps);
    const Numbers x = layer(w3, b3, layer(w2, b2, layer(w1, b1, {time, std::cos(angle), -std::sin(angle)})));
    for (std::size_t c = 0; c < e; ++c) {
      const double share = e > 1 ? static_cast<double>(c) / static_cast<double>(e - 1) : 0;
      const double decay = slowest + share * (fastest - slowest);
      table.push_back(static_cast<float>(product(w4, x, c) * std::exp(-time * decay)));
    }
  }
  return table;
}

class Hyena final : public Mixer {
 public:
  Hyena(const HyenaConfig& config, MixerWeights& weights)
      : config_(config),
        projections_(weights, "in_proj", "out_proj"),
        taps_(weights.parameter("conv.weight")),
        bias_(weights.parameter("conv.bias")),
        filter_(weights.upload(filter_table(config, weights))),
        skip_(weights.parameter("filter.D")) {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& u, const backend::Matrix& y) {
      backend.hyena(config_, {floats(taps_), floats(bias_), floats(filter_), floats(skip_)}, batch, u, states, layer,
                    y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  HyenaConfig config_;
  InOutProjections projections_;
  backend::Buffer taps_, bias_;    // (3e, K), (3e)
  backend::Buffer filter_, skip_;  // (L, e), (e)
};

}  // namespace

std::unique_ptr<Mixer> HyenaConfig::make(MixerWeights& weights) const {
  return std::make_unique<Hyena>(*this, weights);
}

}  // namespace based
