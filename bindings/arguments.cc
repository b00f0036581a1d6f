#include "arguments.h"

#include <pybind11/numpy.h>

#include <new>

#include "bindings.h"

namespace based::python {

std::string describe(py::handle value) {
  py::object text = py::repr(value);
  if (py::len(text) > 60) text = py::object(text[py::slice(0, 57, 1)]) + py::str("...");
  return std::string(py::str(py::type::of(value).attr("__name__"))) + " " + std::string(py::str(text));
}

namespace {

// Of an object's own __index__ or __float__: what is no TypeError (KeyboardInterrupt, MemoryError) is not ours to hide.
void clear_type_error() {
  if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  PyErr_Clear();
}

py::int_ to_index(py::handle value, const std::string& name) {
  if (!PyBool_Check(value.ptr())) {
    if (PyObject* index = PyNumber_Index(value.ptr())) return py::reinterpret_steal<py::int_>(index);
    clear_type_error();
  }
  throw py::type_error(name + " must be an integer, not " + describe(value));
}

bool is_text(py::handle value) {
  return PyUnicode_Check(value.ptr()) || PyBytes_Check(value.ptr()) || PyByteArray_Check(value.ptr());
}

}  // namespace

std::int64_t to_int64(py::handle value, const std::string& name, std::int64_t lowest, std::int64_t highest) {
  const py::int_ index = to_index(value, name);
  int overflow = 0;
  const std::int64_t result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || result < lowest || result > highest) {
    throw py::value_error(name + " = " + std::string(py::str(index)) + " is outside [" + std::to_string(lowest) + ", " +
                          std::to_string(highest) + "]");
  }
  return result;
}

std::uint64_t to_uint64(py::handle value, const std::string& name) {
  const py::int_ index = to_index(value, name);
  const std::uint64_t result = PyLong_AsUnsignedLongLong(index.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw py::value_error(name + " = " + std::string(py::str(index)) + " is outside [0, 2**64)");
  }
  return result;
}

double to_double(py::handle value, const std::string& name) {
  static const auto is_number = [](py::handle v) {
    return !PyBool_Check(v.ptr()) && !is_text(v) &&
           (PyFloat_Check(v.ptr()) || PyIndex_Check(v.ptr()) || py::hasattr(v, "__float__"));
  };
  if (is_number(value)) {
    const double result = PyFloat_AsDouble(value.ptr());
    if (!PyErr_Occurred()) return result;
    clear_type_error();
  }
  throw py::type_error(name + " must be a number, not " + describe(value));
}

bool to_bool(py::handle value, const std::string& name) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  throw py::type_error(name + " must be True or False, not " + describe(value));
}

std::string to_text(py::handle value, const std::string& name) {
  if (!PyUnicode_Check(value.ptr())) throw py::type_error(name + " must be a str, not " + describe(value));
  const auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_EncodeFSDefault(value.ptr()));
  if (!bytes) throw py::error_already_set();
  return bytes;
}

std::string to_string(py::handle value, const std::string& name) {
  if (!PyUnicode_Check(value.ptr())) throw py::type_error(name + " must be a str, not " + describe(value));
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (text == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::value_error(name + " holds half of a surrogate pair, expected characters that UTF-8 has");
  }
  return std::string(text, static_cast<std::size_t>(size));
}

void check_length(std::size_t length, std::size_t limit, const std::string& name, const char* what) {
  if (length > limit) {
    throw py::value_error(name + " has " + std::to_string(length) + " " + what + ", expected at most " +
                          std::to_string(limit));
  }
}

std::vector<std::string> Reader<std::vector<std::string>>::read(py::handle value, const std::string& arg) {
  std::vector<std::string> result;
  if (value.is_none()) return result;
  if (PyUnicode_Check(value.ptr())) {
    result.push_back(to_string(value, arg));
  } else if (py::isinstance<py::iterable>(value) && !is_text(value)) {
    check_length(py::len_hint(value), kMaxItems, arg, "items");
    for (py::handle item : value) {
      result.push_back(to_string(item, arg + "[" + std::to_string(result.size()) + "]"));
      check_length(result.size(), kMaxItems, arg, "items");
    }
  } else {
    throw py::type_error(arg + " must be a str or a list of them, not " + describe(value));
  }
  for (const std::string& text : result) {
    if (text.empty()) throw py::value_error(arg + ": an empty string would stop everything");
  }
  return result;
}

