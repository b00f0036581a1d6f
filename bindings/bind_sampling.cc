#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "bindings.h"

namespace based::python {

namespace {

using Params = TextSamplingParams;
using LogitBias = std::vector<std::pair<std::int64_t, double>>;

/// Names of the fields in order, for __repr__, __eq__ and pickling.
std::vector<const char*> field_names;

template <typename Owner, typename T>
void field(py::class_<Params>& cls, const char* name, T Owner::* member, const char* doc) {
  const auto get = [member](const Params& params) {
    const T& value = params.*member;
    if constexpr (std::is_same_v<T, LogitBias>)
      return std::map<std::int64_t, double>(value.begin(), value.end());
    else
      return T(value);
  };
  const auto set = [member, name](Params& params, const Arg<T>& value) { params.*member = value.get(name); };
  cls.def_property(name, get, set, doc);
  field_names.push_back(name);
}

// Names of the same thing in other libraries.
constexpr std::pair<std::string_view, std::string_view> kOtherNames[] = {
    {"max_new_tokens", "max_tokens"}, {"num_return_sequences", "n"},      {"stop_sequences", "stop"},
    {"stop_strings", "stop"},         {"eos_token_id", "stop_token_ids"}, {"repeat_penalty", "repetition_penalty"}};

// Throws what says which field was meant, when the constructor is called as it cannot be.
void check_call(const py::args& args, const py::kwargs& kwargs) {
  if (!args.empty())
    throw py::type_error("SamplingParams takes its fields by name: expected SamplingParams(max_tokens=5), not (5)");
  for (const auto& [key, value] : kwargs) {
    const std::string name = to_string(key, "the name of a field");
    if (std::ranges::count(field_names, name) > 0) continue;
    std::string message = "SamplingParams has no field " + name;
    const auto other = std::ranges::find(kOtherNames, name, &std::pair<std::string_view, std::string_view>::first);
    const auto close = py::module_::import("difflib").attr("get_close_matches")(key, field_names, 1);
    if (other != std::end(kOtherNames))
      message += ": here it is " + std::string(other->second);
    else if (py::len(close) > 0)
      message += ": did you mean " + py::list(close)[0].cast<std::string>() + "?";
    else if (name == "do_sample")
      message += ": temperature=0 chooses the likeliest token, any other temperature samples";
    message += (message.back() == '?' ? " The fields are " : ". The fields are ");
    for (const char* field : field_names) message += (field == field_names.front() ? "" : ", ") + std::string(field);
    throw py::type_error(message);
  }
}

py::dict fields(const py::object& params) {
  py::dict result;
  for (const char* name : field_names) result[name] = params.attr(name);
  return result;
}

}  // namespace

void bind_sampling(py::module_& m) {
  const Params d;
  py::class_<Params> cls(m, "SamplingParams", R"(How to choose tokens: vLLM's names and meanings.

Applied in this order: logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p. Raises TypeError for a value
of a wrong type and ValueError for one outside its domain. Lists and dicts are copied: assign a new one to change them.)");
  cls.def(py::init([](const Arg<int>& n, const Arg<std::optional<std::int64_t>>& max_tokens,
                      const Arg<std::int64_t>& min_tokens, const Arg<double>& temperature, const Arg<double>& top_p,
                      const Arg<std::int64_t>& top_k, const Arg<double>& min_p, const Arg<double>& repetition_penalty,
                      const Arg<double>& presence_penalty, const Arg<double>& frequency_penalty,
                      const Arg<std::optional<std::uint64_t>>& seed, const Arg<std::vector<std::string>>& stop,
                      const Arg<std::vector<std::int64_t>>& stop_token_ids, const Arg<bool>& ignore_eos,
                      const Arg<std::optional<int>>& logprobs, const Arg<LogitBias>& logit_bias,
                      const Arg<bool>& include_stop_str_in_output, const Arg<bool>& skip_special_tokens) {
            Params p;
            p.n = n.get("n");
            p.max_tokens = max_tokens.get("max_tokens").value_or(Params::kNoLimit);
            p.min_tokens = min_tokens.get("min_tokens");
            p.temperature = temperature.get("temperature");
            p.top_p = top_p.get("top_p");
            p.top_k = top_k.get("top_k");
            p.min_p = min_p.get("min_p");
            p.repetition_penalty = repetition_penalty.get("repetition_penalty");
            p.presence_penalty = presence_penalty.get("presence_penalty");
            p.frequency_penalty = frequency_penalty.get("frequency_penalty");
            p.seed = seed.get("seed");
            p.stop = stop.get("stop");
            p.stop_token_ids = stop_token_ids.get("stop_token_ids");
            p.ignore_eos = ignore_eos.get("ignore_eos");
            p.logprobs = logprobs.get("logprobs");
            p.logit_bias = logit_bias.get("logit_bias");
            p.include_stop_str_in_output = include_stop_str_in_output.get("include_stop_str_in_output");
            p.skip_special_tokens = skip_special_tokens.get("skip_special_tokens");
            p.validate(std::numeric_limits<std::int64_t>::max());  // token ids: once the vocabulary is known
            return p;
          }),
          py::kw_only(), py::arg("n") = d.n, py::arg("max_tokens") = d.max_tokens, py::arg("min_tokens") = d.min_tokens,
          py::arg("temperature") = d.temperature, py::arg("top_p") = d.top_p, py::arg("top_k") = d.top_k,
          py::arg("min_p") = d.min_p, py::arg("repetition_penalty") = d.repetition_penalty,
          py::arg("presence_penalty") = d.presence_penalty, py::arg("frequency_penalty") = d.frequency_penalty,
          py::arg("seed") = d.seed, py::arg("stop") = py::none(), py::arg("stop_token_ids") = py::none(),
          py::arg("ignore_eos") = d.ignore_eos, py::arg("logprobs") = d.logprobs, py::arg("logit_bias") = py::none(),
          py::arg("include_stop_str_in_output") = d.include_stop_str_in_output,
          py::arg("skip_special_tokens") = d.skip_special_tokens);

  field(cls, "n", &Params::n, "Samples per prompt, ≥ 1.");
  cls.def_property(
      "max_tokens",
      [](const Params& p) {
        return p.max_tokens == Params::kNoLimit ? std::nullopt : std::optional<std::int64_t>(p.max_tokens);
      },
      [](Params& p, const Arg<std::optional<std::int64_t>>& value) {
        p.max_tokens = value.get("max_tokens").value_or(Params::kNoLimit);
      },
      "Tokens to generate at most, ≥ 1; None: no limit.");
  field_names.push_back("max_tokens");
  field(cls, "min_tokens", &Params::min_tokens, "Nothing stops a sequence before so many tokens; 0 … max_tokens.");
  field(cls, "temperature", &Params::temperature, "≥ 0; 0 is greedy.");
  field(cls, "top_p", &Params::top_p, "(0, 1].");
  field(cls, "top_k", &Params::top_k, "0 or -1: all; else ≥ 1.");
  field(cls, "min_p", &Params::min_p, "[0, 1].");
  field(cls, "repetition_penalty", &Params::repetition_penalty, "> 0; counts tokens of prompt and output.");
  field(cls, "presence_penalty", &Params::presence_penalty, "[-2, 2]; counts tokens of the output.");
  field(cls, "frequency_penalty", &Params::frequency_penalty, "[-2, 2]; counts tokens of the output.");
  field(cls, "seed", &Params::seed, "None: a fresh one per request.");
  field(cls, "stop", &Params::stop, "Strings that end the text, which is cut before them.");
  field(cls, "stop_token_ids", &Params::stop_token_ids, "Tokens that end the sequence; kept in token_ids.");
  field(cls, "ignore_eos", &Params::ignore_eos, "Do not end at the model's eos_token_id.");
  field(cls, "logprobs", &Params::logprobs,
        "Also return the log-probabilities of this many likeliest tokens, from the model's own distribution.");
  field(cls, "logit_bias", &Params::logit_bias, "Number in [-100, 100] added to the logit, by token id.");
  field(cls, "include_stop_str_in_output", &Params::include_stop_str_in_output,
        "Cut the text after what stopped it instead.");
  field(cls, "skip_special_tokens", &Params::skip_special_tokens,
        "Leave special tokens out of the text; stop strings may hold them either way.");

  // Before the constructor, whose own answer to a wrong name is a page of types.
  const py::object construct = cls.attr("__init__");
  const auto doc = construct.attr("__doc__").cast<std::string>();
  {
    py::options as_it_is;
    as_it_is.disable_function_signatures();
    cls.attr("__init__") = py::cpp_function(
        [construct](const py::object& self, const py::args& args, const py::kwargs& kwargs) {
          check_call(args, kwargs);
          construct(self, **kwargs);
        },
        py::name("__init__"), py::is_method(cls), doc.c_str());
  }

  m.def(
      "check_params", [](const Params& params, std::int64_t vocab_size) { params.validate(vocab_size); },
      py::arg("params"), py::arg("vocab_size"), "Raises ValueError, also for a token id outside the vocabulary.");

  cls.def("__eq__", [](const py::object& self, const py::object& other) -> py::object {
    if (!py::isinstance<Params>(other)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    return py::bool_(fields(self).equal(fields(other)));
  });
  cls.def("__repr__", [](const py::object& self) {
    std::string text;
    for (const char* name : field_names) {
      if (!text.empty()) text += ", ";
      text += name;
      text += "=";
      text += std::string(py::repr(self.attr(name)));
    }
    return "SamplingParams(" + text + ")";
  });
  cls.def(py::pickle(&fields, [](const py::dict& state) {
    Params params;
    const py::object self = py::cast(&params, py::return_value_policy::reference);
    for (const auto& [name, value] : state) self.attr(name) = value;
    return params;
  }));
}

}  // namespace based::python
