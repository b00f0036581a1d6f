#include "based/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "based/error.h"
#include "temporary_folder.h"

namespace based {
namespace {

constexpr const char* kText = R"({
  "format": "based",
  "format_version": 1,
  "vocab_size": 258,
  "padded_vocab_size": 264,
  "hidden_size": 128,
  "norm": {"type": "rms_norm", "eps": 1e-05},
  "mlp": {"gated": true, "activation": "silu", "inner_size": 256, "fc1_bias": false, "fc2_bias": false},
  "tie_embeddings": true,
  "bos_token_id": null,
  "eos_token_id": 257,
  "layers": [
    {"mixer": "gated_conv", "inner_size": 256, "kernel_size": 3, "bias": true},
    {"mixer": "linear_attention", "num_heads": 4, "feature_dim": 16, "head_dim": 32, "eps": 1e-12},
    {"mixer": "sliding_window", "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "window": 9, "scale": 0.1767766952966369, "qkv_bias": false, "out_bias": false, "rotary_dim": 32, "rotary_base": 10000.0, "rotary_interleaved": false}
  ]
}
)";

ModelConfig parse(const std::string& text) { return ModelConfig::from_json(text, "config.json"); }

/// kText with one place changed.
std::string edited(const std::string& from, const std::string& to) {
  std::string text = kText;
  const auto at = text.find(from);
  if (at == text.npos) ADD_FAILURE() << "no such text: " << from;
  return text.replace(at, from.size(), to);
}

TEST(Config, ReadsEveryField) {
  const ModelConfig c = parse(kText);
  EXPECT_EQ(c.vocab_size, 258);
  EXPECT_EQ(c.padded_vocab_size, 264);
  EXPECT_EQ(c.hidden_size, 128);
  EXPECT_EQ(c.norm, NormKind::rms_norm);
  EXPECT_EQ(c.norm_eps, 1e-5);
  EXPECT_EQ(c.mlp, (MlpConfig{true, Activation::silu, 256, false, false}));
  EXPECT_TRUE(c.tie_embeddings);
  EXPECT_EQ(c.bos_token_id, std::nullopt);
  EXPECT_EQ(c.eos_token_id, 257);
  ASSERT_EQ(c.layers.size(), 3u);
  EXPECT_EQ(c.layers[0], MixerConfig(GatedConvConfig{256, 3, true}));
  EXPECT_EQ(c.layers[1], MixerConfig(LinearAttentionConfig{4, 16, 32, 1e-12}));
  EXPECT_EQ(c.layers[2],
            MixerConfig(SlidingWindowConfig{4, 4, 32, 9, 0.1767766952966369, false, false, 32, 10000, false}));
  EXPECT_EQ(mixer_name(c.layers[0]), "gated_conv");
  EXPECT_EQ(mixer_name(c.layers[1]), "linear_attention");
  EXPECT_EQ(mixer_name(c.layers[2]), "sliding_window");
}

TEST(Config, WritesTheCanonicalText) {
  EXPECT_EQ(parse(kText).to_json(), kText);
  ModelConfig c = parse(kText);
  c.norm = NormKind::layer_norm;
  c.norm_eps = 0.1 + 0.2;
  c.bos_token_id = 0;
  std::get<LinearAttentionConfig>(c.layers[1]).eps = 0;
  for (const Activation activation : {Activation::identity, Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                      Activation::sigmoid, Activation::relu, Activation::relu_squared}) {
    c.mlp->activation = activation;
    EXPECT_EQ(parse(c.to_json()), c);
  }
  c.mlp = std::nullopt;
  EXPECT_EQ(parse(c.to_json()), c);
  c.norm_eps = std::numeric_limits<double>::infinity();
  EXPECT_THROW_WITH(c.to_json(), FormatError, "norm.eps: found inf");
}

TEST(Config, CountsParameters) {
  ModelConfig c = parse(kText);
  const std::int64_t d = 128, e = 256, m = 256;
  const std::int64_t embedding = 264 * d;
  const std::int64_t layer = 2 * d + 3 * m * d;
  const std::int64_t conv = 2 * e * d + 2 * e + e * 3 + d * e + d;
  const std::int64_t linear = 2 * 4 * 16 * d + 2 * 4 * 32 * d;
  const std::int64_t window = 3 * 4 * 32 * d + d * 4 * 32;
  EXPECT_EQ(c.num_parameters(), embedding + d + 3 * layer + conv + linear + window);

  const std::int64_t plain = c.num_parameters();
  c.tie_embeddings = false;
  EXPECT_EQ(c.num_parameters(), plain + embedding);
  c.norm = NormKind::layer_norm;
  EXPECT_EQ(c.num_parameters(), plain + embedding + 7 * d);
  c.mlp = {false, Activation::gelu, m, true, true};
  EXPECT_EQ(c.num_parameters(), plain + embedding + 7 * d + 3 * (m + d - m * d));
  c.mlp = std::nullopt;
  EXPECT_EQ(c.num_parameters(), 2 * embedding + 4 * 2 * d + conv + linear + window);
  auto& attention = std::get<SlidingWindowConfig>(c.layers[2]);
  const std::int64_t before = c.num_parameters();
  attention.num_kv_heads = 2;
  attention.qkv_bias = attention.out_bias = true;
  EXPECT_EQ(c.num_parameters(), before - 2 * 2 * 32 * d + 8 * 32 + d);
}

TEST(Config, RefusesWhatIsNotItsFormat) {
  EXPECT_THROW_WITH(parse(""), FormatError, "config.json: expected JSON");
  EXPECT_THROW_WITH(parse("[]"), FormatError, "found an array of 0, expected an object");
  EXPECT_THROW_WITH(parse(R"({"model_type": "gpt2"})"), FormatError, "format: found no such key, expected \"based\"");
  EXPECT_THROW_WITH(parse(edited("\"based\"", "\"gguf\"")), FormatError, "format: found \"gguf\"");
  EXPECT_THROW_WITH(parse(edited("\"format_version\": 1", "\"format_version\": 2")), FormatError,
                    "format_version: found 2, expected 1");
  EXPECT_THROW_WITH(parse(edited("\"vocab_size\": 258", "\"vocab_size\": 258, \"vocab_size\": 258")), FormatError,
                    "found the key \"vocab_size\" twice");
}

TEST(Config, RefusesEveryMissingKey) {
  struct Removal {
    const char* from;
    const char* to;
    const char* path;
  };
  const Removal removals[] = {
      {R"("vocab_size": 258,)", "", "vocab_size"},
      {R"("padded_vocab_size": 264,)", "", "padded_vocab_size"},
      {R"("hidden_size": 128,)", "", "hidden_size"},
      {R"("norm": {"type": "rms_norm", "eps": 1e-05},)", "", "norm"},
      {R"("type": "rms_norm", )", "", "norm.type"},
      {R"(, "eps": 1e-05)", "", "norm.eps"},
      {R"("gated": true, )", "", "mlp.gated"},
      {R"("activation": "silu", )", "", "mlp.activation"},
      {R"("inner_size": 256, "fc1)", R"("fc1)", "mlp.inner_size"},
      {R"("fc1_bias": false, )", "", "mlp.fc1_bias"},
      {R"(, "fc2_bias": false)", "", "mlp.fc2_bias"},
      {R"("tie_embeddings": true,)", "", "tie_embeddings"},
      {R"("bos_token_id": null,)", "", "bos_token_id"},
      {R"("eos_token_id": 257,)", "", "eos_token_id"},
      {R"("mixer": "gated_conv", )", "", "layers[0].mixer"},
      {R"("inner_size": 256, "kernel)", R"("kernel)", "layers[0].inner_size"},
      {R"("kernel_size": 3, )", "", "layers[0].kernel_size"},
      {R"(, "bias": true)", "", "layers[0].bias"},
      {R"("num_heads": 4, "feature)", R"("feature)", "layers[1].num_heads"},
      {R"("feature_dim": 16, )", "", "layers[1].feature_dim"},
      {R"("head_dim": 32, "eps)", R"("eps)", "layers[1].head_dim"},
      {R"(, "eps": 1e-12)", "", "layers[1].eps"},
      {R"("num_heads": 4, "num_kv)", R"("num_kv)", "layers[2].num_heads"},
      {R"("num_kv_heads": 4, )", "", "layers[2].num_kv_heads"},
      {R"("head_dim": 32, "window)", R"("window)", "layers[2].head_dim"},
      {R"("window": 9, )", "", "layers[2].window"},
      {R"("scale": 0.1767766952966369, )", "", "layers[2].scale"},
      {R"("qkv_bias": false, )", "", "layers[2].qkv_bias"},
      {R"("out_bias": false, )", "", "layers[2].out_bias"},
      {R"("rotary_dim": 32, )", "", "layers[2].rotary_dim"},
      {R"("rotary_base": 10000.0, )", "", "layers[2].rotary_base"},
      {R"(, "rotary_interleaved": false)", "", "layers[2].rotary_interleaved"},
  };
  for (const auto& [from, to, path] : removals) {
    EXPECT_THROW_WITH(parse(edited(from, to)), FormatError,
                      std::string("config.json: ") + path + ": found no such key");
  }
}

TEST(Config, RefusesUnknownKeys) {
  EXPECT_THROW_WITH(parse(edited("\"hidden_size\": 128", "\"hidden_size\": 128, \"dropout\": 0")), FormatError,
                    "config.json: dropout: found an unknown key");
  EXPECT_THROW_WITH(parse(edited("\"eps\": 1e-05", "\"eps\": 1e-05, \"bias\": true")), FormatError,
                    "norm.bias: found an unknown key");
  EXPECT_THROW_WITH(parse(edited("\"gated\": true", "\"gated\": true, \"x\": 1")), FormatError,
                    "mlp.x: found an unknown");
  EXPECT_THROW_WITH(
      parse(edited("\"feature_dim\": 16", "\"feature_dim\": 16, \"window\": 9")), FormatError,
      "layers[1].window: found an unknown key, expected only eps, feature_dim, head_dim, mixer, num_heads");
}

TEST(Config, RefusesWrongTypes) {
  EXPECT_THROW_WITH(parse(edited("\"hidden_size\": 128", "\"hidden_size\": 128.0")), FormatError,
                    "hidden_size: found 128.0, expected an integer");
  EXPECT_THROW_WITH(parse(edited("\"hidden_size\": 128", "\"hidden_size\": \"128\"")), FormatError,
                    "hidden_size: found \"128\", expected an integer");
  EXPECT_THROW_WITH(parse(edited("\"hidden_size\": 128", "\"hidden_size\": null")), FormatError, "found null");
  EXPECT_THROW_WITH(parse(edited("\"hidden_size\": 128", "\"hidden_size\": 99999999999999999999")), FormatError,
                    "hidden_size: found 1e+20, expected an integer");
  EXPECT_THROW_WITH(parse(edited("\"tie_embeddings\": true", "\"tie_embeddings\": 1")), FormatError,
                    "tie_embeddings: found 1, expected true or false");
  EXPECT_THROW_WITH(parse(edited("\"eps\": 1e-12", "\"eps\": \"1e-12\"")), FormatError,
                    "layers[1].eps: found \"1e-12\", expected a number");
  EXPECT_THROW_WITH(parse(edited("\"eos_token_id\": 257", "\"eos_token_id\": [257]")), FormatError,
                    "eos_token_id: found an array of 1, expected an integer or null");
  EXPECT_THROW_WITH(parse(edited("{\"type\": \"rms_norm\", \"eps\": 1e-05}", "\"rms_norm\"")), FormatError,
                    "norm: found \"rms_norm\", expected an object");
  EXPECT_THROW_WITH(parse(edited("\"rms_norm\"", "\"batch_norm\"")), FormatError,
                    "norm.type: found \"batch_norm\", expected one of rms_norm, layer_norm");
  EXPECT_THROW_WITH(parse(edited("\"silu\"", "\"tanh\"")), FormatError, "mlp.activation: found \"tanh\"");
  EXPECT_THROW_WITH(parse(edited("\"gated_conv\"", "\"mamba\"")), FormatError,
                    "layers[0].mixer: found \"mamba\", expected one of gated_conv, linear_attention, sliding_window, "
                    "prefix_linear_attention");
}

TEST(Config, RefusesValuesOutsideTheirDomain) {
  const auto refused = [](const std::function<void(ModelConfig&)>& change, const std::string& text) {
    ModelConfig c = parse(kText);
    change(c);
    EXPECT_THROW_WITH(c.validate("x"), FormatError, "x: " + text);
  };
  const auto conv = [](ModelConfig& c) -> auto& { return std::get<GatedConvConfig>(c.layers[0]); };
  const auto linear = [](ModelConfig& c) -> auto& { return std::get<LinearAttentionConfig>(c.layers[1]); };
  const auto window = [](ModelConfig& c) -> auto& { return std::get<SlidingWindowConfig>(c.layers[2]); };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-1}, huge, -huge}) {
    refused([&](auto& c) { c.vocab_size = bad; }, "vocab_size: found " + std::to_string(bad));
    refused([&](auto& c) { c.padded_vocab_size = bad; }, "padded_vocab_size: found");
    refused([&](auto& c) { c.hidden_size = bad; }, "hidden_size: found");
    refused([&](auto& c) { c.mlp->inner_size = bad; }, "mlp.inner_size: found");
    refused([&](auto& c) { conv(c).inner_size = bad; }, "layers[0].inner_size: found");
    refused([&](auto& c) { conv(c).kernel_size = bad; }, "layers[0].kernel_size: found");
    refused([&](auto& c) { linear(c).num_heads = bad; }, "layers[1].num_heads: found");
    refused([&](auto& c) { linear(c).feature_dim = bad; }, "layers[1].feature_dim: found");
    refused([&](auto& c) { linear(c).head_dim = bad; }, "layers[1].head_dim: found");
    refused([&](auto& c) { window(c).num_heads = bad; }, "layers[2].num_heads: found");
    refused([&](auto& c) { window(c).num_kv_heads = bad; }, "layers[2].num_kv_heads: found");
    refused([&](auto& c) { window(c).head_dim = bad; }, "layers[2].head_dim: found");
    refused([&](auto& c) { window(c).window = bad; }, "layers[2].window: found");
  }
  for (const double bad : {-1.0, nan, inf, -inf}) {
    refused([&](auto& c) { c.norm_eps = bad; }, "norm.eps: found");
    refused([&](auto& c) { linear(c).eps = bad; }, "layers[1].eps: found");
    refused([&](auto& c) { window(c).scale = bad; }, "layers[2].scale: found");
    refused([&](auto& c) { window(c).rotary_base = bad; }, "layers[2].rotary_base: found");
  }
  refused([&](auto& c) { c.norm_eps = 0; }, "norm.eps: found 0.0, expected a finite number > 0");
  refused([&](auto& c) { window(c).scale = 0; }, "layers[2].scale: found");
  refused([&](auto& c) { c.padded_vocab_size = 257; }, "padded_vocab_size: found 257, expected an integer from 258");
  refused([&](auto& c) { c.eos_token_id = 258; }, "eos_token_id: found 258, expected an integer from 0 to 257");
  refused([&](auto& c) { c.bos_token_id = -1; }, "bos_token_id: found -1");
  refused([&](auto& c) { window(c).num_kv_heads = 3; }, "layers[2].num_kv_heads: found 3, expected a divisor of");
  refused([&](auto& c) { window(c).num_kv_heads = 8; },
          "layers[2].num_kv_heads: found 8, expected an integer from 1 to 4");
  refused([&](auto& c) { window(c).rotary_dim = 33; },
          "layers[2].rotary_dim: found 33, expected an integer from 0 to 32");
  refused([&](auto& c) { window(c).rotary_dim = -2; }, "layers[2].rotary_dim: found -2");
  refused([&](auto& c) { c.layers.clear(); }, "layers: found 0 layers, expected 1 to 4096");
  refused([&](auto& c) { c.layers.assign(4097, c.layers[0]); }, "layers: found 4097 layers");

  ModelConfig c = parse(kText);
  window(c).head_dim = 33;
  window(c).rotary_dim = 31;  // touches 32 numbers
  EXPECT_NO_THROW(c.validate("x"));
  window(c).rotary_dim = 33;  // would touch 34
  EXPECT_THROW(c.validate("x"), FormatError);
}

