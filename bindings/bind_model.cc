#include "based/model.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "bindings.h"

namespace based::python {

namespace {

LoadOptions load_options(const std::string& device, const std::optional<std::string>& dtype,
                         const Arg<std::optional<int>>& num_threads, const Arg<bool>& deterministic,
                         const Arg<std::optional<std::int64_t>>& max_context) {
  LoadOptions options;
  options.max_context = max_context.get("max_context");
  options.deterministic = deterministic.get("deterministic");
  options.device = Device::parse(device);
  if (dtype) options.dtype = parse_dtype(*dtype);
  if (const auto threads = num_threads.get("num_threads")) {
    if (*threads < 1) throw py::value_error("num_threads = " + std::to_string(*threads) + " is not ≥ 1");
    options.num_threads = *threads;
  }
  return options;
}

// A Model has only const methods, so that nothing is lost with the const that pybind11's holders do not take.
std::shared_ptr<Model> mutable_holder(std::shared_ptr<const Model> model) {
  return std::const_pointer_cast<Model>(std::move(model));
}

std::vector<std::int32_t> ids_for(const Model& model, const TokenIds& ids) {
  return token_ids(ids, model.config().vocab_size, "token_ids");
}

py::array_t<float> score(const Model& model, const TokenIds& ids) {
  const auto tokens = ids_for(model, ids);
  const InterruptCheck interrupt = interrupt_check();
  std::vector<float> scores;
  {
    const ReleaseGil nogil;
    scores = model.score(tokens, interrupt);
  }
  return py::array_t<float>(static_cast<py::ssize_t>(scores.size()), scores.data());
}

py::dict trace(const Model& model, const TokenIds& ids) {
  const auto tokens = ids_for(model, ids);
  const InterruptCheck interrupt = interrupt_check();
  LayerTrace trace;
  {
    const ReleaseGil nogil;
    trace = model.trace(tokens, interrupt);
  }
  py::dict result;
  const auto arrays = [](const std::vector<Tensor>& tensors) {
    return std::vector<PyTensor>(tensors.begin(), tensors.end());
  };
  result["embed"] = PyTensor(trace.embed);
  result["mixer_out"] = arrays(trace.mixer_out);
  result["block_out"] = arrays(trace.block_out);
  result["final_norm"] = PyTensor(trace.final_norm);
  result["logits"] = PyTensor(trace.logits);
  return result;
}

}  // namespace

void bind_model(py::module_& m) {
  m.attr("MAX_TOKEN_IDS") = kMaxTokenIds;
  m.attr("MAX_CONTEXT") = limits::kSize;
  py::class_<Model, std::shared_ptr<Model>>(m, "Model", "Immutable weights on one device. Any number of threads.")
      .def_static(
          "load",
          [](const std::filesystem::path& directory, const std::string& device, const std::optional<std::string>& dtype,
             const Arg<std::optional<int>>& num_threads, const Arg<bool>& deterministic,
             const Arg<std::optional<std::int64_t>>& max_context) {
            const LoadOptions options = load_options(device, dtype, num_threads, deterministic, max_context);
            const ReleaseGil nogil;
            return mutable_holder(Model::load(directory, options));
          },
          py::arg("directory"), py::kw_only(), py::arg("device") = Device{}.str(), py::arg("dtype") = py::none(),
          py::arg("num_threads") = py::none(), py::arg("deterministic") = false, py::arg("max_context") = py::none(),
          "Reads config.json and model.safetensors (or its shards). Raises OSError, FormatError, UnsupportedError, "
          "ValueError.")
      .def_static(
          "random",
          [](const ModelConfig& config, const Arg<std::uint64_t>& seed, const std::string& device,
             const std::optional<std::string>& dtype, const Arg<std::optional<int>>& num_threads,
             const Arg<bool>& deterministic, const Arg<std::optional<std::int64_t>>& max_context) {
            const LoadOptions options = load_options(device, dtype, num_threads, deterministic, max_context);
            const std::uint64_t number = seed.get("seed");
            const ReleaseGil nogil;
            return mutable_holder(Model::random(config, number, options));
          },
          py::arg("config"), py::arg("seed") = 0, py::kw_only(), py::arg("device") = Device{}.str(),
          py::arg("dtype") = py::none(), py::arg("num_threads") = py::none(), py::arg("deterministic") = false,
          py::arg("max_context") = py::none(), "Seeded random weights of this shape.")
      .def_property_readonly("config", &Model::config, py::return_value_policy::copy)
      .def_property_readonly("device", [](const Model& model) { return model.device().str(); })
      .def_property_readonly("dtype", [](const Model& model) { return name_of(model.dtype()); })
      .def_property_readonly("num_threads", &Model::num_threads)
      .def_property_readonly("num_parameters", &Model::num_parameters)
      .def_property_readonly("weight_nbytes", &Model::weight_nbytes)
      .def_property_readonly("state_nbytes", py::overload_cast<>(&Model::state_nbytes, py::const_))
      .def(
          "state_nbytes_at",
          [](const Model& model, const Arg<std::int64_t>& num_tokens) {
            return model.state_nbytes(num_tokens.get("num_tokens"));
          },
          py::arg("num_tokens"))
      .def_property_readonly("max_context", &Model::max_context)
      .def_property_readonly(
          "memory",
          [](const Model& model) {
            const MemoryUse use = model.memory();
            return std::tuple(use.weights, use.states, use.workspace);
          },
          "Bytes of the device held now: weights, states, workspace.")
      .def_property_readonly("kernel_isa", &Model::kernel_isa)
      .def_property_readonly("fingerprint", &Model::fingerprint)
      .def(
          "forward",
          [](const Model& model, const TokenIds& ids) {
            const auto tokens = ids_for(model, ids);
            const InterruptCheck interrupt = interrupt_check();
            const ReleaseGil nogil;
            return PyTensor(model.forward(tokens, interrupt));
          },
          py::arg("token_ids"), "Logits (T, padded_vocab_size) float32.")
      .def("score", &score, py::arg("token_ids"), "(T - 1) natural-log probabilities, float32.")
      .def("trace", &trace, py::arg("token_ids"), "Tensors by name; mixer_out and block_out are lists, one per layer.");
}

}  // namespace based::python
