#include "based/tensor.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <utility>

#include "bindings.h"
#include "dlpack.h"

namespace based::python {

namespace {

dlpack::DataType dlpack_type(DType dtype) {
  using dlpack::TypeCode;
  const TypeCode code = [dtype] {
    switch (dtype) {
      case DType::float32:
      case DType::float16:
      case DType::float64:
        return TypeCode::float_;
      case DType::bfloat16:
        return TypeCode::bfloat;
      case DType::int64:
      case DType::int32:
      case DType::int16:
      case DType::int8:
        return TypeCode::int_;
      case DType::uint64:
      case DType::uint32:
      case DType::uint16:
      case DType::uint8:
        return TypeCode::uint;
      case DType::boolean:
        return TypeCode::boolean;
      case DType::float8_e4m3:
        return TypeCode::float8_e4m3fn;
      case DType::float8_e5m2:
        return TypeCode::float8_e5m2;
    }
    throw py::type_error("no DLPack type for this tensor");
  }();
  return {code, static_cast<std::uint8_t>(8 * size_of(dtype)), 1};
}

std::pair<std::int32_t, std::int32_t> dlpack_device(const Tensor& tensor) {
  return {tensor.device().type == Device::Type::cpu ? dlpack::kCpu : dlpack::kCuda, tensor.device().index};
}

std::vector<std::int64_t> strides(const Tensor& tensor) {
  std::vector<std::int64_t> result(tensor.shape().size(), 1);
  for (std::size_t i = result.size(); i-- > 1;) result[i - 1] = result[i] * tensor.shape()[i];
  return result;
}

/// What a capsule owns: the DLPack structure, and what its pointers point into.
template <typename Managed>
struct Export {
  Managed managed{};
  Tensor tensor;
  std::vector<std::int64_t> shape, strides;
};

template <typename Managed>
py::object export_dlpack(const Tensor& tensor, bool copied) {
  auto owner = std::make_unique<Export<Managed>>();
  owner->tensor = tensor;
  owner->shape = tensor.shape();
  owner->strides = strides(tensor);
  Managed& managed = owner->managed;
  const auto [type, index] = dlpack_device(tensor);
  managed.tensor = {tensor.data(),
                    {type, index},
                    static_cast<std::int32_t>(owner->shape.size()),
                    dlpack_type(tensor.dtype()),
                    owner->shape.data(),
                    owner->strides.data(),
                    0};
  managed.context = owner.get();
  managed.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->context); };
  if constexpr (std::is_same_v<Managed, dlpack::ManagedTensorVersioned>) {
    managed.version = {1, 0};
    managed.flags = copied ? dlpack::kIsCopied : 0;
  }
  // A consumer renames the capsule and calls the deleter itself.
  PyObject* capsule = PyCapsule_New(&managed, Managed::kCapsule, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, Managed::kCapsule)) return;
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(self, Managed::kCapsule));
    unused->deleter(unused);
  });
  if (capsule == nullptr) throw py::error_already_set();
  owner.release();
  return py::reinterpret_steal<py::object>(capsule);
}

py::object to_dlpack(const Tensor& tensor, const py::object& stream,
                     std::optional<std::pair<std::int64_t, std::int64_t>> max_version,
                     std::optional<std::pair<std::int32_t, std::int32_t>> device, std::optional<bool> copy) {
  if (tensor.device().type != Device::Type::cpu) throw py::buffer_error("only tensors of the CPU can be exported");
  if (!stream.is_none()) throw py::buffer_error("stream must be None for a tensor of the CPU");
  if (device && *device != dlpack_device(tensor)) {
    throw py::buffer_error("a tensor of the CPU cannot be exported to another device");
  }
  Tensor source = tensor;
  if (copy.value_or(false)) {
    source = Tensor::empty(tensor.dtype(), tensor.shape());
    std::memcpy(source.data(), tensor.data(), tensor.nbytes());
  }
  if (max_version && max_version->first >= 1) {
    return export_dlpack<dlpack::ManagedTensorVersioned>(source, copy.value_or(false));
  }
  return export_dlpack<dlpack::ManagedTensor>(source, copy.value_or(false));
}

}  // namespace

py::object as_numpy(const Tensor& tensor) {
  const std::string name{name_of(tensor.dtype())};
  if (tensor.device().type != Device::Type::cpu)
    throw py::type_error("a tensor of " + tensor.device().str() + " is not in the memory that NumPy sees");
  if (tensor.dtype() == DType::bfloat16 || tensor.dtype() == DType::float8_e4m3 ||
      tensor.dtype() == DType::float8_e5m2) {
    throw py::type_error("NumPy has no dtype " + name + ": take the tensor by DLPack");
  }
  auto owner = std::make_unique<std::shared_ptr<void>>(tensor.storage());
  const py::capsule base(owner.get(), [](void* pointer) { delete static_cast<std::shared_ptr<void>*>(pointer); });
  owner.release();
  return py::array(py::dtype(name), tensor.shape(), tensor.data(), base);
}

void bind_tensor(py::module_& m) {
  py::class_<Tensor>(m, "Tensor", "Dense row-major array; copies of it share its memory. NumPy and DLPack read it.")
      .def_property_readonly("shape", [](const Tensor& t) { return py::tuple(py::cast(t.shape())); })
      .def_property_readonly("dtype", [](const Tensor& t) { return name_of(t.dtype()); })
      .def_property_readonly("device", [](const Tensor& t) { return t.device().str(); })
      .def_property_readonly("nbytes", &Tensor::nbytes)
      .def(
          "__array__",
          [](const Tensor& t, const py::object& dtype, const py::object& copy) {
            return py::array(py::module_::import("numpy").attr("array")(as_numpy(t), dtype, py::arg("copy") = copy));
          },
          py::arg("dtype") = py::none(), py::arg("copy") = py::none(), "A NumPy array on the same memory.")
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", &dlpack_device)
      .def("__repr__", [](const Tensor& t) {
        return "Tensor(shape=" + shape_str(t.shape()) + ", dtype=" + std::string(name_of(t.dtype())) +
               ", device=" + t.device().str() + ")";
      });
}

}  // namespace based::python
