#pragma once

#include "based/mixers/description.h"

namespace based {

/// [q|k|v] = W_qkv u + b;  k ← conv(k), K taps per channel: (Σ_n shift_B[n] shift_C[n + i]) for the token i before, and
/// shift_D more for the present one;  per head, with z = e^{log_dt} A / 2 and A = −exp(A_log) + i A_imag of M modes:
/// x ← (1 + z) / (1 − z) x + k vᵀ,  S = 2 Re Σ_m C B e^{log_dt} / (1 − z) x + D k vᵀ;  y = W_out(Sᵀq) + b: H3
/// (arXiv:2212.14052), whose second state space model is S4D, discretised bilinearly.
struct H3Config {
  std::int64_t num_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t kernel_size = 0;
  std::int64_t num_modes = 0;

  static constexpr std::string_view kName = "h3";
  static constexpr char kLetter = 'H';
  static constexpr const char* kAbout = "Two state space models with products between them (H3).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = H3Config;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of q, k and v per head");
    field("kernel_size", &C::kernel_size, domain::Integer{1, limits::kKernelSize}, "K, taps of the shift");
    field("num_modes", &C::num_modes, domain::Integer{1, limits::kFeatureDim}, "M, complex modes of each head");
  }

  /// Of q, of k and of v, of all heads.
  std::int64_t channels() const { return num_heads * head_dim; }

  std::vector<Projection> projections(std::int64_t d) const {
    return {{"qkv_proj", 3 * channels(), d, true}, {"out_proj", d, channels(), true}};
  }
  std::vector<Parameter> parameters() const {
    return {{"shift_B", {channels(), kernel_size}},
            {"shift_C", {channels(), kernel_size}},
            {"shift_D", {channels()}},
            {"log_dt", {num_heads}},
            {"A_log", {num_heads, num_modes}},
            {"A_imag", {num_heads, num_modes}},
            {"B", {num_heads, num_modes, 2}},
            {"C", {num_heads, num_modes, 2}},
            {"D", {num_heads}}};
  }

  /// The last K − 1 values of k before the convolution, oldest first, zeros before the start; and x, for each product
  /// of a number of k and one of v the real parts of its modes, then the imaginary ones.
  std::vector<StatePart> state() const {
    return {DenseState{"conv", {kernel_size - 1, channels()}, StateDType::projection},
            DenseState{"modes", {num_heads, head_dim, head_dim, 2, num_modes}, StateDType::float32}};
  }

  std::string summary() const {
    return std::to_string(num_heads) + " heads of " + std::to_string(head_dim) + ", " + std::to_string(num_modes) +
           " modes, kernel " + std::to_string(kernel_size);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const H3Config&, const H3Config&) = default;
};

}  // namespace based
