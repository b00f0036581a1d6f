#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "based/tensor.h"

namespace based {

enum class NormKind : std::uint8_t { rms_norm, layer_norm };

/// gelu is the exact (erf) form, gelu_tanh its tanh approximation, relu_squared relu(x)².
enum class Activation : std::uint8_t { identity, silu, gelu, gelu_tanh, sigmoid, relu, relu_squared };

/// [u₁|u₂] = W_in x + b;  y = W_out(SiLU(conv(u₁)) ⊙ u₂) + b, conv depthwise and causal without bias.
struct GatedConvConfig {
  std::int64_t inner_size = 0;   // e: channels of u₁ and of u₂
  std::int64_t kernel_size = 0;  // K taps; the state holds the last K − 1 values of u₁
  bool bias = false;             // on W_in and W_out
  friend bool operator==(const GatedConvConfig&, const GatedConvConfig&) = default;
};

/// y_t = Σ_{j≤t} p(q_t·k_j/√f) v_j / (Σ_{j≤t} p(q_t·k_j/√f) + eps) with p(s) = 1 + s + s²/2.
struct LinearAttentionConfig {
  std::int64_t num_heads = 0;
  std::int64_t feature_dim = 0;  // f: size of q and k per head
  std::int64_t head_dim = 0;     // size of v per head
  double eps = 0;

  /// Size of the packed feature map: 1 + f + f(f+1)/2.
  std::int64_t num_features() const { return 1 + feature_dim + feature_dim * (feature_dim + 1) / 2; }
  friend bool operator==(const LinearAttentionConfig&, const LinearAttentionConfig&) = default;
};

/// Softmax attention of query i over keys max(0, i − window + 1) … i.
struct SlidingWindowConfig {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;  // divides num_heads; query head h reads kv head ⌊h·num_kv_heads/num_heads⌋
  std::int64_t head_dim = 0;
  std::int64_t window = 0;  // keys attended, the query's own included
  double scale = 0;         // of q·k before the softmax
  bool qkv_bias = false;
  bool out_bias = false;
  std::int64_t rotary_dim = 0;  // R; 0: no rotary. Pairs n = ⌈R/2⌉; angle_i = position · rotary_base^(−2i/R)
  double rotary_base = 10000.0;
  bool rotary_interleaved = false;  // pairs (x[2i], x[2i+1]) instead of (x[i], x[i+n])
  friend bool operator==(const SlidingWindowConfig&, const SlidingWindowConfig&) = default;
};

using MixerConfig = std::variant<GatedConvConfig, LinearAttentionConfig, SlidingWindowConfig>;

/// "gated_conv", "linear_attention" or "sliding_window".
std::string_view mixer_name(const MixerConfig& mixer);

/// gated: y = W₂(h[:m] ⊙ act(h[m:])) with h = W₁x + b₁ of 2m numbers; otherwise y = W₂ act(W₁x + b₁).
struct MlpConfig {
  bool gated = false;
  Activation activation = Activation::identity;
  std::int64_t inner_size = 0;  // m
  bool fc1_bias = false;
  bool fc2_bias = false;

  /// Numbers of h.
  std::int64_t fc1_rows() const { return gated ? 2 * inner_size : inner_size; }
  friend bool operator==(const MlpConfig&, const MlpConfig&) = default;
};

/// Every number that the maths needs; the in-memory form of a model directory's config.json (docs/model-format.md).
struct ModelConfig {
  static constexpr std::int64_t kFormatVersion = 1;

  std::int64_t vocab_size = 0;         // tokens; ids are 0 … vocab_size − 1
  std::int64_t padded_vocab_size = 0;  // rows of the embedding; rows ≥ vocab_size are no tokens
  std::int64_t hidden_size = 0;
  NormKind norm = NormKind::rms_norm;
  double norm_eps = 0;
  std::optional<MlpConfig> mlp;  // of every layer; none: a layer is its mixer alone, without norm2
  bool tie_embeddings = true;
  std::optional<std::int64_t> bos_token_id;
  std::optional<std::int64_t> eos_token_id;
  std::vector<MixerConfig> layers;

  /// Parses and validates. `where` (a path) opens every message. Throws FormatError on a missing, unknown or
  /// duplicate key, a wrong type, or a value outside its domain.
  static ModelConfig from_json(std::string_view text, const std::string& where);

  /// The canonical text: from_json(to_json()) gives an equal config.
  std::string to_json() const;

  /// Throws FormatError naming the first field outside its domain.
  void validate(const std::string& where) const;

  /// Parameters, a tied head counted once, padding rows included.
  std::int64_t num_parameters() const;

  friend bool operator==(const ModelConfig&, const ModelConfig&) = default;
};

}  // namespace based
