#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "based/model.h"
#include "based/sampling.h"
#include "based/tensor.h"

namespace based::python {

namespace py = pybind11;

// One per public type; module.cc calls them in the order in which they need each other.
void bind_errors(py::module_& m);
void bind_tensor(py::module_& m);
void bind_safetensors(py::module_& m);
void bind_config(py::module_& m);
void bind_sampling(py::module_& m);
void bind_model(py::module_& m);
void bind_session(py::module_& m);
void bind_generator(py::module_& m);
void bind_bandwidth(py::module_& m);
void bind_devices(py::module_& m);
void bind_ops(py::module_& m);

/// What Python calls a Tensor: a tensor, or the first columns of a matrix.
struct PyTensor {
  PyTensor(Tensor t) : tensor(std::move(t)), shape(tensor.shape()) {}  // NOLINT: implicit on purpose

  Tensor tensor;
  std::vector<std::int64_t> shape;
  bool complete = true;  // nothing is left to do for its contents

  std::vector<std::int64_t> strides() const;  // in elements
};

/// SamplingParams with the fields that concern text, which the core knows nothing of.
struct TextSamplingParams : SamplingParams {
  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
  bool skip_special_tokens = true;
};

/// Raises what a signal handler raised (KeyboardInterrupt), within some 20 ms of the signal; raises based.Error once
/// `*cancelled`. To be used with the GIL released.
InterruptCheck interrupt_check(std::shared_ptr<const std::atomic<bool>> cancelled = nullptr);

/// A NumPy array: on the tensor's memory, which it keeps alive, or on a copy when that is a GPU's. Raises TypeError for
/// a dtype that NumPy lacks.
py::object as_numpy(const PyTensor& array);

/// Token ids from any sequence of integers or 1-D integer array. Raises TypeError on anything else (bool and float
/// included), ValueError when empty (unless it may be) or when an id is outside [0, vocab_size). `name` opens every
/// message.
std::vector<std::int32_t> token_ids(py::handle ids, std::int64_t vocab_size, const std::string& name,
                                    bool may_be_empty = false);

/// The same for a sequence of prompts.
std::vector<std::vector<std::int32_t>> prompts(py::handle value, std::int64_t vocab_size, bool may_be_empty = false);

}  // namespace based::python
