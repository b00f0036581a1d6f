#pragma once

#include "based/mixers/description.h"

namespace based {

/// [q|k|v] = W_qkv u;  α = σ(W₂ W₁ u + b)^(1/gate_normalizer), a number for each row of S;  S ← diag(α) S + k vᵀ;
/// y = W_out(RMSNorm(Sᵀq / √key_dim) ⊙ SiLU(W_g u)): gated linear attention (GLA, arXiv:2312.06635).
struct GatedLinearAttentionConfig {
  std::int64_t num_heads = 0;
  std::int64_t key_dim = 0;
  std::int64_t head_dim = 0;
  std::int64_t gate_rank = 0;
  double gate_normalizer = 0;
  double eps = 0;

  static constexpr std::string_view kName = "gated_linear_attention";
  static constexpr char kLetter = 'G';
  static constexpr const char* kAbout = "Linear attention with a decay for each row of its state (GLA).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = GatedLinearAttentionConfig;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("key_dim", &C::key_dim, domain::Integer{1, limits::kHeadDim}, "size of q, k and α per head");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of v per head");
    field("gate_rank", &C::gate_rank, domain::Integer{1, limits::kSize}, "R, rows of W₁");
    field("gate_normalizer", &C::gate_normalizer, domain::Positive{}, "log α = log σ(·) over this");
    field("eps", &C::eps, domain::NonNegative{}, "of the norm of each head's result");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"qkv_proj", num_heads * (2 * key_dim + head_dim), d, false},
            {"g_proj", num_heads * head_dim, d, false, true},
            {"a_down_proj", gate_rank, d, false},
            {"a_up_proj", num_heads * key_dim, gate_rank, true},
            {"out_proj", d, num_heads * head_dim, false}};
  }
  std::vector<Parameter> parameters() const { return {{"norm.weight", {head_dim}}}; }

  /// S.
  std::vector<StatePart> state() const {
    return {DenseState{"matrix", {num_heads, key_dim, head_dim}, StateDType::float32}};
  }

  std::string summary() const {
    return std::to_string(num_heads) + " heads of " + std::to_string(key_dim) + " × " + std::to_string(head_dim) +
           ", gate of rank " + std::to_string(gate_rank);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const GatedLinearAttentionConfig&, const GatedLinearAttentionConfig&) = default;
};

}  // namespace based
