#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "based/error.h"
#include "bindings.h"
#include "io/convert_dtype.h"
#include "io/file.h"
#include "io/safetensors.h"

namespace based::python {

namespace {

using io::SafetensorsFile;
using TensorTuple = std::tuple<std::string, py::object, std::string>;

/// NumPy's name for the bits of a dtype: itself, or the unsigned integer of its size.
py::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return py::dtype("uint16");
    case DType::float8_e4m3:
    case DType::float8_e5m2:
      return py::dtype("uint8");
    default:
      return py::dtype(std::string(name_of(dtype)));
  }
}

py::dict tensors(const SafetensorsFile& file) {
  const py::object owner = py::cast(&file, py::return_value_policy::reference);  // the object that holds it
  py::dict result;
  for (const auto& [name, view] : file.tensors()) {
    py::array array(numpy_dtype(view.dtype), view.shape, view.data, owner);
    array.attr("setflags")(py::arg("write") = false);
    result[py::str(name)] = array;
  }
  return result;
}

/// `array` as `dtype`, in place.
TensorView view_of(const py::array& array, DType dtype, const std::string& name) {
  if (!(array.flags() & py::array::c_style)) throw py::type_error(name + " must be a C-contiguous array");
  if (static_cast<std::size_t>(array.itemsize()) != size_of(dtype)) {
    throw py::type_error(name + ": an array of " + std::string(py::str(py::handle(array.dtype()))) +
                         " cannot hold the bits of " + std::string(name_of(dtype)));
  }
  return {dtype, {array.shape(), array.shape() + array.ndim()}, static_cast<const std::byte*>(array.data())};
}

py::array read_bytes(const SafetensorsFile& file, const std::string& name, std::size_t offset, std::size_t nbytes) {
  const auto found = file.tensors().find(name);
  if (found == file.tensors().end()) throw py::key_error(name);
  if (offset > found->second.nbytes() || nbytes > found->second.nbytes() - offset)
    throw py::value_error("bytes " + std::to_string(offset) + " to " + std::to_string(offset) + " + " +
                          std::to_string(nbytes) + " of tensor '" + name + "', expected some of its " +
                          std::to_string(found->second.nbytes()));
  py::array result(py::dtype("uint8"), nbytes);
  const std::span out(static_cast<std::byte*>(result.mutable_data()), nbytes);
  const ReleaseGil nogil;
  file.read(found->second, offset, out);
  return result;
}

/// Bytes of a tensor that is no array: what `source`.read(offset, nbytes) gives; see python/based/_pickle.py.
void read_block(const py::object& source, std::size_t offset, std::span<std::byte> out) {
  const AcquireGil gil;
  const py::array block = source.attr("read")(offset, out.size());
  const TensorView bytes = view_of(block, DType::uint8, "a block of a tensor");
  if (bytes.nbytes() != out.size()) throw py::value_error("a block of another size than was asked for");
  std::copy_n(bytes.data, out.size(), out.begin());
}

void write(const std::filesystem::path& path, const std::vector<TensorTuple>& tensors,
           const std::map<std::string, std::string>& metadata) {
  std::vector<io::TensorToWrite> to_write;
  for (const auto& [name, array, dtype] : tensors) {
    const std::string where = "tensor '" + name + "'";
    if (py::isinstance<py::array>(array))
      to_write.push_back({name, view_of(array, parse_dtype(dtype), where)});
    else if (py::hasattr(array, "read"))
      to_write.push_back({name, {parse_dtype(dtype), array.attr("shape").cast<std::vector<std::int64_t>>(), nullptr}});
    else
      throw py::type_error(where + ": expected an array, or a tensor of a file");
  }
  const ReleaseGil nogil;
  io::write_safetensors(path, to_write, metadata, [&](std::size_t i, std::size_t offset, std::span<std::byte> out) {
    read_block(std::get<1>(tensors[i]), offset, out);
  });
}

py::array convert_dtype(const py::array& bits, const std::string& source, const std::string& target) {
  const DType from = parse_dtype(source), to = parse_dtype(target);
  const TensorView view = view_of(bits, from, "bits");
  py::array result(numpy_dtype(to), view.shape);
  auto* out = static_cast<std::byte*>(result.mutable_data());
  const ReleaseGil nogil;
  io::convert(view, to, out);
  return result;
}

}  // namespace

void bind_safetensors(py::module_& m) {
  py::class_<SafetensorsFile, std::shared_ptr<SafetensorsFile>>(
      m, "SafetensorsFile", "A safetensors file, memory-mapped and checked whole. Raises OSError or FormatError.")
      .def(py::init([](const std::filesystem::path& path) {
             const ReleaseGil nogil;
             return std::const_pointer_cast<SafetensorsFile>(SafetensorsFile::open(path));
           }),
           py::arg("path"))
      .def("tensors", &tensors,
           "Read-only arrays on the mapping, which they keep alive, by name. bfloat16 comes as uint16 and float8 as "
           "uint8, bit for bit; arrays may be unaligned.")
      .def(
          "dtypes",
          [](const SafetensorsFile& file) {
            std::map<std::string, std::string> result;
            for (const auto& [name, view] : file.tensors()) result.emplace(name, name_of(view.dtype));
            return result;
          },
          "\"float32\", \"bfloat16\", … by tensor name.")
      .def("read", &read_bytes, py::arg("name"), py::arg("offset"), py::arg("nbytes"),
           "Bytes of a tensor in a new uint8 array, read and not mapped. Raises OSError, and FormatError when the file "
           "has become shorter.")
      .def("metadata", &SafetensorsFile::metadata);
  m.def("parse_limit", &io::parse_limit, py::arg("real_limit"),
        "A limit on what is parsed as a whole, multiplied by the environment variable BASED_PARSE_LIMIT. Raises "
        "ValueError when that is not an integer from 1 to 1000.");
  m.def(
      "exchange_paths",
      [](const std::filesystem::path& a, const std::filesystem::path& b) {
        const ReleaseGil nogil;
        return io::exchange_paths(a, b);
      },
      py::arg("a"), py::arg("b"),
      "Lets two files or directories change names at once. False where the filesystem cannot. Raises OSError.");
  m.def("write_safetensors", &write, py::arg("path"), py::arg("tensors"), py::arg("metadata"),
        "Writes (name, array, dtype name) in this order to a temporary file beside `path` and renames it. Arrays are "
        "C-contiguous and hold the dtype's bits (bfloat16 as uint16); what has `shape` and `read`(offset, nbytes) is "
        "read "
        "in blocks. Raises OSError, TypeError, ValueError.");
  m.def("convert_dtype", &convert_dtype, py::arg("bits"), py::arg("source"), py::arg("target"),
        "A new array of the same shape, each number converted between float32, bfloat16 and float16 (nearest even; too "
        "large gives inf). bfloat16 as uint16.");
}

}  // namespace based::python
