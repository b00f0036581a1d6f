#pragma once

#include "based/mixers/description.h"

namespace based {

/// [q|k|v] = SiLU(conv(W_qkv u)), q and k of length 1;  β = σ(W_b u);  α = exp(−exp(A_log) softplus(W_a u + dt_bias));
/// S ← α S;  S ← S + k (β (v − Sᵀk))ᵀ;  y = W_out(RMSNorm(Sᵀq / √key_dim) ⊙ SiLU(W_g u)): Gated DeltaNet
/// (arXiv:2412.06464). Without a decay α is 1: DeltaNet (arXiv:2406.06484). Without an output gate the last factor is.
struct GatedDeltaNetConfig {
  std::int64_t num_heads = 0;
  std::int64_t key_dim = 0;
  std::int64_t head_dim = 0;
  std::int64_t kernel_size = 0;
  double eps = 0;
  bool decay = false;
  bool output_gate = false;

  static constexpr std::string_view kName = "gated_delta_net";
  static constexpr char kLetter = 'D';
  static constexpr const char* kAbout = "A gated delta rule (Gated DeltaNet; DeltaNet without the decay).";

  template <class Visitor>
  void fields(Visitor&& field) const {
    using C = GatedDeltaNetConfig;
    field("num_heads", &C::num_heads, domain::Integer{1, limits::kHeads}, "H");
    field("key_dim", &C::key_dim, domain::Integer{1, limits::kHeadDim}, "size of q and k per head");
    field("head_dim", &C::head_dim, domain::Integer{1, limits::kHeadDim}, "size of v per head");
    field("kernel_size", &C::kernel_size, domain::Integer{1, limits::kKernelSize}, "K, taps of the convolution");
    field("eps", &C::eps, domain::NonNegative{}, "of the norm of each head's result");
    field("decay", &C::decay, domain::Flag{}, "whether there is an α; false: α = 1, DeltaNet");
    field("output_gate", &C::output_gate, domain::Flag{}, "whether there is a W_g");
  }

  /// Channels of the convolution: q of all heads, then k, then v.
  std::int64_t channels() const { return num_heads * (2 * key_dim + head_dim); }

  std::vector<Projection> projections(std::int64_t d) const {
    std::vector<Projection> all{{"qkv_proj", channels(), d, false}, {"b_proj", num_heads, d, false, true}};
    if (decay) all.push_back({"a_proj", num_heads, d, false, true});
    if (output_gate) all.push_back({"g_proj", num_heads * head_dim, d, false, true});
    all.push_back({"out_proj", d, num_heads * head_dim, false});
    return all;
  }
  std::vector<Parameter> parameters() const {
    std::vector<Parameter> all{{"conv.weight", {channels(), kernel_size}}, {"norm.weight", {head_dim}}};
    if (decay) {
      all.push_back({"A_log", {num_heads}});
      all.push_back({"dt_bias", {num_heads}});
    }
    return all;
  }

  /// The last K − 1 values of W_qkv u, oldest first, zeros before the start; and S.
  std::vector<StatePart> state() const {
    return {DenseState{"conv", {kernel_size - 1, channels()}, StateDType::projection},
            DenseState{"delta", {num_heads, key_dim, head_dim}, StateDType::float32}};
  }

  std::string summary() const {
    return std::to_string(num_heads) + " heads of " + std::to_string(key_dim) + " × " + std::to_string(head_dim) +
           (decay ? ", decay" : "") + (output_gate ? ", output gate" : "") + ", kernel " + std::to_string(kernel_size);
  }

  std::unique_ptr<Mixer> make(MixerWeights& weights) const;

  friend bool operator==(const GatedDeltaNetConfig&, const GatedDeltaNetConfig&) = default;
};

}  // namespace based
