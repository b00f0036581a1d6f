#include <algorithm>
#include <cmath>
#include <optional>
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

// ---- mixers: everything follows from their descriptions (based/mixers) -------------------------------------------

// Pairs of kinds, each kind with itself too, that share a name or a letter.
constexpr std::size_t count_equal_names() {
  std::size_t count = 0;
  for_each_mixer([&]<class A>(std::type_identity<A>) {
    for_each_mixer(
        [&]<class B>(std::type_identity<B>) { count += A::kName == B::kName || A::kLetter == B::kLetter ? 1 : 0; });
  });
  return count;
}
static_assert(count_equal_names() == std::variant_size_v<MixerConfig>);

void read_field(JsonObject& object, std::string_view key, std::int64_t& value) { value = object.integer(key); }
void read_field(JsonObject& object, std::string_view key, double& value) { value = object.number(key); }
void read_field(JsonObject& object, std::string_view key, bool& value) { value = object.boolean(key); }

MixerConfig read_mixer(const Json& json, const std::string& where, const std::string& path) {
  JsonObject object(json, where, path);
  const std::string& kind = object.string("mixer");
  std::optional<MixerConfig> result;
  std::string kinds;
  for_each_mixer([&]<class Config>(std::type_identity<Config>) {
    io::append_item(kinds, Config::kName);
    if (kind != Config::kName) return;
    Config config;
    config.fields([&](std::string_view key, auto member, const auto&, std::string_view) {
      read_field(object, key, config.*member);
    });
    result = config;
  });
  if (!result) object.fail("mixer", io::in_quotes(kind), concat("one of ", kinds));
  object.finish();
  return *result;
}

/// Throws FormatError "where: path.field: found …, expected …" for a value outside its domain.
class Checker {
 public:
  Checker(const std::string& where, std::string path) : where_(where), path_(std::move(path)) {}

  void range(std::string_view field, std::int64_t value, std::int64_t low, std::int64_t high) const {
    if (value < low || value > high) {
      fail(field, std::to_string(value), concat("an integer from ", low, " to ", high));
    }
  }
  void same(std::string_view field, std::int64_t value, std::string_view other, std::int64_t expected) const {
    if (value != expected) fail(field, std::to_string(value), concat(other, " = ", expected));
  }
  void positive(std::string_view field, double value) const {
    if (!(value > 0 && std::isfinite(value))) fail(field, io::json_number(value), "a finite number > 0");
  }
  void non_negative(std::string_view field, double value) const {
    if (!(value >= 0 && std::isfinite(value))) fail(field, io::json_number(value), "a finite number >= 0");
  }
  void elements(std::string_view what, const std::vector<std::int64_t>& shape) const {
    if (num_elements(shape) >= limits::kElements)
      fail(what, shape_str(shape), concat("fewer than ", limits::kElements, " elements"));
  }
  [[noreturn]] void fail(std::string_view field, const std::string& found, const std::string& expected) const {
    throw FormatError(concat(where_, ": ", path_, field, ": found ", found, ", expected ", expected));
  }

 private:
  const std::string& where_;
  const std::string path_;  // "layers[3]." or ""
};

void check_field(const Checker& check, std::string_view field, std::int64_t value, const domain::Integer& range) {
  check.range(field, value, range.low, range.high);
}

void check_field(const Checker& check, std::string_view field, std::int64_t value, const domain::Divisor& divisor) {
  check.range(field, value, 1, divisor.of);
  if (divisor.of % value != 0)
    check.fail(field, std::to_string(value), concat("a divisor of ", divisor.limit, " = ", divisor.of));
}

void check_field(const Checker& check, std::string_view field, double value, domain::Positive) {
  check.positive(field, value);
}

void check_field(const Checker& check, std::string_view field, double value, domain::NonNegative) {
  check.non_negative(field, value);
}

void check_field(const Checker&, std::string_view, bool, domain::Flag) {}

void check_mixer(const MixerConfig& mixer, std::int64_t hidden_size, const Checker& check) {
  std::visit(
      [&](const auto& config) {
        config.fields([&](std::string_view field, auto member, const auto& domain, std::string_view) {
          if constexpr (std::is_same_v<std::decay_t<decltype(domain)>, domain::HiddenSize>)
            check.same(field, config.*member, "hidden_size", hidden_size);
          else
            check_field(check, field, config.*member, domain);
        });
      },
      mixer);
  for (const Projection& p : mixer_projections(mixer, hidden_size))
    check.elements(concat(p.name, ".weight"), {p.rows, p.cols});
  for (const Parameter& p : mixer_parameters(mixer)) check.elements(p.name, p.shape);
  const std::vector<StateTensor> tensors = state_tensors(mixer_state(mixer));
  std::int64_t total = 0;
  std::string shapes;
  for (const StateTensor& tensor : tensors) {
    const std::int64_t elements = num_elements(tensor.shape);
    total = std::min(total, limits::kElements) + std::min(elements, limits::kElements);
    if (elements > 0) io::append_item(shapes, concat(tensor.name, " ", shape_str(tensor.shape)));
  }
  if (total >= limits::kElements) check.fail("state", shapes, concat("fewer than ", limits::kElements, " elements"));
}

