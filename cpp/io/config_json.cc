#include <cmath>
#include <initializer_list>
#include <utility>

#include "based/config.h"
#include "based/error.h"
#include "io/json.h"
#include "io/text.h"

namespace based {

using io::concat;
using io::Json;
using io::JsonObject;

namespace {

// Upper limits. They are far beyond any model, and small enough that the element count of every matrix and of every
// layer's state, a product of at most four of them, fits int64 before it is compared with kMaxElements; and that
// sums of 4096 layers of float32 elements do.
constexpr std::int64_t kMaxSize = 1 << 24;  // vocabulary, hidden and inner sizes, window
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxHeads = 1 << 16;
constexpr std::int64_t kMaxHeadDim = 1 << 16;
constexpr std::int64_t kMaxFeatureDim = 4096;
constexpr std::int64_t kMaxKernelSize = 1 << 16;
constexpr std::int64_t kMaxElements = std::int64_t{1} << 40;  // of one matrix, of one layer's state: exclusive

constexpr std::string_view kFormat = "based";

constexpr std::pair<std::string_view, NormKind> kNorms[] = {{"rms_norm", NormKind::rms_norm},
                                                            {"layer_norm", NormKind::layer_norm}};
constexpr std::pair<std::string_view, Activation> kActivations[] = {
    {"identity", Activation::identity},        {"silu", Activation::silu},       {"gelu", Activation::gelu},
    {"gelu_tanh", Activation::gelu_tanh},      {"sigmoid", Activation::sigmoid}, {"relu", Activation::relu},
    {"relu_squared", Activation::relu_squared}};

template <class Table>
auto read_name(JsonObject& object, std::string_view key, const Table& table) {
  const std::string& text = object.string(key);
  std::string names;
  for (const auto& [name, value] : table) {
    if (name == text) return value;
    io::append_item(names, name);
  }
  object.fail(key, io::in_quotes(text), concat("one of ", names));
}

template <class Table, class Enum>
std::string_view name_in(const Table& table, Enum value) {
  for (const auto& [name, v] : table) {
    if (v == value) return name;
  }
  throw InvalidArgument("config: found an enumerator outside its type");
}

MixerConfig read_mixer(const Json& json, const std::string& where, const std::string& path) {
  JsonObject object(json, where, path);
  const std::string& mixer = object.string("mixer");
  MixerConfig result;
  if (mixer == "gated_conv") {
    result = GatedConvConfig{.inner_size = object.integer("inner_size"),
                             .kernel_size = object.integer("kernel_size"),
                             .bias = object.boolean("bias")};
  } else if (mixer == "linear_attention") {
    result = LinearAttentionConfig{.num_heads = object.integer("num_heads"),
                                   .feature_dim = object.integer("feature_dim"),
                                   .head_dim = object.integer("head_dim"),
                                   .eps = object.number("eps")};
  } else if (mixer == "sliding_window") {
    result = SlidingWindowConfig{.num_heads = object.integer("num_heads"),
                                 .num_kv_heads = object.integer("num_kv_heads"),
                                 .head_dim = object.integer("head_dim"),
                                 .window = object.integer("window"),
                                 .scale = object.number("scale"),
                                 .qkv_bias = object.boolean("qkv_bias"),
                                 .out_bias = object.boolean("out_bias"),
                                 .rotary_dim = object.integer("rotary_dim"),
                                 .rotary_base = object.number("rotary_base"),
                                 .rotary_interleaved = object.boolean("rotary_interleaved")};
  } else {
    object.fail("mixer", io::in_quotes(mixer), "one of gated_conv, linear_attention, sliding_window");
  }
  object.finish();
  return result;
}

/// Throws FormatError "where: path.field: found …, expected …" for a value outside its domain.
class Checker {
 public:
  Checker(const std::string& where, std::string path) : where_(where), path_(std::move(path)) {}

  void range(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) const {
    if (value < low || value > high) {
      fail(field, std::to_string(value), concat("an integer from ", low, " to ", high));
    }
  }
  void positive(const char* field, double value) const {
    if (!(value > 0 && std::isfinite(value))) fail(field, io::json_number(value), "a finite number > 0");
  }
  void non_negative(const char* field, double value) const {
    if (!(value >= 0 && std::isfinite(value))) fail(field, io::json_number(value), "a finite number >= 0");
  }
  void elements(const char* what, std::int64_t rows, std::int64_t cols) const {
    if (rows * cols >= kMaxElements) {
      fail(what, shape_str({rows, cols}), concat("fewer than ", kMaxElements, " elements"));
    }
  }
  [[noreturn]] void fail(const char* field, const std::string& found, const std::string& expected) const {
    throw FormatError(concat(where_, ": ", path_, field, ": found ", found, ", expected ", expected));
  }

