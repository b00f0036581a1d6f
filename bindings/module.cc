#include <string>

#include "bindings.h"

namespace py = pybind11;

// PyInit__core, but for sub-interpreters, in which pybind11 would wait for ever.
PYBIND11_MODULE(_core_of_main_interpreter, m) {
  m.doc() = "The C++ core of based.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = BASED_VERSION;
        info["compiler"] = BASED_COMPILER;
        info["instruction_sets"] = py::str(BASED_ISAS).attr("split")();
        const std::string cuda = BASED_CUDA_VERSION;
        info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
        info["cuda_architectures"] = py::str(BASED_CUDA_ARCHITECTURES).attr("split")();
        return info;
      },
      "version, compiler, the instruction sets and GPU architectures that kernels were compiled for, and the CUDA "
      "toolkit's version (None: a build without CUDA).");

  based::python::bind_errors(m);
  based::python::bind_tensor(m);
  based::python::bind_safetensors(m);
  based::python::bind_config(m);
  based::python::bind_sampling(m);
  based::python::bind_model(m);
  based::python::bind_session(m);
  based::python::bind_generator(m);
  based::python::bind_engine(m);
  based::python::bind_bandwidth(m);
  based::python::bind_devices(m);
  based::python::bind_ops(m);
}

extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError,
                    "based runs in the main interpreter of a process, and this is a sub-interpreter: use threads or "
                    "processes instead");
    return nullptr;
  }
  return PyInit__core_of_main_interpreter();
}
