#pragma once

#include "based/mixers/description.h"

namespace based {

/// [x|B|C] = SiLU(conv(W_xbc u) + b);  Δ = softplus(W_dt u + dt_bias);  α = exp(−exp(A_log) Δ);  S ← α S + B (Δ x)ᵀ;
/// y = W_out RMSNorm((Sᵀ C + D x) ⊙ SiLU(W_z u)), the norm over the channels of a group: Mamba-2 (arXiv:2405.21060).
struct Mamba2Config {
  std::int64_t num_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t state_size = 0;
  std::int64_t num_groups = 0;
  std::int64_t kernel_size = 0;
  double eps = 0;
  bool conv_bias = false;

  static constexpr std::string_view kName = "mamba2";
  static constexpr char kLetter = 'M';
  static constexpr const char* kAbout = "A state-space model with one decay per head (Mamba-2).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = Mamba2Config;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of x per head");
    field("state_size", &C::state_size, domain::Integer{1, limits::kHeadDim}, "N, size of B and C");
    field("num_groups", &C::num_groups, domain::Divisor{num_heads, "num_heads"},
          "G; head h reads B and C of group ⌊h · G / H⌋");
    field("kernel_size", &C::kernel_size, domain::Integer{1, limits::kKernelSize}, "K, taps of the convolution");
    field("eps", &C::eps, domain::NonNegative{}, "of the norm of each group's result");
    field("conv_bias", &C::conv_bias, domain::Flag{}, "whether the convolution has one");
  }

  std::int64_t inner_size() const { return num_heads * head_dim; }
  /// Of the convolution: x of all heads, then B of all groups, then C.
  std::int64_t channels() const { return inner_size() + 2 * num_groups * state_size; }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"xbc_proj", channels(), d, false},
            {"z_proj", inner_size(), d, false, true},
            {"dt_proj", num_heads, d, false, true},
            {"out_proj", d, inner_size(), false}};
  }
  std::vector<Parameter> parameters() const {
    std::vector<Parameter> all{{"conv.weight", {channels(), kernel_size}},
                               {"norm.weight", {inner_size()}},
                               {"A_log", {num_heads}},
                               {"D", {num_heads}},
                               {"dt_bias", {num_heads}}};
    if (conv_bias) all.push_back({"conv.bias", {channels()}});
    return all;
  }

  /// The last K − 1 values of W_xbc u, oldest first, zeros before the start; and S.
  std::vector<StatePart> state() const {
    return {DenseState{"conv", {kernel_size - 1, channels()}, StateDType::projection},
            DenseState{"matrix", {num_heads, state_size, head_dim}, StateDType::float32}};
  }

  std::string summary() const {
    return std::to_string(num_heads) + " heads of " + std::to_string(state_size) + " × " + std::to_string(head_dim) +
           ", " + std::to_string(num_groups) + (num_groups == 1 ? " group" : " groups") + ", kernel " +
           std::to_string(kernel_size);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const Mamba2Config&, const Mamba2Config&) = default;
};

}  // namespace based