 private:
  const std::string& where_;
  const std::string path_;  // "layers[3]." or ""
};

void validate_mixer(const GatedConvConfig& c, std::int64_t d, const Checker& check) {
  check.range("inner_size", c.inner_size, 1, kMaxSize);
  check.range("kernel_size", c.kernel_size, 1, kMaxKernelSize);
  check.elements("in_proj.weight", 2 * c.inner_size, d);
  check.elements("conv.weight", c.inner_size, c.kernel_size);
}

void validate_mixer(const LinearAttentionConfig& c, std::int64_t d, const Checker& check) {
  check.range("num_heads", c.num_heads, 1, kMaxHeads);
  check.range("feature_dim", c.feature_dim, 1, kMaxFeatureDim);
  check.range("head_dim", c.head_dim, 1, kMaxHeadDim);
  check.non_negative("eps", c.eps);
  check.elements("proj_q.weight", c.num_heads * c.feature_dim, d);
  check.elements("proj_v.weight", c.num_heads * c.head_dim, d);
  check.elements("state", c.num_heads * c.num_features(), c.head_dim + 1);
}

void validate_mixer(const SlidingWindowConfig& c, std::int64_t d, const Checker& check) {
  check.range("num_heads", c.num_heads, 1, kMaxHeads);
  check.range("num_kv_heads", c.num_kv_heads, 1, c.num_heads);
  if (c.num_heads % c.num_kv_heads != 0) {
    check.fail("num_kv_heads", std::to_string(c.num_kv_heads), concat("a divisor of num_heads = ", c.num_heads));
  }
  check.range("head_dim", c.head_dim, 1, kMaxHeadDim);
  check.range("window", c.window, 1, kMaxSize);
  check.positive("scale", c.scale);
  check.range("rotary_dim", c.rotary_dim, 0, c.head_dim / 2 * 2);  // pairs n = ⌈R/2⌉ need 2n ≤ head_dim
  check.positive("rotary_base", c.rotary_base);
  check.elements("qkv_proj.weight", (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, d);
  check.elements("state", 2 * c.window, c.num_kv_heads * c.head_dim);
}

void validate_token(const char* field, const std::optional<std::int64_t>& token, std::int64_t vocab_size,
                    const Checker& check) {
  if (token) check.range(field, *token, 0, vocab_size - 1);
}

std::string json(bool x) { return x ? "true" : "false"; }
std::string json(std::int64_t x) { return std::to_string(x); }
std::string json(double x) { return io::json_number(x); }
std::string json(std::string_view x) { return io::json_string(x); }
std::string json(const std::optional<std::int64_t>& x) { return x ? json(*x) : "null"; }

template <class T>
std::string member(std::string_view key, const T& value) {
  return concat(io::json_string(key), ": ", json(value));
}

std::string json_object(std::initializer_list<std::string> members) {
  std::string text;
  for (const std::string& text_of_member : members) io::append_item(text, text_of_member);
  return concat("{", text, "}");
}

std::string json(const std::optional<MlpConfig>& c) {
  if (!c) return "null";
  return json_object({member("gated", c->gated), member("activation", name_in(kActivations, c->activation)),
                      member("inner_size", c->inner_size), member("fc1_bias", c->fc1_bias),
                      member("fc2_bias", c->fc2_bias)});
}

std::string json_mixer(const GatedConvConfig& c) {
  return json_object({member("mixer", mixer_name(c)), member("inner_size", c.inner_size),
                      member("kernel_size", c.kernel_size), member("bias", c.bias)});
}

std::string json_mixer(const LinearAttentionConfig& c) {
  return json_object({member("mixer", mixer_name(c)), member("num_heads", c.num_heads),
                      member("feature_dim", c.feature_dim), member("head_dim", c.head_dim), member("eps", c.eps)});
}

std::string json_mixer(const SlidingWindowConfig& c) {
  return json_object({member("mixer", mixer_name(c)), member("num_heads", c.num_heads),
                      member("num_kv_heads", c.num_kv_heads), member("head_dim", c.head_dim),
                      member("window", c.window), member("scale", c.scale), member("qkv_bias", c.qkv_bias),
                      member("out_bias", c.out_bias), member("rotary_dim", c.rotary_dim),
                      member("rotary_base", c.rotary_base), member("rotary_interleaved", c.rotary_interleaved)});
}

// Elements of a mixer's or an MLP's tensors, for hidden size d.

std::int64_t mixer_parameters(const GatedConvConfig& c, std::int64_t d) {
  const std::int64_t e = c.inner_size;
  return 2 * e * d + e * c.kernel_size + d * e + (c.bias ? 2 * e + d : 0);
}

std::int64_t mixer_parameters(const LinearAttentionConfig& c, std::int64_t d) {
  return 2 * c.num_heads * c.feature_dim * d + 2 * c.num_heads * c.head_dim * d;
}

std::int64_t mixer_parameters(const SlidingWindowConfig& c, std::int64_t d) {
  const std::int64_t qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim;
  return qkv * d + c.num_heads * c.head_dim * d + (c.qkv_bias ? qkv : 0) + (c.out_bias ? d : 0);
}

std::int64_t mlp_parameters(const MlpConfig& c, std::int64_t d) {
  return c.fc1_rows() * d + d * c.inner_size + (c.fc1_bias ? c.fc1_rows() : 0) + (c.fc2_bias ? d : 0);
}

}  // namespace

std::string_view mixer_name(const MixerConfig& mixer) {
  constexpr std::string_view kNames[] = {"gated_conv", "linear_attention", "sliding_window"};
  return kNames[mixer.index()];
}

ModelConfig ModelConfig::from_json(std::string_view text, const std::string& where) {
  const Json root = Json::parse(text, where);
  JsonObject object(root, where, "");
  const Json* format = object.find("format");
  const std::string* format_name = format ? format->as_string() : nullptr;
  if (!format_name || *format_name != kFormat) {
    object.fail("format", format ? format->describe() : "no such key",
                "\"based\" (published checkpoints are translated by `based convert`)");
  }
  if (const std::int64_t version = object.integer("format_version"); version != kFormatVersion) {
    object.fail("format_version", std::to_string(version), std::to_string(kFormatVersion));
  }

  ModelConfig config;
  config.vocab_size = object.integer("vocab_size");
  config.padded_vocab_size = object.integer("padded_vocab_size");
  config.hidden_size = object.integer("hidden_size");
  {
    JsonObject norm(object.get("norm", "an object"), where, "norm");
    config.norm = read_name(norm, "type", kNorms);
    config.norm_eps = norm.number("eps");
    norm.finish();
  }
  if (const Json& value = object.get("mlp", "an object or null"); !value.is_null()) {
    if (!value.as_object()) object.fail("mlp", value.describe(), "an object or null");
    JsonObject mlp(value, where, "mlp");
    config.mlp = MlpConfig{.gated = mlp.boolean("gated"),
                           .activation = read_name(mlp, "activation", kActivations),
                           .inner_size = mlp.integer("inner_size"),
                           .fc1_bias = mlp.boolean("fc1_bias"),
                           .fc2_bias = mlp.boolean("fc2_bias")};
    mlp.finish();
  }
  config.tie_embeddings = object.boolean("tie_embeddings");
  config.bos_token_id = object.integer_or_null("bos_token_id");
  config.eos_token_id = object.integer_or_null("eos_token_id");
  for (const Json& layer : object.array("layers")) {
    config.layers.push_back(read_mixer(layer, where, concat("layers[", config.layers.size(), "]")));
  }
  object.finish();
  config.validate(where);
  return config;
}

std::string ModelConfig::to_json() const {
  validate("config");  // an infinity has no JSON
  std::string layer_lines;
  for (const MixerConfig& layer : layers) {
    layer_lines += layer_lines.empty() ? "\n    " : ",\n    ";
    layer_lines += std::visit([](const auto& mixer) { return json_mixer(mixer); }, layer);
  }
  const std::string members[] = {
      member("format", kFormat),
      member("format_version", kFormatVersion),
      member("vocab_size", vocab_size),
      member("padded_vocab_size", padded_vocab_size),
      member("hidden_size", hidden_size),
      concat("\"norm\": ", json_object({member("type", name_in(kNorms, norm)), member("eps", norm_eps)})),
      concat("\"mlp\": ", json(mlp)),
      member("tie_embeddings", tie_embeddings),
      member("bos_token_id", bos_token_id),
      member("eos_token_id", eos_token_id),
      concat("\"layers\": [", layer_lines, "\n  ]"),
  };
  std::string text;
  for (const std::string& text_of_member : members) text += concat(text.empty() ? "{\n  " : ",\n  ", text_of_member);
  return concat(text, "\n}\n");
}

void ModelConfig::validate(const std::string& where) const {
  const Checker check(where, "");
  check.range("vocab_size", vocab_size, 1, kMaxSize);
  check.range("padded_vocab_size", padded_vocab_size, vocab_size, kMaxSize);
  check.range("hidden_size", hidden_size, 1, kMaxSize);
  check.elements("embedding.weight", padded_vocab_size, hidden_size);
  check.positive("norm.eps", norm_eps);
  if (mlp) {
    check.range("mlp.inner_size", mlp->inner_size, 1, kMaxSize);
    check.elements("mlp.fc1.weight", mlp->fc1_rows(), hidden_size);
  }
  validate_token("bos_token_id", bos_token_id, vocab_size, check);
  validate_token("eos_token_id", eos_token_id, vocab_size, check);
  if (layers.empty() || layers.size() > static_cast<std::size_t>(kMaxLayers)) {
    check.fail("layers", concat(layers.size(), " layers"), concat("1 to ", kMaxLayers));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Checker layer_check(where, concat("layers[", i, "]."));
    std::visit([&](const auto& mixer) { validate_mixer(mixer, hidden_size, layer_check); }, layers[i]);
  }
}

std::int64_t ModelConfig::num_parameters() const {
  const std::int64_t d = hidden_size;
  const std::int64_t norm_size = norm == NormKind::layer_norm ? 2 * d : d;
  const std::int64_t mlp_size = mlp ? norm_size + mlp_parameters(*mlp, d) : 0;
  std::int64_t total = (tie_embeddings ? 1 : 2) * padded_vocab_size * d + norm_size;
  for (const MixerConfig& layer : layers) {
    total += norm_size + mlp_size;
    total += std::visit([&](const auto& mixer) { return mixer_parameters(mixer, d); }, layer);
  }
  return total;
}

}  // namespace based
