#pragma once

#include "based/mixers/description.h"

namespace based {

/// [u₁|u₂] = W_in x + b;  y = W_out(SiLU(conv(u₁)) ⊙ u₂) + b, conv depthwise and causal without bias.
struct GatedConvConfig {
  std::int64_t inner_size = 0;
  std::int64_t kernel_size = 0;
  bool bias = false;

  static constexpr std::string_view kName = "gated_conv";
  static constexpr char kLetter = 'c';
  static constexpr const char* kAbout = "A gated short convolution.";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = GatedConvConfig;
    field("inner_size", &C::inner_size, domain::Integer{1, limits::kSize}, "e, channels of u₁ and of u₂");
    field("kernel_size", &C::kernel_size, domain::Integer{1, limits::kKernelSize}, "K, taps of the convolution");
    field("bias", &C::bias, domain::Flag{}, "on W_in and W_out; the convolution has none");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"in_proj", 2 * inner_size, d, bias}, {"out_proj", d, inner_size, bias}};
  }
  std::vector<Parameter> parameters() const { return {{"conv.weight", {inner_size, kernel_size}}}; }

  /// The last K − 1 values of u₁, oldest first, zeros before the start.
  std::vector<StatePart> state() const {
    return {DenseState{"conv", {kernel_size - 1, inner_size}, StateDType::projection}};
  }

  std::string summary() const {
    return std::to_string(inner_size) + " channels, kernel " + std::to_string(kernel_size) + (bias ? ", biases" : "");
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const GatedConvConfig&, const GatedConvConfig&) = default;
};

}  // namespace based
