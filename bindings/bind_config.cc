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

/// What a method of a mixer's config is called on: any kind of mixer.
struct Self {
  MixerConfig mixer;
};

}  // namespace based::python

namespace pybind11::detail {

template <>
struct type_caster<based::python::Self> {
  PYBIND11_TYPE_CASTER(based::python::Self, const_name("typing.Self"));
  bool load(handle source, bool convert) {
    make_caster<based::MixerConfig> caster;
    if (!caster.load(source, convert)) return false;
    value.mixer = cast_op<const based::MixerConfig&>(caster);
    return true;
  }
};

}  // namespace pybind11::detail

namespace based::python {

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

template <class T>
void read_value(const py::dict& dict, std::string_view key, T& value) {
  value = dict[py::str(key)].cast<T>();
}

// Calls visit(name, member) for every field.
template <class Visit>
void each_field(Visit visit) {
  visit("gated", &MlpConfig::gated);
  visit("activation", &MlpConfig::activation);
  visit("inner_size", &MlpConfig::inner_size);
  visit("fc1_bias", &MlpConfig::fc1_bias);
  visit("fc2_bias", &MlpConfig::fc2_bias);
}

py::dict dict_of(const MlpConfig& mlp) {
  py::dict dict;
  each_field([&](const char* name, auto member) { dict[name] = mlp.*member; });
  return dict;
}

MlpConfig mlp_of(const py::dict& dict) {
  MlpConfig mlp;
  each_field([&](const char* name, auto member) { read_value(dict, name, mlp.*member); });
  return mlp;
}

// ---- mixers: all that follows from their descriptions (based/mixers/description.h) --------------------------------
//
// Every function that pybind11 is given takes it a fraction of a second to compile. So none is written for each kind of
// mixer: the members are written once, for MixerConfig, and given to the Python class of every kind.

using FieldValue = std::variant<std::int64_t, double, bool>;

std::vector<MixerField> fields_of(const MixerConfig& mixer) {
  std::vector<MixerField> fields;
  const auto visit = [&](std::string_view key, auto, const auto& domain, std::string_view meaning) {
    fields.push_back(describe_field(key, domain, meaning));
  };
  std::visit([&](const auto& config) { config.fields(visit); }, mixer);
  return fields;
}

// In the order of the fields.
std::vector<FieldValue> values_of(const MixerConfig& mixer) {
  std::vector<FieldValue> values;
  std::visit(
      [&](const auto& config) {
        config.fields([&](std::string_view, auto member, const auto&, std::string_view) {
          values.push_back(FieldValue(config.*member));
        });
      },
      mixer);
  return values;
}

py::dict dict_of(const MixerConfig& mixer) {
  py::dict dict;
  const std::vector<MixerField> fields = fields_of(mixer);
  const std::vector<FieldValue> values = values_of(mixer);
  for (std::size_t i = 0; i < fields.size(); ++i) dict[py::str(fields[i].key)] = values[i];
  return dict;
}

// The config struct of the kind of `mixer`, with the values of a dict, on the heap.
void* new_config(MixerConfig mixer, const py::dict& dict) {
  return std::visit(
      [&]<class Config>(Config& config) -> void* {
        config.fields([&](std::string_view key, auto member, const auto&, std::string_view) {
          read_value(dict, key, config.*member);
        });
        return new Config(config);
      },
      mixer);
}

std::string letter_of(const MixerConfig& mixer) {
  return std::visit([](const auto& config) { return std::string(1, config.kLetter); }, mixer);
}

std::string summary_of(const MixerConfig& mixer) {
  return std::visit([](const auto& config) { return config.summary(); }, mixer);
}

std::optional<std::int64_t> num_features_of(const MixerConfig& mixer) {
  return std::visit(
      [](const auto& config) -> std::optional<std::int64_t> {
        if constexpr (requires { config.num_features(); }) return config.num_features();
        return std::nullopt;
      },
      mixer);
}

// The members of the class of a kind, of which `kind` is any config.
void def_mixer(py::class_<MixerConfig> type, const MixerConfig& kind) {
  const auto of_kind = [index = kind.index()](const Self& self) -> const MixerConfig& {
    if (self.mixer.index() != index) throw py::reference_cast_error();  // raises TypeError that shows the signature
    return self.mixer;
  };
  type.def_property_readonly_static("mixer", [name = mixer_name(kind)](const py::object&) { return name; })
      .def_property_readonly_static("letter", [kind](const py::object&) { return letter_of(kind); })
      .def_static(
          "fields", [kind] { return fields_of(kind); }, "The keys of config.json beside \"mixer\", in order.")
      .def(
          "projections",
          [of_kind](const Self& self, std::int64_t hidden_size) {
            return mixer_projections(of_kind(self), hidden_size);
          },
          py::arg("hidden_size"), "The matrices that each token is multiplied by, in order.")
      .def_property_readonly(
          "parameters", [of_kind](const Self& self) { return mixer_parameters(of_kind(self)); },
          "The other tensors of its weights.")
      .def_property_readonly(
          "state", [of_kind](const Self& self) { return state_tensors(mixer_state(of_kind(self))); },
          "The tensors of a layer in a state file.")
      .def_property_readonly(
          "summary", [of_kind](const Self& self) { return summary_of(of_kind(self)); }, "The shape, in words.");

  const std::vector<MixerField> fields = fields_of(kind);
  const std::vector<FieldValue> values = values_of(kind);
  for (std::size_t i = 0; i < fields.size(); ++i) {
    std::visit(
        [&]<class T>(T) {
          type.def_property_readonly(
              std::string(fields[i].key).c_str(),
              [of_kind, i](const Self& self) { return std::get<T>(values_of(of_kind(self))[i]); },
              std::string(fields[i].meaning).c_str());
        },
        values[i]);
  }
  if (num_features_of(kind))
    type.def_property_readonly("num_features", [of_kind](const Self& self) { return *num_features_of(of_kind(self)); });

  type.def(
          "__eq__", [of_kind](const Self& self, const Self& other) { return of_kind(self) == other.mixer; },
          py::is_operator())
      .def("__hash__",
           [of_kind](const Self& self) { return py::hash(py::tuple(dict_of(of_kind(self)).attr("items")())); })
      .def("__getstate__", [of_kind](const Self& self) { return dict_of(of_kind(self)); })
      .def(
          "__setstate__",
          [kind](py::detail::value_and_holder& self, const py::dict& state) {
            self.value_ptr() = new_config(kind, state);
          },
          py::detail::is_new_style_constructor());
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
  for_each_mixer([&]<class Config>(std::type_identity<Config>) {
    const py::object type = py::class_<Config>(m, class_name(Config::kName).c_str(), Config::kAbout);
    def_mixer(type, Config{});
    mixers.append(type);
  });
  m.attr("MIXERS") = py::tuple(mixers);

  py::class_<MlpConfig> mlp(m, "MlpConfig");
  each_field([&](const char* name, auto member) { mlp.def_readonly(name, member); });
  mlp.def(py::self == py::self)
      .def("__hash__", [](const MlpConfig& c) { return py::hash(py::tuple(dict_of(c).attr("items")())); })
      .def(py::pickle([](const MlpConfig& c) { return dict_of(c); }, &mlp_of));

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
      .def_property_readonly("max_tokens", &ModelConfig::max_tokens,
                             "Tokens that a sequence may have, where a layer has such a limit; None for any number.")
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
