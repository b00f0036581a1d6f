#include <pybind11/gil_safe_call_once.h>

#include <chrono>
#include <system_error>

#include "based/engine.h"
#include "based/error.h"
#include "bindings.h"

namespace based::python {

namespace {

struct ErrorTypes {
  py::object error, format_error, state_error, session_busy_error, unsupported_error, device_error, engine_busy_error,
      engine_closed_error;
};

py::gil_safe_call_once_and_store<ErrorTypes>& error_types() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<ErrorTypes> storage;
  return storage;
}

py::object new_type(py::module_& m, const char* name, const char* doc, const py::tuple& bases) {
  const std::string full_name = std::string(py::str(m.attr("__name__"))) + "." + name;
  const auto type =
      py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(full_name.c_str(), doc, bases.ptr(), nullptr));
  if (!type) throw py::error_already_set();
  m.attr(name) = type;
  return type;
}

// Messages may quote file names and bytes that are no UTF-8.
py::object text(const char* what) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(what, static_cast<py::ssize_t>(std::char_traits<char>::length(what)), "backslashreplace"));
}

void raise(const py::object& type, const std::exception& error) {
  PyErr_SetObject(type.ptr(), text(error.what()).ptr());
}

// Messages that Python code makes of names from files: a terminal would obey the control characters in them.
py::object printable(const py::str& text_object) {
  const auto bytes = py::reinterpret_steal<py::bytes>(
      PyUnicode_AsEncodedString(text_object.ptr(), "utf-8", "backslashreplace"));  // lone surrogates
  if (!bytes) throw py::error_already_set();
  return text(detail::message(std::string_view(bytes)).c_str());
}

py::object message_of(const py::object& error) {
  const auto plain = reinterpret_cast<PyTypeObject*>(PyExc_Exception)->tp_str;
  const auto message = py::reinterpret_steal<py::str>(plain(error.ptr()));
  if (!message) throw py::error_already_set();
  return printable(message);
}

void translate(std::exception_ptr pointer) {
  const ErrorTypes& types = error_types().get_stored();
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const FormatError& error) {
    raise(types.format_error, error);
  } catch (const StateError& error) {
    raise(types.state_error, error);
  } catch (const SessionBusyError& error) {
    raise(types.session_busy_error, error);
  } catch (const UnsupportedError& error) {
    raise(types.unsupported_error, error);
  } catch (const DeviceError& error) {
    raise(types.device_error, error);
  } catch (const EngineBusyError& error) {
    raise(types.engine_busy_error, error);
  } catch (const EngineClosedError& error) {
    raise(types.engine_closed_error, error);
  } catch (const Error& error) {
    raise(types.error, error);
  } catch (const OutOfMemory& error) {
    raise(py::reinterpret_borrow<py::object>(PyExc_MemoryError), error);
  } catch (const InvalidArgument& error) {
    raise(py::reinterpret_borrow<py::object>(PyExc_ValueError), error);
  } catch (const std::system_error& error) {
    // OSError's own constructor picks FileNotFoundError, PermissionError, … by the number.
    const auto value = py::reinterpret_steal<py::object>(
        PyObject_CallFunction(PyExc_OSError, "iO", error.code().value(), text(error.what()).ptr()));
    if (value) PyErr_SetObject(py::type::of(value).ptr(), value.ptr());
  }
}

}  // namespace

void bind_errors(py::module_& m) {
  error_types().call_once_and_store_result([&m] {
    const auto builtin = [](PyObject* type) { return py::reinterpret_borrow<py::object>(type); };
    ErrorTypes types;
    types.error = new_type(m, "Error", "Base of the failures that are particular to this library.",
                           py::make_tuple(builtin(PyExc_Exception)));
    types.format_error = new_type(m, "FormatError", "A file whose bytes contradict its format: weights, config, state.",
                                  py::make_tuple(types.error, builtin(PyExc_ValueError)));
    types.state_error = new_type(m, "StateError", "A state or checkpoint that belongs to another model or shape.",
                                 py::make_tuple(types.error, builtin(PyExc_ValueError)));
    types.session_busy_error =
        new_type(m, "SessionBusyError", "A session or stream used while another call on it is under way.",
                 py::make_tuple(types.error, builtin(PyExc_RuntimeError)));
    types.unsupported_error =
        new_type(m, "UnsupportedError", "A request for something that this build or machine cannot do.",
                 py::make_tuple(types.error, builtin(PyExc_RuntimeError)));
    types.device_error = new_type(m, "DeviceError", "A device that failed: the process can use it no more.",
                                  py::make_tuple(types.error, builtin(PyExc_RuntimeError)));
    types.engine_busy_error =
        new_type(m, "EngineBusyError", "A request that an engine has no room for now: its queue is full.",
                 py::make_tuple(types.error, builtin(PyExc_RuntimeError)));
    types.engine_closed_error = new_type(m, "EngineClosedError", "A request to an engine that was shut down.",
                                         py::make_tuple(types.error, builtin(PyExc_RuntimeError)));
    types.error.attr("__str__") = py::cpp_function(&message_of, py::name("__str__"), py::is_method(types.error));
    return types;
  });
  py::register_local_exception_translator(&translate);
  find_main_thread();
}

namespace {

void check_signals() {
  const AcquireGil gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

InterruptCheck interrupt_check(std::shared_ptr<const std::atomic<bool>> cancelled) {
  using Clock = std::chrono::steady_clock;
  return [cancelled = std::move(cancelled), handles_signals = is_main_thread(), last = Clock::now()]() mutable {
    if (cancelled && cancelled->load(std::memory_order_relaxed)) throw Error("cancelled");
    if (!handles_signals) return;
    // Taking the GIL from a busy Python thread costs up to its switch interval (5 ms): not at every call.
    const Clock::time_point now = Clock::now();
    if (now - last < std::chrono::milliseconds(20)) return;
    last = now;
    check_signals();
  };
}

InterruptCheck last_interrupt_check() { return is_main_thread() ? InterruptCheck(&check_signals) : InterruptCheck(); }

}  // namespace based::python
