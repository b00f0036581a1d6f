#pragma once

#include "based/mixers/softmax_attention.h"

namespace based {

/// Softmax attention of query i over keys 0 … i.
struct FullAttentionConfig {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  double scale = 0;
  bool qkv_bias = false;
  bool out_bias = false;
  std::int64_t rotary_dim = 0;  // angle of pair i = position · rotary_base^(−2i/R)
  double rotary_base = 10000.0;
  bool rotary_interleaved = false;

  static constexpr std::string_view kName = "full_attention";
  static constexpr char kLetter = 'A';
  static constexpr const char* kAbout = "Full causal attention.";

  template <class Visitor>
  void fields(Visitor&& field) const {
    softmax_attention::head_fields(*this, field);
    softmax_attention::score_fields(*this, field);
  }

  std::vector<Projection> projections(std::int64_t d) const { return softmax_attention::projections(*this, d); }
  std::vector<Parameter> parameters() const { return {}; }

  /// Keys are already rotated.
  ContextState context() const { return {num_kv_heads, head_dim}; }
  std::vector<StatePart> state() const { return {context()}; }

  std::string summary() const { return softmax_attention::summary(*this, "all keys"); }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const FullAttentionConfig&, const FullAttentionConfig&) = default;
};

}  // namespace based
