#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "based/model.h"
#include "based/sampling.h"
#include "based/tensor.h"
#include "gil.h"

namespace based {

class Session;
class State;
class Checkpoint;
struct TokenEvent;
struct DeviceDescription;

namespace io {
class SafetensorsFile;
}

}  // namespace based

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
void bind_engine(py::module_& m);
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

/// Whether T has a Python class. Their casters refuse objects whose __init__ has not run (those of Class.__new__),
/// which pybind11 takes for a T in memory that nobody has written. Of the configs of mixers: by what they all have.
template <typename T>
inline constexpr bool is_bound = requires { T::kLetter; };
template <>
inline constexpr bool is_bound<PyTensor> = true;
template <>
inline constexpr bool is_bound<TextSamplingParams> = true;
template <>
inline constexpr bool is_bound<Model> = true;
template <>
inline constexpr bool is_bound<Session> = true;
template <>
inline constexpr bool is_bound<State> = true;
template <>
inline constexpr bool is_bound<Checkpoint> = true;
template <>
inline constexpr bool is_bound<TokenEvent> = true;
template <>
inline constexpr bool is_bound<DeviceDescription> = true;
template <>
inline constexpr bool is_bound<io::SafetensorsFile> = true;
template <>
inline constexpr bool is_bound<Projection> = true;
template <>
inline constexpr bool is_bound<Parameter> = true;
template <>
inline constexpr bool is_bound<StateTensor> = true;
template <>
inline constexpr bool is_bound<MlpConfig> = true;
template <>
inline constexpr bool is_bound<ModelConfig> = true;

/// Raises what a signal handler raised (KeyboardInterrupt), within some 20 ms of the signal; raises based.Error once
/// `*cancelled`. To be made with the GIL held, and used by the same thread with the GIL released.
InterruptCheck interrupt_check(std::shared_ptr<const std::atomic<bool>> cancelled = nullptr);

/// The same for the end of a call, where its work may still be undone: looks for signals whenever it is called. Empty
/// for threads in which Python runs no signal handlers.
InterruptCheck last_interrupt_check();

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

namespace pybind11::detail {

template <typename T>
class type_caster<T, std::enable_if_t<based::python::is_bound<T>>> : public type_caster_base<T> {
 public:
  // None would be a null pointer, for a method called as Class.method(None) too.
  bool load(handle source, bool convert) {
    return !source.is_none() && this->template load_impl<type_caster>(source, convert);
  }

 protected:
  friend class type_caster_generic;
  void load_value(value_and_holder&& found) {
    if (found.value_ptr() == nullptr)
      throw type_error(std::string(this->typeinfo->type->tp_name) + ".__init__() was not called on this object");
    type_caster_base<T>::load_value(std::move(found));
  }
};

}  // namespace pybind11::detail
