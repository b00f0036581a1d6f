#pragma once

#include "based/mixers/description.h"

namespace based {

/// x' = the token before; m_i = x + (x' − x) ⊙ μ_i for i of r, w, k, v, a, g;  r = W_r m_r, k and v alike;
/// w = exp(−e^−½ σ(W_w2 tanh(W_w1 m_w) + b_w));  a = σ(W_a2 W_a1 m_a + b_a);  g = W_g2 σ(W_g1 m_g);  κ = k ⊙ k_k over
/// its length;  k ← k ⊙ (1 + (a − 1) ⊙ k_a);  S ← diag(w) S − (κ ⊙ a)(Sᵀκ)ᵀ + k vᵀ; y = W_out((GroupNorm(Sᵀr) + (Σ r ⊙
/// k ⊙ r_k) v) ⊙ g): the time mix of RWKV-7 (arXiv:2503.14456), in which no layer reads the values of the first one.
struct Rwkv7Config {
  std::int64_t hidden_size = 0;
  std::int64_t num_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t decay_rank = 0;
  std::int64_t rate_rank = 0;
  std::int64_t gate_rank = 0;
  double eps = 0;

  static constexpr std::string_view kName = "rwkv7";
  static constexpr char kLetter = 'R';
  static constexpr const char* kAbout = "The time mix of RWKV-7.";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = Rwkv7Config;
    field("hidden_size", &C::hidden_size, domain::HiddenSize{}, "d, the model's own");
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of r, k, v, w, a and g per head");
    field("decay_rank", &C::decay_rank, domain::Integer{1, limits::kSize}, "R_w, rows of W_w1");
    field("rate_rank", &C::rate_rank, domain::Integer{1, limits::kSize}, "R_a, rows of W_a1");
    field("gate_rank", &C::gate_rank, domain::Integer{1, limits::kSize}, "R_g, rows of W_g1");
    field("eps", &C::eps, domain::NonNegative{}, "of the norm of each head's result");
  }

  /// Channels of all heads.
  std::int64_t inner_size() const { return num_heads * head_dim; }

  std::vector<Projection> projections(std::int64_t d) const {
    const std::int64_t e = inner_size();
    return {{"r_proj", e, d, false},
            {"k_proj", e, d, false},
            {"v_proj", e, d, false},
            {"w_down_proj", decay_rank, d, false},
            {"w_up_proj", e, decay_rank, true},
            {"a_down_proj", rate_rank, d, false},
            {"a_up_proj", e, rate_rank, true},
            {"g_down_proj", gate_rank, d, false},
            {"g_up_proj", e, gate_rank, false},
            {"out_proj", d, e, false}};
  }
  std::vector<Parameter> parameters() const {
    const std::int64_t d = hidden_size, e = inner_size();
    return {{"mix_r", {d}}, {"mix_w", {d}}, {"mix_k", {d}}, {"mix_v", {d}},       {"mix_a", {d}},    {"mix_g", {d}},
            {"k_k", {e}},   {"k_a", {e}},   {"r_k", {e}},   {"norm.weight", {e}}, {"norm.bias", {e}}};
  }

  /// The token before; and S.
  std::vector<StatePart> state() const {
    return {DenseState{"shift", {hidden_size}, StateDType::float32},
            DenseState{"matrix", {num_heads, head_dim, head_dim}, StateDType::float32}};
  }

  std::string summary() const {
    return std::to_string(num_heads) + " heads of " + std::to_string(head_dim) + ", ranks " +
           std::to_string(decay_rank) + ", " + std::to_string(rate_rank) + " and " + std::to_string(gate_rank);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const Rwkv7Config&, const Rwkv7Config&) = default;
};

}  // namespace based