void validate_token(std::string_view field, const std::optional<std::int64_t>& token, std::int64_t vocab_size,
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

std::string json_object(const std::vector<std::string>& members) {
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

std::string json_mixer(const MixerConfig& mixer) {
  std::vector<std::string> members{member("mixer", mixer_name(mixer))};
  std::visit(
      [&](const auto& config) {
        config.fields([&](std::string_view key, auto field, const auto&, std::string_view) {
          members.push_back(member(key, config.*field));
        });
      },
      mixer);
  return json_object(members);
}

// Elements of a mixer's or an MLP's tensors, for hidden size d.

std::int64_t count_parameters(const MixerConfig& mixer, std::int64_t d) {
  std::int64_t total = 0;
  for (const Projection& p : mixer_projections(mixer, d)) total += p.rows * p.cols + (p.bias ? p.rows : 0);
  for (const Parameter& p : mixer_parameters(mixer)) total += num_elements(p.shape);
  return total;
}

std::int64_t count_parameters(const MlpConfig& c, std::int64_t d) {
  return c.fc1_rows() * d + d * c.inner_size + (c.fc1_bias ? c.fc1_rows() : 0) + (c.fc2_bias ? d : 0);
}

}  // namespace

std::string_view mixer_name(const MixerConfig& mixer) {
  return std::visit([](const auto& config) { return config.kName; }, mixer);
}

std::vector<Projection> mixer_projections(const MixerConfig& mixer, std::int64_t hidden_size) {
  return std::visit([&](const auto& config) { return config.projections(hidden_size); }, mixer);
}

std::vector<Parameter> mixer_parameters(const MixerConfig& mixer) {
  return std::visit([](const auto& config) { return config.parameters(); }, mixer);
}

std::vector<StatePart> mixer_state(const MixerConfig& mixer) {
  return std::visit([](const auto& config) { return config.state(); }, mixer);
}

std::int64_t ModelConfig::prefix_tokens() const {
  std::int64_t most = 0;
  for (const MixerConfig& layer : layers) {
    std::visit(
        [&](const auto& mixer) {
          if constexpr (requires { mixer.prefix_tokens(); }) most = std::max(most, mixer.prefix_tokens());
        },
        layer);
  }
  return most;
}

std::vector<StateTensor> state_tensors(const std::vector<StatePart>& parts) {
  std::vector<StateTensor> all;
  for (const StatePart& part : parts) {
    const std::vector<StateTensor> tensors = std::visit([](const auto& state) { return state.tensors(); }, part);
    all.insert(all.end(), tensors.begin(), tensors.end());
  }
  return all;
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
    layer_lines += json_mixer(layer);
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
  check.range("vocab_size", vocab_size, 1, limits::kSize);
  check.range("padded_vocab_size", padded_vocab_size, vocab_size, limits::kSize);
  check.range("hidden_size", hidden_size, 1, limits::kSize);
  check.elements("embedding.weight", {padded_vocab_size, hidden_size});
  check.positive("norm.eps", norm_eps);
  if (mlp) {
    check.range("mlp.inner_size", mlp->inner_size, 1, limits::kSize);
    check.elements("mlp.fc1.weight", {mlp->fc1_rows(), hidden_size});
  }
  validate_token("bos_token_id", bos_token_id, vocab_size, check);
  validate_token("eos_token_id", eos_token_id, vocab_size, check);
  if (layers.empty() || layers.size() > static_cast<std::size_t>(limits::kLayers)) {
    check.fail("layers", concat(layers.size(), " layers"), concat("1 to ", limits::kLayers));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Checker layer_check(where, concat("layers[", i, "]."));
    check_mixer(layers[i], hidden_size, layer_check);
  }
}

std::int64_t ModelConfig::num_parameters() const {
  const std::int64_t d = hidden_size;
  const std::int64_t norm_size = norm == NormKind::layer_norm ? 2 * d : d;
  const std::int64_t mlp_size = mlp ? norm_size + count_parameters(*mlp, d) : 0;
  std::int64_t total = (tie_embeddings ? 1 : 2) * padded_vocab_size * d + norm_size;
  for (const MixerConfig& layer : layers) {
    total += norm_size + mlp_size + count_parameters(layer, d);
  }
  return total;
}

}  // namespace based
