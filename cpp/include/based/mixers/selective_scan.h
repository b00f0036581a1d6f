#pragma once

#include "based/mixers/description.h"

namespace based {

/// [x|z] = W_in u;  x ← SiLU(conv(x) + b);  [δ|B|C] = W_x x;  Δ = softplus(W_dt δ + b_dt);  A = −exp(A_log);
/// h[c, n] ← exp(Δ[c] A[c, n]) h[c, n] + Δ[c] B[n] x[c];  y = W_out((Σ_n C[n] h[c, n] + D ⊙ x) ⊙ SiLU(z)): Mamba.
struct SelectiveScanConfig {
  std::int64_t inner_size = 0;
  std::int64_t state_size = 0;
  std::int64_t kernel_size = 0;
  std::int64_t dt_rank = 0;
  bool conv_bias = false;
  bool bias = false;

  static constexpr std::string_view kName = "selective_scan";
  static constexpr char kLetter = 'S';
  static constexpr const char* kAbout = "A selective scan (Mamba).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = SelectiveScanConfig;
    field("inner_size", &C::inner_size, domain::Integer{1, limits::kSize}, "e, channels of the scan");
    field("state_size", &C::state_size, domain::Integer{1, limits::kHeadDim}, "N, numbers of state per channel");
    field("kernel_size", &C::kernel_size, domain::Integer{1, limits::kKernelSize}, "K, taps of the convolution");
    field("dt_rank", &C::dt_rank, domain::Integer{1, limits::kSize}, "R, rank of the step's projection");
    field("conv_bias", &C::conv_bias, domain::Flag{}, "whether the convolution has one");
    field("bias", &C::bias, domain::Flag{}, "on W_in and W_out; W_x has none, W_dt has one always");
  }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"in_proj", 2 * inner_size, d, bias},
            {"x_proj", dt_rank + 2 * state_size, inner_size, false},
            {"dt_proj", inner_size, dt_rank, true},
            {"out_proj", d, inner_size, bias}};
  }
  std::vector<Parameter> parameters() const {
    std::vector<Parameter> all{
        {"conv.weight", {inner_size, kernel_size}}, {"A_log", {inner_size, state_size}}, {"D", {inner_size}}};
    if (conv_bias) all.push_back({"conv.bias", {inner_size}});
    return all;
  }

  /// The last K − 1 values of x before the convolution, oldest first, zeros before the start; and h.
  std::vector<StatePart> state() const {
    return {DenseState{"conv", {kernel_size - 1, inner_size}, StateDType::projection},
            DenseState{"scan", {state_size, inner_size}, StateDType::float32}};
  }

  std::string summary() const {
    return std::to_string(inner_size) + " channels, " + std::to_string(state_size) +
           " numbers of state each, step of rank " + std::to_string(dt_rank) + ", kernel " +
           std::to_string(kernel_size) + (bias ? ", biases" : "");
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const SelectiveScanConfig&, const SelectiveScanConfig&) = default;
};

}  // namespace based
