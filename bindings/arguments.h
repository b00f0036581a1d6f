#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// Strict conversion of arguments: True is no number, 3.0 is no integer, and the message names the argument.

namespace based::python {

namespace py = pybind11;

/// "float 3.5": the type and value of a refused argument.
std::string describe(py::handle value);

/// Any int-like (NumPy's integers too), but no bool. Raises TypeError, or ValueError outside [lowest, highest].
std::int64_t to_int64(py::handle value, const std::string& name,
                      std::int64_t lowest = std::numeric_limits<std::int64_t>::min(),
                      std::int64_t highest = std::numeric_limits<std::int64_t>::max());
std::uint64_t to_uint64(py::handle value, const std::string& name);

/// Any number, but no bool.
double to_double(py::handle value, const std::string& name);
bool to_bool(py::handle value, const std::string& name);

/// A str in UTF-8. Raises ValueError when it holds half of a surrogate pair.
std::string to_string(py::handle value, const std::string& name);

/// A str that may hold a path: as the system has its bytes, which need not be UTF-8.
std::string to_text(py::handle value, const std::string& name);

/// Token ids of one call. An array may claim any size and hold none of it (stride 0): nothing is copied before this is
/// checked. A longer sequence can be fed by several calls.
inline constexpr std::size_t kMaxTokenIds = std::size_t{1} << 28;
/// Of a list that is a parameter.
inline constexpr std::size_t kMaxItems = std::size_t{1} << 20;

/// Raises ValueError "name has 5 items, expected at most 4".
void check_length(std::size_t length, std::size_t limit, const std::string& name, const char* what);

/// How a C++ type is read from Python and named in signatures.
template <typename T, typename = void>
struct Reader;

template <>
struct Reader<bool> {
  static constexpr auto name = py::detail::const_name("bool");
  static bool read(py::handle value, const std::string& arg) { return to_bool(value, arg); }
};

template <typename T>
struct Reader<T, std::enable_if_t<std::is_integral_v<T> && std::is_signed_v<T>>> {
  static constexpr auto name = py::detail::const_name("typing.SupportsIndex");
  static T read(py::handle value, const std::string& arg) {
    return static_cast<T>(to_int64(value, arg, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
  }
};

template <>
struct Reader<std::uint64_t> {
  static constexpr auto name = py::detail::const_name("typing.SupportsIndex");
  static std::uint64_t read(py::handle value, const std::string& arg) { return to_uint64(value, arg); }
};

template <>
struct Reader<double> {
  static constexpr auto name = py::detail::const_name("typing.SupportsFloat");
  static double read(py::handle value, const std::string& arg) { return to_double(value, arg); }
};

template <typename T>
struct Reader<std::optional<T>> {
  static constexpr auto name = Reader<T>::name + py::detail::const_name(" | None");
  static std::optional<T> read(py::handle value, const std::string& arg) {
    if (value.is_none()) return std::nullopt;
    return Reader<T>::read(value, arg);
  }
};

template <typename T>
struct Reader<std::vector<T>> {
  static constexpr auto name =
      py::detail::const_name("collections.abc.Sequence[") + Reader<T>::name + py::detail::const_name("] | None");
  static std::vector<T> read(py::handle value, const std::string& arg) {
    std::vector<T> result;
    if (value.is_none()) return result;
    if (!py::isinstance<py::iterable>(value) || py::isinstance<py::str>(value) || py::isinstance<py::bytes>(value)) {
      throw py::type_error(arg + " must be a list of integers, not " + describe(value));
    }
    check_length(py::len_hint(value), kMaxItems, arg, "items");
    for (py::handle item : value) {
      result.push_back(Reader<T>::read(item, arg + "[" + std::to_string(result.size()) + "]"));
      check_length(result.size(), kMaxItems, arg, "items");
    }
    return result;
  }
};

/// A str or a list of them.
template <>
struct Reader<std::vector<std::string>> {
  static constexpr auto name = py::detail::const_name("str | collections.abc.Sequence[str] | None");
  static std::vector<std::string> read(py::handle value, const std::string& arg);
};

/// A dict of token ids to numbers.
template <>
struct Reader<std::vector<std::pair<std::int64_t, double>>> {
  static constexpr auto name =
      py::detail::const_name("collections.abc.Mapping[typing.SupportsIndex, typing.SupportsFloat] | None");
  static std::vector<std::pair<std::int64_t, double>> read(py::handle value, const std::string& arg);
};

inline bool any_object(PyObject*) { return true; }

/// An argument as Python gave it; get() converts it.
template <typename T>
class Arg : public py::object {
 public:
  PYBIND11_OBJECT_DEFAULT(Arg, py::object, any_object)
  T get(const std::string& name) const { return Reader<T>::read(*this, name); }
};

/// A str for to_text().
class Text : public py::object {
 public:
  PYBIND11_OBJECT_DEFAULT(Text, py::object, any_object)
};

/// Annotation of an argument that token_ids() or prompts() reads.
class TokenIds : public py::object {
 public:
  PYBIND11_OBJECT_DEFAULT(TokenIds, py::object, any_object)
};
class Prompts : public py::object {
 public:
  PYBIND11_OBJECT_DEFAULT(Prompts, py::object, any_object)
};

}  // namespace based::python

namespace pybind11::detail {

template <typename T>
struct handle_type_name<based::python::Arg<T>> {
  static constexpr auto name = based::python::Reader<T>::name;
};
template <>
struct handle_type_name<based::python::Text> {
  static constexpr auto name = const_name("str");
};
template <>
struct handle_type_name<based::python::TokenIds> {
  static constexpr auto name = const_name("collections.abc.Sequence[int] | numpy.ndarray");
};
template <>
struct handle_type_name<based::python::Prompts> {
  static constexpr auto name = const_name("collections.abc.Sequence[collections.abc.Sequence[int] | numpy.ndarray]");
};

}  // namespace pybind11::detail
