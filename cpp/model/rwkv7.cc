#include <array>

#include "model/mixer.h"

namespace based {

namespace {

class Rwkv7 final : public Mixer {
 public:
  Rwkv7(const Rwkv7Config& config, MixerWeights& weights)
      : config_(config),
        mix_{weights.parameter("mix_r"), weights.parameter("mix_w"), weights.parameter("mix_k"),
             weights.parameter("mix_v"), weights.parameter("mix_a"), weights.parameter("mix_g")},
        r_(weights.linear("r_proj")),
        k_(weights.linear("k_proj")),
        v_(weights.linear("v_proj")),
        w_{weights.linear("w_down_proj"), weights.linear("w_up_proj")},
        a_{weights.linear("a_down_proj"), weights.linear("a_up_proj")},
        g_{weights.linear("g_down_proj"), weights.linear("g_up_proj")},
        out_(weights.linear("out_proj")),
        k_k_(weights.parameter("k_k")),
        k_a_(weights.parameter("k_a")),
        r_k_(weights.parameter("r_k")),
        norm_(weights.parameter("norm.weight")),
        norm_bias_(weights.parameter("norm.bias")),
        projection_dtype_(weights.projection_dtype()),
        activation_dtype_(weights.activation_dtype()) {}

  void forward(backend::Backend& backend, const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
               const Activations& a, const backend::Matrix& out) const override {
    const auto scratch = [&](std::size_t i) { return a.scratch(i, sizes()[i].cols, sizes()[i].dtype); };
    const std::array<backend::Matrix, 6> mixed{scratch(10), scratch(11), scratch(12),
                                               scratch(13), scratch(14), scratch(15)};
    const backend::Matrix r = scratch(0), y = scratch(1), k = scratch(2), v = scratch(3), w = scratch(4),
                          rate = scratch(5), g = scratch(6), w_low = scratch(7), rate_low = scratch(8),
                          g_low = scratch(9);
    backend.rwkv7_shift(
        config_, {floats(mix_[0]), floats(mix_[1]), floats(mix_[2]), floats(mix_[3]), floats(mix_[4]), floats(mix_[5])},
        batch, a.x, states, layer, mixed);
    backend.linear(*r_, mixed[0], r, false);
    backend.linear(*k_, mixed[2], k, false);
    backend.linear(*v_, mixed[3], v, false);
    backend.linear(*w_[0], mixed[1], w_low, false);
    backend.linear(*a_[0], mixed[4], rate_low, false);
    backend.linear(*g_[0], mixed[5], g_low, false);
    backend.rwkv7_low_rank(config_, w_low, g_low);
    backend.linear(*w_[1], w_low, w, false);
    backend.linear(*a_[1], rate_low, rate, false);
    backend.linear(*g_[1], g_low, g, false);
    backend.rwkv7(config_,
                  {floats(k_k_), floats(k_a_), floats(r_k_), floats(norm_), floats(norm_bias_), r, k, v, w, rate, g},
                  batch, states, layer, y);
    backend.linear(*out_, y, out, true);
  }

  std::vector<ScratchSize> scratch() const override {
    const auto sizes = this->sizes();
    return {sizes.begin(), sizes.end()};
  }

 private:
  using Linear = std::shared_ptr<const backend::LinearWeight>;

  std::array<ScratchSize, 16> sizes() const {
    const ScratchSize wide{config_.inner_size(), projection_dtype_}, mixed{config_.hidden_size, activation_dtype_};
    return {{wide,                                       // r
             {config_.inner_size(), activation_dtype_},  // y
             wide,
             wide,
             wide,
             wide,
             wide,  // k, v, w, a and g
             {config_.decay_rank, projection_dtype_},
             {config_.rate_rank, projection_dtype_},
             {config_.gate_rank, projection_dtype_},
             mixed,
             mixed,
             mixed,
             mixed,
             mixed,
             mixed}};
  }

  Rwkv7Config config_;
  std::array<backend::Buffer, 6> mix_;  // (d): of r, w, k, v, a and g
  Linear r_, k_, v_;
  std::array<Linear, 2> w_, a_, g_;  // down and up
  Linear out_;
  backend::Buffer k_k_, k_a_, r_k_, norm_, norm_bias_;  // (e)
  DType projection_dtype_, activation_dtype_;
};

}  // namespace

std::unique_ptr<Mixer> Rwkv7Config::make(MixerWeights& weights) const {
  return std::make_unique<Rwkv7>(*this, weights);
}

}  // namespace based
