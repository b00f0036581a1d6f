#include <array>
#include <cmath>

#include "model/mixer.h"

namespace based {

namespace {

// A = −exp(A_log), from (e, N) to (N, e).
std::vector<float> decay_rates(const std::vector<float>& log, std::int64_t e) {
  const auto channels = static_cast<std::size_t>(e), n = log.size() / channels;
  std::vector<float> a(log.size());
  for (std::size_t c = 0; c < channels; ++c)
    for (std::size_t i = 0; i < n; ++i)
      a[i * channels + c] = static_cast<float>(-std::exp(static_cast<double>(log[c * n + i])));
  return a;
}

class SelectiveScan final : public Mixer {
 public:
  SelectiveScan(const SelectiveScanConfig& config, MixerWeights& weights)
      : config_(config),
        in_(weights.linear("in_proj")),
        x_(weights.rows_of("x_proj", {config.dt_rank, 2 * config.state_size})),
        dt_(weights.linear("dt_proj")),
        out_(weights.linear("out_proj")),
        taps_(weights.parameter("conv.weight")),
        conv_bias_(config.conv_bias ? weights.parameter("conv.bias") : backend::Buffer{}),
        a_(weights.parameter("A_log",
                             [&](const std::vector<float>& log) { return decay_rates(log, config.inner_size); })),
        d_(weights.parameter("D")),
        projection_dtype_(weights.projection_dtype()),
        activation_dtype_(weights.activation_dtype()) {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    const auto scratch = [&](std::size_t i) { return a.scratch(i, sizes()[i].cols, sizes()[i].dtype); };
    const auto xz = scratch(0), y = scratch(1), x = scratch(2), step = scratch(3), bc = scratch(4), dt = scratch(5);
    backend.linear(*in_, a.x, xz, false);
    backend.scan_conv(config_, floats(taps_), floats(conv_bias_), batch, xz, states, layer, x);
    backend.linear(*x_[0], x, step, false);
    backend.linear(*x_[1], x, bc, false);
    backend.linear(*dt_, step, dt, false);
    backend.selective_scan(config_, {floats(a_), floats(d_), xz, x, bc, dt}, batch, states, layer, y);
    backend.linear(*out_, y, out, true);
  }

  std::vector<ScratchSize> scratch() const override {
    const auto sizes = this->sizes();
    return {sizes.begin(), sizes.end()};
  }

 private:
  std::array<ScratchSize, 6> sizes() const {
    const std::int64_t e = config_.inner_size;
    return {{{2 * e, projection_dtype_},                   // [x|z]
             {e, activation_dtype_},                       // y
             {e, projection_dtype_},                       // x after the convolution
             {config_.dt_rank, projection_dtype_},         // δ
             {2 * config_.state_size, projection_dtype_},  // [B|C]
             {e, projection_dtype_}}};                     // Δ before softplus
  }

  SelectiveScanConfig config_;
  std::shared_ptr<const backend::LinearWeight> in_;
  std::vector<std::shared_ptr<const backend::LinearWeight>> x_;  // the rows of δ; those of B and C
  std::shared_ptr<const backend::LinearWeight> dt_, out_;
  backend::Buffer taps_, conv_bias_;  // (e, K), (e) or none
  backend::Buffer a_, d_;             // (N, e), (e)
  DType projection_dtype_, activation_dtype_;
};

}  // namespace

std::unique_ptr<Mixer> SelectiveScanConfig::make(MixerWeights& weights) const {
  return std::make_unique<SelectiveScan>(*this, weights);
}

}  // namespace based
