#pragma once

#include "based/mixers/description.h"

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
    using C = SlidingWindowConfig;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("num_kv_heads", &C::num_kv_heads, domain::Divisor{num_heads, "num_heads"},
          "H_kv; query head h reads kv head ⌊h · H_kv / H⌋");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of q, k and v per head");
    field("window", &C::window, domain::Integer{1, limits::kSize}, "keys attended, the query's own included");
    field("scale", &C::scale, domain::Positive{}, "of q·k before the softmax");
    field("qkv_bias", &C::qkv_bias, domain::Flag{}, "whether `qkv_proj` has a bias");
    field("out_bias", &C::out_bias, domain::Flag{}, "whether `out_proj` has a bias");
    // n = ⌈R/2⌉ pairs need 2n ≤ head_dim.
    field("rotary_dim", &C::rotary_dim, domain::Integer{0, head_dim / 2 * 2, "head_dim rounded down to an even number"},
          "R; 0 for no rotary embedding. n = ⌈R/2⌉ pairs (x[i], x[i+n]) turn by position · rotary_base^(−2i/R)");
    field("rotary_base", &C::rotary_base, domain::Positive{}, "of the angles");
    field("rotary_interleaved", &C::rotary_interleaved, domain::Flag{}, "the pairs are (x[2i], x[2i+1])");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"qkv_proj", (num_heads + 2 * num_kv_heads) * head_dim, d, qkv_bias},
            {"out_proj", d, num_heads * head_dim, out_bias}};
  }
  std::vector<Parameter> parameters() const { return {}; }

  /// Keys are already rotated.
  RingState ring() const { return {window, num_kv_heads, head_dim}; }
  std::vector<StatePart> state() const { return {ring()}; }

  std::string summary() const {
    std::string text = std::to_string(num_heads) + " heads of " + std::to_string(head_dim);
    if (num_kv_heads != num_heads) text += " on " + std::to_string(num_kv_heads) + " key heads";
    return text + ", " + std::to_string(window) + " keys, rotary on " + std::to_string(rotary_dim);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const SlidingWindowConfig&, const SlidingWindowConfig&) = default;
};

}  // namespace based
