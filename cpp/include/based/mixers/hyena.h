#pragma once

#include "based/mixers/description.h"

namespace based {

/// [x₁|x₂|v] = conv(W_in u + b) + conv.bias;  g = v ⊙ x₁;  y_t = W_out((Σ_{s≤t} h[t − s] ⊙ g_s + D ⊙ g_t) ⊙ x₂) + b:
/// Hyena of order 2 (arXiv:2302.10866). The filter h is made of 4 matrices: with τ = n / (L − 1) and θ = 2·10⁻⁴ π n /
/// L, h[n] = w₄ s(w₃ s(w₂ s(w₁ (τ, cos θ, −sin θ) + b₁) + b₂) + b₃) ⊙ e^{−τ δ}, s(x) = sin(freq ⊙ x), and δ goes in
/// equal steps from −ln(0.01) / 1.5 to −ln(0.01) / 0.3. There are L of h[n]: a sequence has no more tokens.
struct HyenaConfig {
  std::int64_t inner_size = 0;
  std::int64_t kernel_size = 0;
  std::int64_t max_length = 0;
  std::int64_t filter_size = 0;

  static constexpr std::string_view kName = "hyena";
  static constexpr char kLetter = 'Y';
  static constexpr const char* kAbout = "A long convolution between two gates, its filter made by an MLP (Hyena).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = HyenaConfig;
    field("inner_size", &C::inner_size, domain::Integer{1, limits::kSize}, "e, channels of x₁, of x₂ and of v");
    field("kernel_size", &C::kernel_size, domain::Integer{1, limits::kKernelSize}, "K, taps of the short convolution");
    field("max_length", &C::max_length, domain::Integer{1, limits::kSize},
          "L, taps of the long one: a sequence has no more tokens");
    field("filter_size", &C::filter_size, domain::Integer{1, limits::kSize}, "F, width of the filter's MLP");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"in_proj", 3 * inner_size, d, true}, {"out_proj", d, inner_size, true}};
  }
  std::vector<Parameter> parameters() const {
    return {{"conv.weight", {3 * inner_size, kernel_size}},
            {"conv.bias", {3 * inner_size}},
            {"filter.w1", {filter_size, 3}},
            {"filter.b1", {filter_size}},
            {"filter.w2", {filter_size, filter_size}},
            {"filter.b2", {filter_size}},
            {"filter.w3", {filter_size, filter_size}},
            {"filter.b3", {filter_size}},
            {"filter.w4", {inner_size, filter_size}},
            {"filter.freq", {filter_size}},
            {"filter.D", {inner_size}}};
  }

  /// The last K − 1 values of W_in u + b, oldest first, zeros before the start; and g of all tokens, zeros behind them.
  std::vector<StatePart> state() const {
    return {DenseState{"conv", {kernel_size - 1, 3 * inner_size}, StateDType::projection},
            DenseState{"products", {max_length, inner_size}, StateDType::float32}};
  }

  std::int64_t max_tokens() const { return max_length; }

  std::string summary() const {
    return std::to_string(inner_size) + " channels, " + std::to_string(max_length) + " tokens, kernel " +
           std::to_string(kernel_size);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const HyenaConfig&, const HyenaConfig&) = default;
};

}  // namespace based
