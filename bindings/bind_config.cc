#include "based/config.h"

#include <pybind11/native_enum.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <cctype>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "based/error.h"
#include "bindings.h"
#include "io/json.h"

namespace based::python {

namespace {

struct MixerField {
  std::string_view key, type;
  std::string domain;
  std::optional<std::int64_t> low, high;
  std::string_view meaning;
};

}  // namespace

template <>
inline constexpr bool is_bound<MixerField> = true;

namespace {

MixerField describe_field(std::string_view key, const domain::Integer& range, std::string_view meaning) {
  const std::string low = std::to_string(range.low);
  if (!range.limit.empty())
    return {key, "int", low + " … " + std::string(range.limit), range.low, std::nullopt, meaning};
  return {key, "int", low + " … " + std::to_string(range.high), range.low, range.high, meaning};
}

MixerField describe_field(std::string_view key, const domain::Divisor& divisor, std::string_view meaning) {
  return {key, "int", "a divisor of " + std::string(divisor.limit), 1, std::nullopt, meaning};
}

MixerField describe_field(std::string_view key, domain::HiddenSize, std::string_view meaning) {
  return {key, "int", "hidden_size", 1, std::nullopt, meaning};
}

MixerField describe_field(std::string_view key, domain::Positive, std::string_view meaning) {
  return {key, "float", "> 0", std::nullopt, std::nullopt, meaning};
}

MixerField describe_field(std::string_view key, domain::NonNegative, std::string_view meaning) {
  return {key, "float", "≥ 0", std::nullopt, std::nullopt, meaning};
}

MixerField describe_field(std::string_view key, domain::Flag, std::string_view meaning) {
  return {key, "bool", "", std::nullopt, std::nullopt, meaning};
}

std::string_view name_of(StateKind kind) {
  switch (kind) {
    case StateKind::dense:
      return "dense";
    case StateKind::ring:
      return "ring";
    case StateKind::taylor:
      return "taylor";
    case StateKind::pending:
      return "pending";
    case StateKind::context:
      return "context";
  }
  throw InvalidArgument("found an enumerator outside its type");
}

std::string_view name_of(StateDType dtype) {
  switch (dtype) {
    case StateDType::float32:
      return "float32";
    case StateDType::model:
      return "model";
    case StateDType::projection:
      return "projection";
  }
  throw InvalidArgument("found an enumerator outside its type");
}

// "sliding_window" → "SlidingWindowConfig"
std::string class_name(std::string_view mixer) {
  std::string name;
  bool upper = true;
  for (const char c : mixer) {
    if (c != '_') name += upper ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : c;
    upper = c == '_';
  }
  return name + "Config";
}

// Copies, pickles and hashes of a config struct, of its fields by name: each_field(config, visit) calls
// visit(name, a reference to the member) for every one.
template <class Config, class EachField>
void def_state(py::class_<Config>& type, EachField each_field) {
  const auto get = [each_field](const Config& config) {
    py::dict state;
    each_field(config, [&](std::string_view name, const auto& value) { state[py::str(name)] = value; });
    return state;
  };
  const auto set = [each_field](const py::dict& state) {
    Config config;
    each_field(config, [&](std::string_view name, auto& value) {
      value = state[py::str(name)].template cast<std::remove_reference_t<decltype(value)>>();
    });
    return config;
  };
  type.def(py::pickle(get, set));
  type.def("__hash__", [get](const Config& config) { return py::hash(py::tuple(get(config).attr("items")())); });
}

// The Python class of a mixer's config struct, from its description (based/mixers/description.h).
template <class Config>
py::object bind_mixer(py::module_& m) {
  py::class_<Config> type(m, class_name(Config::kName).c_str(), Config::kAbout);
  type.def_property_readonly_static("mixer", [](const py::object&) { return Config::kName; })
      .def_property_readonly_static("letter", [](const py::object&) { return std::string(1, Config::kLetter); })
      .def_static(
          "fields",
          [] {
            std::vector<MixerField> fields;
            Config{}.fields([&](std::string_view key, auto, const auto& domain, std::string_view meaning) {
              fields.push_back(describe_field(key, domain, meaning));
            });
            return fields;
          },
          "The keys of config.json beside \"mixer\", in order.")
      .def("projections", &Config::projections, py::arg("hidden_size"),
           "The matrices that each token is multiplied by, in order.")
      .def_property_readonly("parameters", &Config::parameters, "The other tensors of its weights.")
      .def_property_readonly(
          "state", [](const Config& config) { return state_tensors(config.state()); },
          "The tensors of a layer in a state file.")
      .def_property_readonly("summary", &Config::summary, "The shape, in words.")
      .def(py::self == py::self);
  Config{}.fields([&](std::string_view key, auto member, const auto&, std::string_view meaning) {
    type.def_readonly(std::string(key).c_str(), member, std::string(meaning).c_str());
  });
  def_state(type, [](auto& config, auto visit) {
    config.fields(
        [&](std::string_view key, auto member, const auto&, std::string_view) { visit(key, config.*member); });
  });
  if constexpr (requires { &Config::num_features; }) type.def_property_readonly("num_features", &Config::num_features);
  return type;
}

}  // namespace

void bind_config(py::module_& m) {
  py::native_enum<NormKind>(m, "NormKind", "enum.Enum")
      .value("rms_norm", NormKind::rms_norm)
      .value("layer_norm", NormKind::layer_norm)
      .finalize();
  py::native_enum<Activation>(m, "Activation", "enum.Enum", "gelu is the exact (erf) form, relu_squared relu(x)².")
      .value("identity", Activation::identity)
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("sigmoid", Activation::sigmoid)
      .value("relu", Activation::relu)
      .value("relu_squared", Activation::relu_squared)
      .finalize();

  py::class_<MixerField>(m, "MixerField", "A key of a mixer in config.json.")
      .def_readonly("key", &MixerField::key)
      .def_readonly("type", &MixerField::type, "\"int\", \"float\" or \"bool\".")
      .def_readonly("domain", &MixerField::domain, "The values that it may have, in words; empty for a bool.")
      .def_readonly("low", &MixerField::low, "Of an int: the least value; None for others.")
      .def_readonly("high", &MixerField::high, "Of an int: the greatest value; None where it depends on other keys.")
      .def_readonly("meaning", &MixerField::meaning);
  py::class_<Projection>(m, "Projection", "y = x Wᵀ (+ b), W (rows, cols): \"{name}.weight\", \"{name}.bias\".")
      .def_readonly("name", &Projection::name)
      .def_readonly("rows", &Projection::rows)
      .def_readonly("cols", &Projection::cols)
      .def_readonly("bias", &Projection::bias)
      .def_readonly("stacked", &Projection::stacked, "On the projection before it: both are one product.");
  py::class_<Parameter>(m, "Parameter", "A tensor of a mixer's weights that is no projection.")
      .def_readonly("name", &Parameter::name)
      .def_readonly("shape", &Parameter::shape);
  py::class_<StateTensor>(m, "StateTensor", "A tensor of a state file: \"layers.{i}.{name}\".")
      .def_readonly("name", &StateTensor::name)
      .def_property_readonly(
          "kind", [](const StateTensor& t) { return name_of(t.kind); },
          "\"dense\"; \"ring\": one row for each of the last tokens; \"taylor\": packed sums; \"pending\": a row for "
          "each "
          "token that is not in the sums yet; \"context\": one row for each token.")
      .def_property_readonly(
          "dtype", [](const StateTensor& t) { return name_of(t.dtype); },
          "\"float32\"; \"model\": the dtype that the model runs in; \"projection\": on a GPU the model's, on the CPU "
          "and "
          "in state files float32.")
      .def_readonly("shape", &StateTensor::shape,
                    "First extent of a ring: rows of a full one; of pending and context: 0.");

  py::list mixers;
  for_each_mixer([&]<class Config>(std::type_identity<Config>) { mixers.append(bind_mixer<Config>(m)); });
  m.attr("MIXERS") = py::tuple(mixers);

  py::class_<MlpConfig> mlp(m, "MlpConfig");
  mlp.def_readonly("gated", &MlpConfig::gated)
      .def_readonly("activation", &MlpConfig::activation)
      .def_readonly("inner_size", &MlpConfig::inner_size)
      .def_readonly("fc1_bias", &MlpConfig::fc1_bias)
      .def_readonly("fc2_bias", &MlpConfig::fc2_bias)
      .def(py::self == py::self);
  def_state(mlp, [](auto& config, auto visit) {
    visit("gated", config.gated);
    visit("activation", config.activation);
    visit("inner_size", config.inner_size);
    visit("fc1_bias", config.fc1_bias);
    visit("fc2_bias", config.fc2_bias);
  });

  py::class_<ModelConfig>(m, "ModelConfig", "Every number that the maths needs: a model directory's config.json.")
      .def_static(
          "from_json",
          [](const std::string& text, const Text& where) {
            return ModelConfig::from_json(text, to_text(where, "where"));
          },
          py::arg("text"), py::arg("where") = "config",
          "Parses and checks; `where` opens every message. Raises FormatError.")
      .def("to_json", &ModelConfig::to_json, "The canonical text: from_json(to_json()) is equal.")
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("padded_vocab_size", &ModelConfig::padded_vocab_size)
      .def_readonly("hidden_size", &ModelConfig::hidden_size)
      .def_readonly("norm", &ModelConfig::norm)
      .def_readonly("norm_eps", &ModelConfig::norm_eps)
      .def_readonly("mlp", &ModelConfig::mlp, "Of every layer; None: a layer is its mixer alone.")
      .def_readonly("tie_embeddings", &ModelConfig::tie_embeddings)
      .def_readonly("bos_token_id", &ModelConfig::bos_token_id)
      .def_readonly("eos_token_id", &ModelConfig::eos_token_id)
      .def_readonly("layers", &ModelConfig::layers)
      .def_property_readonly("num_parameters", &ModelConfig::num_parameters)
      .def_property_readonly("prefix_tokens", &ModelConfig::prefix_tokens,
                             "Tokens at the beginning of a sequence that are read as a whole; 0 for a causal model.")
      .def(py::self == py::self)
      .def("__hash__", [](const ModelConfig& c) { return py::hash(py::str(c.to_json())); })
      .def(py::pickle([](const ModelConfig& c) { return c.to_json(); },
                      [](const std::string& text) { return ModelConfig::from_json(text, "pickled config"); }))
      .def("__repr__", [](const ModelConfig& c) {
        return "ModelConfig(hidden_size=" + std::to_string(c.hidden_size) +
               ", layers=" + std::to_string(c.layers.size()) + ", vocab_size=" + std::to_string(c.vocab_size) + ", …)";
      });
  m.def(
      "check_json",
      [](const py::bytes& text, const Text& where) {
        const std::string_view view = text;
        const std::string name = to_text(where, "where");
        const ReleaseGil nogil;
        io::Json::parse(view, name);
      },
      py::arg("text"), py::arg("where"),
      "Refuses what is no JSON, and JSON that would take much more memory than its text. Raises FormatError.");
  m.def(
      "check_config",
      [](const std::string& text, const Text& where) {
        return ModelConfig::from_json(text, to_text(where, "where")).to_json();
      },
      py::arg("text"), py::arg("where"), "The canonical form of a config.json's text. Raises FormatError.");
}

}  // namespace based::python
