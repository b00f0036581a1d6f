#pragma once

#include "based/mixers/softmax_attention.h"

namespace based {

/// Softmax attention of query i over keys max(0, i − window + 1) … i.
struct SlidingWindowConfig {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t window = 0;
  double scale = 0;
  bool qkv_bias = false;
  bool out_bias = false;
  std::int64_t rotary_dim = 0;  // angle of pair i = position · rotary_base^(−2i/R)
  double rotary_base = 10000.0;
  bool rotary_interleaved = false;

  static constexpr std::string_view kName = "sliding_window";
  static constexpr char kLetter = 'W';
  static constexpr const char* kAbout = "Sliding-window attention.";

  template <class Visitor>
  void fields(Visitor&& field) const {
    softmax_attention::head_fields(*this, field);
    field("window", &SlidingWindowConfig::window, domain::Integer{1, limits::kSize},
          "keys attended, the query's own included");
    softmax_attention::score_fields(*this, field);
  }

  std::vector<Projection> projections(std::int64_t d) const { return softmax_attention::projections(*this, d); }
  std::vector<Parameter> parameters() const { return {}; }

  /// Keys are already rotated.
  RingState ring() const { return {window, num_kv_heads, head_dim}; }
  std::vector<StatePart> state() const { return {ring()}; }

  std::string summary() const { return softmax_attention::summary(*this, std::to_string(window) + " keys"); }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const SlidingWindowConfig&, const SlidingWindowConfig&) = default;
};

}  // namespace based