TEST(Config, RefusesMatricesAndStatesWhoseSizeCouldOverflow) {
  const auto refused = [](const std::function<void(ModelConfig&)>& change, const std::string& text) {
    ModelConfig c = parse(kText);
    change(c);
    EXPECT_THROW_WITH(c.validate("x"), FormatError, "x: " + text);
  };
  const std::int64_t big = 1 << 24;
  refused([&](auto& c) { c.hidden_size = c.padded_vocab_size = big; }, "embedding.weight: found (16777216, 16777216)");
  refused([&](auto& c) { c.hidden_size = c.mlp->inner_size = big; }, "mlp.fc1.weight: found");
  refused([&](auto& c) { c.layers[0] = GatedConvConfig{big, 1 << 16, false}; }, "layers[0].conv.weight: found");
  refused(
      [&](auto& c) { c.layers[0] = GatedConvConfig{big, 3, false}, c.hidden_size = 1 << 20, c.mlp->inner_size = 1; },
      "layers[0].in_proj.weight: found");
  refused([&](auto& c) { c.layers[1] = LinearAttentionConfig{1 << 16, 4096, 1 << 16, 0}; }, "layers[1].state: found");
  refused([&](auto& c) { c.layers[1] = LinearAttentionConfig{1 << 16, 1, 1 << 16, 0}, c.hidden_size = 1 << 20; },
          "layers[1].proj_v.weight: found");
  refused([&](auto& c) { c.layers[2] = SlidingWindowConfig{1 << 16, 1 << 16, 1 << 16, 1, 1}; },
          "layers[2].qkv_proj.weight: found");
  refused([&](auto& c) { c.layers[2] = SlidingWindowConfig{1 << 10, 1 << 10, 1 << 10, big, 1}; },
          "layers[2].state: found");
}

TEST(Config, SurvivesTruncationAndDamage) {
  const std::string text = kText;
  for (std::size_t n = 0; n + 2 < text.size(); ++n) {  // without its last newline it is whole
    EXPECT_THROW(parse(text.substr(0, n)), FormatError) << n;
  }
  std::uint32_t random = 1;
  for (int i = 0; i < 20000; ++i) {
    random = random * 1664525 + 1013904223;
    std::string damaged = text;
    damaged[(random >> 8) % text.size()] = static_cast<char>(random >> 24);
    try {
      const ModelConfig c = parse(damaged);
      EXPECT_EQ(parse(c.to_json()), c);
    } catch (const FormatError&) {
    }
  }
}

}  // namespace
}  // namespace based
