#include "based/config.h"

#include <pybind11/native_enum.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include "bindings.h"

namespace based::python {

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

  py::class_<GatedConvConfig>(m, "GatedConvConfig", "A gated short convolution.")
      .def_property_readonly_static("mixer", [](const py::object&) { return mixer_name(GatedConvConfig{}); })
      .def_readonly("inner_size", &GatedConvConfig::inner_size)
      .def_readonly("kernel_size", &GatedConvConfig::kernel_size)
      .def_readonly("bias", &GatedConvConfig::bias)
      .def(py::self == py::self);
  py::class_<LinearAttentionConfig>(m, "LinearAttentionConfig", "Second-order Taylor linear attention.")
      .def_property_readonly_static("mixer", [](const py::object&) { return mixer_name(LinearAttentionConfig{}); })
      .def_readonly("num_heads", &LinearAttentionConfig::num_heads)
      .def_readonly("feature_dim", &LinearAttentionConfig::feature_dim)
      .def_readonly("head_dim", &LinearAttentionConfig::head_dim)
      .def_readonly("eps", &LinearAttentionConfig::eps)
      .def_property_readonly("num_features", &LinearAttentionConfig::num_features)
      .def(py::self == py::self);
  py::class_<SlidingWindowConfig>(m, "SlidingWindowConfig", "Sliding-window attention.")
      .def_property_readonly_static("mixer", [](const py::object&) { return mixer_name(SlidingWindowConfig{}); })
      .def_readonly("num_heads", &SlidingWindowConfig::num_heads)
      .def_readonly("num_kv_heads", &SlidingWindowConfig::num_kv_heads)
      .def_readonly("head_dim", &SlidingWindowConfig::head_dim)
      .def_readonly("window", &SlidingWindowConfig::window, "Keys attended, the query's own included.")
      .def_readonly("scale", &SlidingWindowConfig::scale)
      .def_readonly("qkv_bias", &SlidingWindowConfig::qkv_bias)
      .def_readonly("out_bias", &SlidingWindowConfig::out_bias)
      .def_readonly("rotary_dim", &SlidingWindowConfig::rotary_dim)
      .def_readonly("rotary_base", &SlidingWindowConfig::rotary_base)
      .def_readonly("rotary_interleaved", &SlidingWindowConfig::rotary_interleaved)
      .def(py::self == py::self);
  py::class_<MlpConfig>(m, "MlpConfig")
      .def_readonly("gated", &MlpConfig::gated)
      .def_readonly("activation", &MlpConfig::activation)
      .def_readonly("inner_size", &MlpConfig::inner_size)
      .def_readonly("fc1_bias", &MlpConfig::fc1_bias)
      .def_readonly("fc2_bias", &MlpConfig::fc2_bias)
      .def(py::self == py::self);

  py::class_<ModelConfig>(m, "ModelConfig", "Every number that the maths needs: a model directory's config.json.")
      .def_static("from_json", &ModelConfig::from_json, py::arg("text"), py::arg("where") = "config",
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
      .def(py::self == py::self)
      .def("__repr__", [](const ModelConfig& c) {
        return "ModelConfig(hidden_size=" + std::to_string(c.hidden_size) +
               ", layers=" + std::to_string(c.layers.size()) + ", vocab_size=" + std::to_string(c.vocab_size) + ", …)";
      });
  m.def(
      "check_config",
      [](const std::string& text, const std::string& where) { return ModelConfig::from_json(text, where).to_json(); },
      py::arg("text"), py::arg("where"), "The canonical form of a config.json's text. Raises FormatError.");
}

}  // namespace based::python
