#pragma once

#include "based/mixers/description.h"
#include "based/mixers/linear_attention.h"

namespace based {

/// Linear attention whose first tokens, the prefix, are read as a whole: with p(s) = 1 + s + s²/2, k', v' the prefix's
/// own keys and values, and M = min(enc_length, tokens of the sequence's first prompt),
/// y_t = (Σ_{j≤t} p(q_t·k_j/√f) v_j + Σ_{m<M} p(q_t·k'_m/√f) v'_m) / (the same sums of p alone + eps).
/// Every t sees all of the prefix, also what comes after it. The state is that of linear attention: both sums in one.
struct PrefixLinearAttentionConfig {
  std::int64_t num_heads = 0;
  std::int64_t feature_dim = 0;
  std::int64_t head_dim = 0;
  std::int64_t enc_length = 0;
  double eps = 0;

  static constexpr std::string_view kName = "prefix_linear_attention";
  static constexpr char kLetter = 'P';
  static constexpr const char* kAbout =
      "Second-order Taylor linear attention that reads a prefix as a whole (JRT-RNN).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = PrefixLinearAttentionConfig;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("feature_dim", &C::feature_dim, domain::Integer{1, limits::kFeatureDim}, "f, size of q and k per head");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of v per head");
    field("enc_length", &C::enc_length, domain::Integer{1, limits::kPrefix}, "tokens of the prefix");
    field("eps", &C::eps, domain::NonNegative{}, "added to the denominator");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"proj_q", num_heads * feature_dim, d, false},        {"proj_k", num_heads * feature_dim, d, false, true},
            {"proj_v", num_heads * head_dim, d, false, true},     {"proj_k_enc", num_heads * feature_dim, d, false},
            {"proj_v_enc", num_heads * head_dim, d, false, true}, {"out_proj", d, num_heads * head_dim, false}};
  }
  std::vector<Parameter> parameters() const { return {}; }

  /// Of the same tokens without a prefix.
  LinearAttentionConfig attention() const { return {num_heads, feature_dim, head_dim, eps}; }
  std::vector<StatePart> state() const { return attention().state(); }

  std::int64_t prefix_tokens() const { return enc_length; }

  std::string summary() const { return attention().summary() + ", prefix " + std::to_string(enc_length); }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const PrefixLinearAttentionConfig&, const PrefixLinearAttentionConfig&) = default;
};

}  // namespace based
