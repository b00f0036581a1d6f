#include "based/ops.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "based/error.h"
#include "bindings.h"
#include "dlpack.h"

namespace based::python {

namespace {

DType dtype_of(const dlpack::DataType& type, const std::string& name) {
  using dlpack::TypeCode;
  if (type.lanes == 1) {
    if (type.code == TypeCode::float_ && type.bits == 32) return DType::float32;
    if (type.code == TypeCode::float_ && type.bits == 16) return DType::float16;
    if (type.code == TypeCode::bfloat && type.bits == 16) return DType::bfloat16;
  }
  throw py::type_error(name + " has DLPack dtype (" + std::to_string(static_cast<int>(type.code)) + ", " +
                       std::to_string(type.bits) + " bits), expected float32, bfloat16 or float16");
}

/// An argument of an operation, and the capsule that keeps its memory while the work is enqueued.
struct Operand {
  ops::Array array;
  py::object capsule;
};

// Memory that its owner exports; `stream` is where it will be read.
Operand read(const py::object& value, const std::string& name, const py::object& stream) {
  if (py::isinstance<PyTensor>(value)) {
    const auto& array = value.cast<const PyTensor&>();
    return {{array.tensor.data(), array.tensor.dtype(), array.tensor.device(), array.shape, array.strides()}, {}};
  }
  if (!py::hasattr(value, "__dlpack__") || !py::hasattr(value, "__dlpack_device__"))
    throw py::type_error(name + " must be a tensor that exports DLPack, not " +
                         std::string(py::str(py::type::of(value).attr("__name__"))));
  const bool on_gpu = value.attr("__dlpack_device__")().cast<std::pair<int, int>>().first == dlpack::kCuda;
  Operand operand;
  operand.capsule = on_gpu ? value.attr("__dlpack__")(py::arg("stream") = stream) : value.attr("__dlpack__")();
  auto* managed =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(operand.capsule.ptr(), dlpack::ManagedTensor::kCapsule));
  if (managed == nullptr) throw py::error_already_set();
  const dlpack::Tensor& tensor = managed->tensor;
  ops::Array& array = operand.array;
  array.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  array.dtype = dtype_of(tensor.dtype, name);
  if (tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCuda)
    throw py::value_error(name + " is on DLPack device type " + std::to_string(tensor.device.type) +
                          ", expected a CUDA device");
  array.device = {tensor.device.type == dlpack::kCpu ? Device::Type::cpu : Device::Type::cuda, tensor.device.index};
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides != nullptr) {
    array.strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    array.strides.assign(array.shape.size(), 1);
    for (std::size_t i = array.strides.size(); i-- > 1;) array.strides[i - 1] = array.strides[i] * array.shape[i];
  }
  return operand;
}

std::optional<Operand> read_optional(const py::object& value, const std::string& name, const py::object& stream) {
  if (value.is_none()) return std::nullopt;
  return read(value, name, stream);
}

std::optional<ops::Array> array_of(const std::optional<Operand>& operand) {
  if (!operand) return std::nullopt;
  return operand->array;
}

ops::StreamHandle handle(std::uint64_t stream) {
  return reinterpret_cast<ops::StreamHandle>(static_cast<std::uintptr_t>(stream));
}

void taylor_linear_attention(const py::object& q, const py::object& k, const py::object& v, const py::object& initial,
                             const py::object& out, const py::object& final, double eps, std::uint64_t stream,
                             const py::object& producer_stream) {
  const Operand operands[] = {read(q, "q", producer_stream), read(k, "k", producer_stream),
                              read(v, "v", producer_stream), read(out, "out", producer_stream)};
  const auto before = read_optional(initial, "initial_state", producer_stream);
  const auto after = read_optional(final, "final_state", producer_stream);
  const ReleaseGil nogil;
  ops::taylor_linear_attention(operands[0].array, operands[1].array, operands[2].array, array_of(before),
                               operands[3].array, array_of(after), eps, handle(stream));
}

void sliding_window_attention(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                              std::int64_t window, double scale, std::uint64_t stream,
                              const py::object& producer_stream) {
  const Operand operands[] = {read(q, "q", producer_stream), read(k, "k", producer_stream),
                              read(v, "v", producer_stream), read(out, "out", producer_stream)};
  const ReleaseGil nogil;
  ops::sliding_window_attention(operands[0].array, operands[1].array, operands[2].array, operands[3].array, window,
                                scale, handle(stream));
}

void gated_short_conv(const py::object& u, const py::object& weight, const py::object& initial, const py::object& out,
                      const py::object& final, std::uint64_t stream, const py::object& producer_stream) {
  const Operand operands[] = {read(u, "u", producer_stream), read(weight, "weight", producer_stream),
                              read(out, "out", producer_stream)};
  const auto before = read_optional(initial, "initial_state", producer_stream);
  const auto after = read_optional(final, "final_state", producer_stream);
  const ReleaseGil nogil;
  ops::gated_short_conv(operands[0].array, operands[1].array, array_of(before), operands[2].array, array_of(after),
                        handle(stream));
}

PyTensor empty(const std::string& device, const std::string& dtype, const std::vector<std::int64_t>& shape,
               std::uint64_t stream) {
  PyTensor array(ops::empty(Device::parse(device), parse_dtype(dtype), shape, handle(stream)));
  array.complete = false;
  return array;
}

}  // namespace

// python/based/ops.py has the functions that users call. `producer_stream` is what an input's __dlpack__ is told.
void bind_ops(py::module_& m) {
  m.def("op_taylor_linear_attention", &taylor_linear_attention, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("initial_state"), py::arg("out"), py::arg("final_state"), py::arg("eps"), py::arg("stream"),
        py::arg("producer_stream"));
  m.def("op_sliding_window_attention", &sliding_window_attention, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("window"), py::arg("scale"), py::arg("stream"), py::arg("producer_stream"));
  m.def("op_gated_short_conv", &gated_short_conv, py::arg("u"), py::arg("weight"), py::arg("initial_state"),
        py::arg("out"), py::arg("final_state"), py::arg("stream"), py::arg("producer_stream"));
  m.def("op_empty", &empty, py::arg("device"), py::arg("dtype"), py::arg("shape"), py::arg("stream"),
        "Uninitialised memory of a GPU, in the order of `stream`.");
}

}  // namespace based::python
