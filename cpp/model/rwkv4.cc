#include <algorithm>
#include <array>
#include <cmath>

#include "model/mixer.h"

namespace based {

namespace {

class Rwkv4 final : public Mixer {
 public:
  Rwkv4(const Rwkv4Config& config, MixerWeights& weights)
      : config_(config),
        projections_{weights.linear("k_proj"), weights.linear("v_proj"), weights.linear("r_proj")},
        out_(weights.linear("out_proj")),
        mix_{weights.parameter("time_mix_k"), weights.parameter("time_mix_v"), weights.parameter("time_mix_r")},
        decay_(weights.parameter("time_decay",
                                 [](std::vector<float> log) {
                                   std::ranges::transform(log, log.begin(),
                                                          [](double x) { return static_cast<float>(-std::exp(x)); });
                                   return log;
                                 })),
        first_(weights.parameter("time_first")),
        projection_dtype_(weights.projection_dtype()),
        activation_dtype_(weights.activation_dtype()) {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    const auto scratch = [&](std::size_t i) { return a.scratch(i, sizes()[i].cols, sizes()[i].dtype); };
    const std::array<backend::Matrix, 3> mixed{scratch(4), scratch(5), scratch(6)};
    const backend::Matrix k = scratch(0), y = scratch(1), v = scratch(2), r = scratch(3);
    backend.rwkv4_shift(config_, {floats(mix_[0]), floats(mix_[1]), floats(mix_[2])}, batch, a.x, states, layer, mixed);
    backend.linear(*projections_[0], mixed[0], k, false);
    backend.linear(*projections_[1], mixed[1], v, false);
    backend.linear(*projections_[2], mixed[2], r, false);
    backend.rwkv4(config_, {floats(decay_), floats(first_), k, v, r}, batch, states, layer, y);
    backend.linear(*out_, y, out, true);
  }

  std::vector<ScratchSize> scratch() const override {
    const auto sizes = this->sizes();
    return {sizes.begin(), sizes.end()};
  }

 private:
  std::array<ScratchSize, 7> sizes() const {
    const ScratchSize projected{config_.inner_size, projection_dtype_}, mixed{config_.hidden_size, activation_dtype_};
    return {projected, {config_.inner_size, activation_dtype_}, projected, projected, mixed, mixed, mixed};
  }

  Rwkv4Config config_;
  std::array<std::shared_ptr<const backend::LinearWeight>, 3> projections_;  // of k, v and r
  std::shared_ptr<const backend::LinearWeight> out_;
  std::array<backend::Buffer, 3> mix_;  // (d), likewise
  backend::Buffer decay_, first_;       // (e): −exp(time_decay), time_first
  DType projection_dtype_, activation_dtype_;
};

}  // namespace

std::unique_ptr<Mixer> Rwkv4Config::make(MixerWeights& weights) const {
  return std::make_unique<Rwkv4>(*this, weights);
}

}  // namespace based
