#pragma once

// What the descriptions of softmax attentions share: C is SlidingWindowConfig or FullAttentionConfig.

#include <string>
#include <vector>

#include "based/mixers/description.h"

namespace based::softmax_attention {

template <class C, class Visitor>
void head_fields(const C& c, Visitor& field) {
  field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
  field("num_kv_heads", &C::num_kv_heads, domain::Divisor{c.num_heads, "num_heads"},
        "H_kv; query head h reads kv head ⌊h · H_kv / H⌋");
  field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of q, k and v per head");
}

template <class C, class Visitor>
void score_fields(const C& c, Visitor& field) {
  field("scale", &C::scale, domain::Positive{}, "of q·k before the softmax");
  field("qkv_bias", &C::qkv_bias, domain::Flag{}, "whether `qkv_proj` has a bias");
  field("out_bias", &C::out_bias, domain::Flag{}, "whether `out_proj` has a bias");
  // n = ⌈R/2⌉ pairs need 2n ≤ head_dim.
  field("rotary_dim", &C::rotary_dim, domain::Integer{0, c.head_dim / 2 * 2, "head_dim rounded down to an even number"},
        "R; 0 for no rotary embedding. n = ⌈R/2⌉ pairs (x[i], x[i+n]) turn by position · rotary_base^(−2i/R)");
  field("rotary_base", &C::rotary_base, domain::Positive{}, "of the angles");
  field("rotary_interleaved", &C::rotary_interleaved, domain::Flag{}, "the pairs are (x[2i], x[2i+1])");
}

template <class C>
std::vector<Projection> projections(const C& c, std::int64_t d) {
  return {{"qkv_proj", (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, d, c.qkv_bias},
          {"out_proj", d, c.num_heads * c.head_dim, c.out_bias}};
}

/// `keys`: which keys a query attends to, in words.
template <class C>
std::string summary(const C& c, const std::string& keys) {
  std::string text = std::to_string(c.num_heads) + " heads of " + std::to_string(c.head_dim);
  if (c.num_kv_heads != c.num_heads) text += " on " + std::to_string(c.num_kv_heads) + " key heads";
  return text + ", " + keys + ", rotary on " + std::to_string(c.rotary_dim);
}

}  // namespace based::softmax_attention