std::vector<std::pair<std::int64_t, double>> Reader<std::vector<std::pair<std::int64_t, double>>>::read(
    py::handle value, const std::string& arg) {
  std::vector<std::pair<std::int64_t, double>> result;
  if (value.is_none()) return result;
  if (!PyMapping_Check(value.ptr()) || !py::hasattr(value, "items")) {
    throw py::type_error(arg + " must be a dict of token ids to numbers, not " + describe(value));
  }
  for (py::handle item : value.attr("items")()) {
    const auto [id, bias] = item.cast<std::pair<py::object, py::object>>();
    result.emplace_back(to_int64(id, "a token id in " + arg),
                        to_double(bias, arg + "[" + std::string(py::repr(id)) + "]"));
    check_length(result.size(), kMaxItems, arg, "items");
  }
  return result;
}

namespace {

void check_id(std::int64_t id, std::size_t index, std::int64_t vocab_size, const std::string& name) {
  if (id < 0 || id >= vocab_size) {
    throw py::value_error(name + ": token id " + std::to_string(id) + " at index " + std::to_string(index) +
                          " is outside [0, vocab_size = " + std::to_string(vocab_size) + ")");
  }
}

std::vector<std::int32_t> ids_of_array(const py::array& array, std::int64_t vocab_size, const std::string& name,
                                       bool may_be_empty) {
  if (array.ndim() != 1) {
    throw py::value_error(name + ": token ids must be a 1-D array, not one of shape " +
                          std::string(py::str(array.attr("shape"))));
  }
  if (array.size() == 0) {
    if (may_be_empty) return {};
    throw py::value_error(name + " is empty: at least one token is needed");
  }
  check_length(static_cast<std::size_t>(array.size()), kMaxTokenIds, name, "token ids");
  if (py::hasattr(array, "mask")) throw py::type_error(name + ": token ids must be a plain array, not a masked one");
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') {
    throw py::type_error(name + ": token ids must be integers, not an array of " +
                         std::string(py::str(py::handle(array.dtype()))));
  }
  if (kind == 'u' && array.itemsize() == 8) return token_ids(array.attr("tolist")(), vocab_size, name);
  const auto wide = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  if (!wide) throw std::bad_alloc();
  const std::int64_t* ids = wide.data();
  std::vector<std::int32_t> result(static_cast<std::size_t>(wide.size()));
  for (std::size_t i = 0; i < result.size(); ++i) {
    check_id(ids[i], i, vocab_size, name);
    result[i] = static_cast<std::int32_t>(ids[i]);
  }
  return result;
}

}  // namespace

std::vector<std::int32_t> token_ids(py::handle ids, std::int64_t vocab_size, const std::string& name,
                                    bool may_be_empty) {
  if (py::isinstance<py::array>(ids))
    return ids_of_array(py::reinterpret_borrow<py::array>(ids), vocab_size, name, may_be_empty);
  if (!PySequence_Check(ids.ptr()) || is_text(ids)) {
    throw py::type_error(name + ": token ids must be a sequence of integers, not " + describe(ids));
  }
  const py::ssize_t length = PySequence_Size(ids.ptr());
  if (length < 0) throw py::error_already_set();
  check_length(static_cast<std::size_t>(length), kMaxTokenIds, name, "token ids");
  const py::tuple items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(ids.ptr()));
  if (!items) throw py::error_already_set();
  if (items.empty() && !may_be_empty) throw py::value_error(name + " is empty: at least one token is needed");
  std::vector<std::int32_t> result(items.size());
  for (std::size_t i = 0; i < result.size(); ++i) {
    const std::int64_t id = [&] {  // the message is made only when it is needed: this loop reads whole books
      if (PyLong_CheckExact(items[i].ptr())) {
        int overflow = 0;
        const std::int64_t value = PyLong_AsLongLongAndOverflow(items[i].ptr(), &overflow);
        if (overflow == 0) return value;
      }
      return to_int64(items[i], name + ": token id at index " + std::to_string(i), 0, vocab_size - 1);
    }();
    check_id(id, i, vocab_size, name);
    result[i] = static_cast<std::int32_t>(id);
  }
  return result;
}

std::vector<std::vector<std::int32_t>> prompts(py::handle value, std::int64_t vocab_size, bool may_be_empty) {
  if (!PySequence_Check(value.ptr()) || is_text(value)) {
    throw py::type_error("prompts must be a sequence of prompts, not " + describe(value));
  }
  const py::ssize_t length = PySequence_Size(value.ptr());
  if (length < 0) throw py::error_already_set();
  check_length(static_cast<std::size_t>(length), kMaxTokenIds, "prompts", "prompts");
  std::vector<std::vector<std::int32_t>> result;
  std::size_t total = 0;
  for (py::handle prompt : value) {
    result.push_back(token_ids(prompt, vocab_size, "prompt " + std::to_string(result.size()), may_be_empty));
    check_length(total += result.back().size(), kMaxTokenIds, "prompts", "token ids");
  }
  return result;
}

}  // namespace based::python
