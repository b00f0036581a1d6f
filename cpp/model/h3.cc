#include <cmath>
#include <complex>

#include "model/mixer.h"

namespace based {

namespace {

// The last tap is the present token's.
std::vector<float> shift_taps(const H3Config& config, MixerWeights& weights) {
  const auto b = weights.numbers("shift_B"), c = weights.numbers("shift_C"), d = weights.numbers("shift_D");
  const auto taps = static_cast<std::size_t>(config.kernel_size);
  std::vector<float> all;
  for (std::size_t channel = 0; channel < d.size(); ++channel) {
    for (std::size_t i = taps; i-- > 0;) {  // tokens before
      double sum = i == 0 ? d[channel] : 0;
      for (std::size_t n = 0; n + i < taps; ++n) sum += double{b[channel * taps + n]} * c[channel * taps + n + i];
      all.push_back(static_cast<float>(sum));
    }
  }
  return all;
}

// Per head rows of M numbers: real and imaginary parts of what a mode decays by, and what Re x and Im x are multiplied
// by in S.
struct Modes {
  std::vector<float> decay, weight;  // (H, 2, M)

  Modes(const H3Config& config, MixerWeights& weights) {
    const auto log_dt = weights.numbers("log_dt"), log = weights.numbers("A_log"), imag = weights.numbers("A_imag");
    const auto b = weights.numbers("B"), c = weights.numbers("C");
    const auto modes = static_cast<std::size_t>(config.num_modes);
    decay.resize(2 * log.size());
    weight.resize(2 * log.size());
    for (std::size_t i = 0; i < log.size(); ++i) {
      const std::size_t head = i / modes, at = head * 2 * modes + i % modes;
      const double dt = std::exp(double{log_dt[head]});
      const std::complex<double> z = dt / 2 * std::complex<double>(-std::exp(double{log[i]}), imag[i]);
      const std::complex<double> a = (1.0 + z) / (1.0 - z);
      const std::complex<double> g =
          std::complex<double>(b[2 * i], b[2 * i + 1]) * std::complex<double>(c[2 * i], c[2 * i + 1]) * dt / (1.0 - z);
      decay[at] = static_cast<float>(a.real());
      decay[at + modes] = static_cast<float>(a.imag());
      weight[at] = static_cast<float>(2 * g.real());
      weight[at + modes] = static_cast<float>(-2 * g.imag());
    }
  }
};

class H3 final : public Mixer {
 public:
  H3(const H3Config& config, MixerWeights& weights)
      : config_(config),
        projections_(weights, "qkv_proj", "out_proj"),
        taps_(weights.upload(shift_taps(config, weights))),
        skip_(weights.parameter("D")) {
    const Modes modes(config, weights);
    decay_ = weights.upload(modes.decay);
    weight_ = weights.upload(modes.weight);
  }

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    projections_.project_mix_project(backend, a, out, [&](const backend::Matrix& u, const backend::Matrix& y) {
      backend.h3(config_, {floats(taps_), floats(decay_), floats(weight_), floats(skip_)}, batch, u, states, layer, y);
    });
  }

  std::vector<ScratchSize> scratch() const override { return projections_.scratch(); }

 private:
  H3Config config_;
  InOutProjections projections_;
  backend::Buffer taps_, skip_;     // (e, K), (H)
  backend::Buffer decay_, weight_;  // (H, 2, M)
};

}  // namespace

std::unique_ptr<Mixer> H3Config::make(MixerWeights& weights) const { return std::make_unique<H3>(*this, weights); }

}  // namespace based
