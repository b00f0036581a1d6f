#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "based/mixers/description.h"
#include "based/mixers/full_attention.h"
#include "based/mixers/gated_conv.h"
#include "based/mixers/gated_delta_net.h"
#include "based/mixers/gated_linear_attention.h"
#include "based/mixers/h3.h"
#include "based/mixers/hyena.h"
#include "based/mixers/linear_attention.h"
#include "based/mixers/mamba2.h"
#include "based/mixers/prefix_linear_attention.h"
#include "based/mixers/rwkv4.h"
#include "based/mixers/rwkv7.h"
#include "based/mixers/selective_scan.h"
#include "based/mixers/sliding_window.h"
#include "based/tensor.h"

namespace based {

enum class NormKind : std::uint8_t { rms_norm, layer_norm };

/// gelu is the exact (erf) form, gelu_tanh its tanh approximation, relu_squared relu(x)².
enum class Activation : std::uint8_t { identity, silu, gelu, gelu_tanh, sigmoid, relu, relu_squared };

/// A layer's mixer. To add one, see CONTRIBUTING.md.
using MixerConfig =
    std::variant<GatedConvConfig, LinearAttentionConfig, SlidingWindowConfig, PrefixLinearAttentionConfig,
                 FullAttentionConfig, SelectiveScanConfig, GatedDeltaNetConfig, Rwkv4Config, H3Config, HyenaConfig,
                 Mamba2Config, GatedLinearAttentionConfig, Rwkv7Config>;

/// Calls f(std::type_identity<Config>{}) for every kind of mixer.
template <class F>
constexpr void for_each_mixer(F&& f) {
  [&]<class... Configs>(std::type_identity<std::variant<Configs...>>) {
    (f(std::type_identity<Configs>{}), ...);
  }(std::type_identity<MixerConfig>{});
}

/// kName, projections(hidden_size), parameters() and state() of the kind at hand.
std::string_view mixer_name(const MixerConfig& mixer);
std::vector<Projection> mixer_projections(const MixerConfig& mixer, std::int64_t hidden_size);
std::vector<Parameter> mixer_parameters(const MixerConfig& mixer);
std::vector<StatePart> mixer_state(const MixerConfig& mixer);

/// The tensors that the parts of a state are saved as, in order.
std::vector<StateTensor> state_tensors(const std::vector<StatePart>& parts);

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

  /// How many tokens at the beginning of a sequence are read as a whole, in one call: the most of any layer, 0 for a
  /// causal model. A sequence's first prompt is its prefix, or begins with it.
  std::int64_t prefix_tokens() const;

  /// How many tokens a sequence may have: the fewest of any layer that says so; none: any number.
  std::optional<std::int64_t> max_tokens() const;

  friend bool operator==(const ModelConfig&, const ModelConfig&) = default;
};

}  // namespace based
