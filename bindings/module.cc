#include <string>

#include "bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of based.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = BASED_VERSION;
        info["compiler"] = BASED_COMPILER;
        info["instruction_sets"] = py::str(BASED_ISAS).attr("split")();
        return info;
      },
      "version, compiler, and the instruction sets that kernels were compiled for.");

  based::python::bind_errors(m);
  based::python::bind_tensor(m);
  based::python::bind_safetensors(m);
  based::python::bind_config(m);
  based::python::bind_sampling(m);
  based::python::bind_model(m);
  based::python::bind_session(m);
  based::python::bind_generator(m);
  based::python::bind_bandwidth(m);
}
