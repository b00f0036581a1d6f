#pragma once

#include "based/mixers/description.h"

namespace based {

/// y_t = Σ_{j≤t} p(q_t·k_j/√f) v_j / (Σ_{j≤t} p(q_t·k_j/√f) + eps) with p(s) = 1 + s + s²/2.
struct LinearAttentionConfig {
  std::int64_t num_heads = 0;
  std::int64_t feature_dim = 0;
  std::int64_t head_dim = 0;
  double eps = 0;

  static constexpr std::string_view kName = "linear_attention";
  static constexpr char kLetter = 'L';
  static constexpr const char* kAbout = "Second-order Taylor linear attention.";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = LinearAttentionConfig;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("feature_dim", &C::feature_dim, domain::Integer{1, limits::kFeatureDim}, "f, size of q and k per head");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of v per head");
    field("eps", &C::eps, domain::NonNegative{}, "added to the denominator");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"proj_q", num_heads * feature_dim, d, false},
            {"proj_k", num_heads * feature_dim, d, false, true},
            {"proj_v", num_heads * head_dim, d, false, true},
            {"out_proj", d, num_heads * head_dim, false}};
  }
  std::vector<Parameter> parameters() const { return {}; }

  TaylorState taylor() const { return {num_heads, feature_dim, head_dim}; }
  std::vector<StatePart> state() const { return {taylor()}; }

  /// Size of the packed feature map: 1 + f + f(f+1)/2.
  std::int64_t num_features() const { return taylor().num_features(); }

  std::string summary() const {
    return std::to_string(num_heads) + " heads of " + std::to_string(head_dim) + ", feature size " +
           std::to_string(feature_dim);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const LinearAttentionConfig&, const LinearAttentionConfig&) = default;
};

}  // namespace based
