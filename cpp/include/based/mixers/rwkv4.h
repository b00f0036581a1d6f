#pragma once

#include "based/mixers/description.h"

namespace based {

/// x' = the token before; k = W_k(μ_k ⊙ x + (1 − μ_k) ⊙ x'), v and r alike;  w = −exp(time_decay), per channel;
/// y_t = (Σ_{j<t} e^{(t−1−j) w + k_j} v_j + e^{time_first + k_t} v_t) / (the same without v);  W_out(σ(r) ⊙ y): the
/// time mix of RWKV-4 (arXiv:2305.13048).
struct Rwkv4Config {
  std::int64_t hidden_size = 0;
  std::int64_t inner_size = 0;

  static constexpr std::string_view kName = "rwkv4";
  static constexpr char kLetter = 'r';
  static constexpr const char* kAbout = "The time mix of RWKV-4.";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = Rwkv4Config;
    field("hidden_size", &C::hidden_size, domain::HiddenSize{}, "d, the model's own");
    field("inner_size", &C::inner_size, domain::Integer{1, limits::kSize}, "e, channels of k, v and r");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"k_proj", inner_size, d, false},
            {"v_proj", inner_size, d, false},
            {"r_proj", inner_size, d, false},
            {"out_proj", d, inner_size, false}};
  }
  std::vector<Parameter> parameters() const {
    return {{"time_decay", {inner_size}},
            {"time_first", {inner_size}},
            {"time_mix_k", {hidden_size}},
            {"time_mix_v", {hidden_size}},
            {"time_mix_r", {hidden_size}}};
  }

  /// The token before; and the two sums over all tokens, each over e^o, with o the largest exponent in them.
  std::vector<StatePart> state() const {
    return {DenseState{"shift", {hidden_size}, StateDType::float32},
            DenseState{"wkv", {3, inner_size}, StateDType::float32}};
  }

  std::string summary() const { return std::to_string(inner_size) + " channels"; }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const Rwkv4Config&, const Rwkv4Config&) = default;
};

}  // namespace based
