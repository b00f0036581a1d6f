#include "based/tensor.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "based/device.h"
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

std::pair<std::int32_t, std::int32_t> dlpack_device(const PyTensor& array) {
  const Device device = array.tensor.device();
  return {device.type == Device::Type::cpu ? dlpack::kCpu : dlpack::kCuda, device.index};
}

/// What a capsule owns: the DLPack structure, and what its pointers point into.
template <typename Managed>
struct Export {
  Managed managed{};
  Tensor tensor;
  bool on_legacy_stream = false;  // the consumer's work
  std::vector<std::int64_t> shape, strides;
};

template <typename Managed>
py::object export_dlpack(const PyTensor& array, bool copied, bool on_legacy_stream) {
  auto owner = std::make_unique<Export<Managed>>();
  owner->on_legacy_stream = on_legacy_stream;
  owner->tensor = array.tensor;
  owner->shape = array.shape;
  owner->strides = array.strides();
  Managed& managed = owner->managed;
  const auto [type, index] = dlpack_device(array);
  managed.tensor = {array.tensor.data(),
                    {type, index},
                    static_cast<std::int32_t>(owner->shape.size()),
                    dlpack_type(array.tensor.dtype()),
                    owner->shape.data(),
                    owner->strides.data(),
                    0};
  managed.context = owner.get();
  managed.deleter = [](Managed* self) {
    auto* exported = static_cast<Export<Managed>*>(self->context);
    release_lent(std::move(exported->tensor), exported->on_legacy_stream);
    delete exported;
  };
  if constexpr (std::is_same_v<Managed, dlpack::ManagedTensorVersioned>) {
    managed.version = {1, 0};
    managed.flags = copied ? dlpack::kIsCopied : 0;
  }
  // A consumer renames the capsule and calls the deleter itself.
  PyObject* capsule = PyCapsule_New(&managed, Managed::kCapsule, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, Managed::kCapsule)) return;
    auto* unused = static_cast<Managed*>(PyCapsule_GetPointer(self, Managed::kCapsule));
    delete static_cast<Export<Managed>*>(unused->context);
  });
  if (capsule == nullptr) throw py::error_already_set();
  owner.release();
  return py::reinterpret_steal<py::object>(capsule);
}

PyTensor copied_to(const PyTensor& array, Device device) {
  const ReleaseGil nogil;
  PyTensor copy(array.tensor.copy_to(device));
  copy.shape = array.shape;
  return copy;
}

// Contents are complete when a consumer gets them, on whatever stream it reads.
void complete(const PyTensor& array) {
  if (array.complete) return;
  const ReleaseGil nogil;
  synchronize(array.tensor.device());
}

py::object to_dlpack(const PyTensor& array, const py::object& stream,
                     std::optional<std::pair<std::int64_t, std::int64_t>> max_version,
                     std::optional<std::pair<std::int32_t, std::int32_t>> device, std::optional<bool> copy) {
  const bool on_cpu = array.tensor.device().type == Device::Type::cpu;
  if (on_cpu && !stream.is_none()) throw py::buffer_error("stream must be None for a tensor of the CPU");
  if (!on_cpu && !stream.is_none() && (!PyLong_Check(stream.ptr()) || PyBool_Check(stream.ptr())))
    throw py::buffer_error("stream must be None or an integer for a tensor of a GPU");
  const bool to_host = device && !on_cpu && *device == std::pair(dlpack::kCpu, 0);
  if (device && !to_host && *device != dlpack_device(array)) {
    throw py::buffer_error("a tensor of " + array.tensor.device().str() +
                           " cannot be exported to another device, DLPack's (" + std::to_string(device->first) + ", " +
                           std::to_string(device->second) + ")");
  }
  if (to_host && !copy.value_or(true)) throw py::buffer_error("from a GPU to the CPU without a copy");
  const bool copies = to_host || copy.value_or(false);
  if (!copies) complete(array);
  const PyTensor source = copies ? copied_to(array, to_host ? Device{} : array.tensor.device()) : array;
  // A consumer gives memory back while its own work on it may be under way: by DLPack's names, on the legacy default
  // stream (1), or on one that may be gone by then or be another thread's.
  const bool legacy = !stream.is_none() && stream.equal(py::int_(1));
  if (max_version && max_version->first >= 1)
    return export_dlpack<dlpack::ManagedTensorVersioned>(source, copies, legacy);
  return export_dlpack<dlpack::ManagedTensor>(source, copies, legacy);
}

}  // namespace

std::vector<std::int64_t> PyTensor::strides() const {
  std::vector<std::int64_t> result(shape.size(), 1);
  for (std::size_t i = result.size(); i-- > 1;) result[i - 1] = result[i] * tensor.shape()[i];
  return result;
}

py::object as_numpy(const PyTensor& array) {
  const DType dtype = array.tensor.dtype();
  const std::string name{name_of(dtype)};
  if (dtype == DType::bfloat16 || dtype == DType::float8_e4m3 || dtype == DType::float8_e5m2) {
    throw py::type_error("NumPy has no dtype " + name + ": take the tensor by DLPack");
  }
  if (array.tensor.device().type != Device::Type::cpu) return as_numpy(copied_to(array, Device{}));
  auto owner = std::make_unique<std::shared_ptr<void>>(array.tensor.storage());
  const py::capsule base(owner.get(), [](void* pointer) { delete static_cast<std::shared_ptr<void>*>(pointer); });
  owner.release();
  std::vector<std::int64_t> strides = array.strides();
  for (auto& stride : strides) stride *= static_cast<std::int64_t>(size_of(dtype));
  return py::array(py::dtype(name), array.shape, strides, array.tensor.data(), base);
}

void bind_tensor(py::module_& m) {
  py::class_<PyTensor>(
      m, "Tensor",
      "Dense rows of numbers; copies of it share its memory. NumPy and DLPack read it; NumPy gets a copy "
      "of what is a GPU's.")
      .def_property_readonly("shape", [](const PyTensor& a) { return py::tuple(py::cast(a.shape)); })
      .def_property_readonly("dtype", [](const PyTensor& a) { return name_of(a.tensor.dtype()); })
      .def_property_readonly("device", [](const PyTensor& a) { return a.tensor.device().str(); })
      .def_property_readonly(
          "nbytes",
          [](const PyTensor& a) { return static_cast<std::size_t>(num_elements(a.shape)) * size_of(a.tensor.dtype()); })
      .def(
          "columns",
          [](const PyTensor& a, std::int64_t count) {
            if (a.shape.size() != 2 || count < 0 || count > a.shape[1])
              throw py::value_error("the first " + std::to_string(count) + " columns of shape " + shape_str(a.shape));
            PyTensor columns = a;
            columns.shape[1] = count;
            return columns;
          },
          py::arg("count"), "The first columns of a matrix, on the same memory.")
      .def(
          "__array__",
          [](const PyTensor& a, const py::object& dtype, const py::object& copy) {
            const bool on_cpu = a.tensor.device().type == Device::Type::cpu;
            if (!on_cpu && copy.is(py::bool_(false)))
              throw py::value_error("a tensor of " + a.tensor.device().str() + " is an array only as a copy");
            const py::object how = on_cpu ? copy : py::none();  // it is a copy already
            return py::array(py::module_::import("numpy").attr("array")(as_numpy(a), dtype, py::arg("copy") = how));
          },
          py::arg("dtype") = py::none(), py::arg("copy") = py::none(),
          "A NumPy array on the same memory, or on a copy of a GPU's.")
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
           "Contents are complete: no `stream` has to wait. A consumer that names the legacy default stream (1, as "
           "PyTorch does for its default stream) works on that one alone, and gives a GPU's memory back without "
           "waiting; for "
           "every other one, giving it back waits for the device.")
      .def("__dlpack_device__", &dlpack_device)
      .def("__len__",
           [](const PyTensor& a) {
             if (a.shape.empty()) throw py::type_error("len() of a tensor without axes");
             return a.shape[0];
           })
      .def("__repr__", [](const PyTensor& a) {
        return "Tensor(shape=" + shape_str(a.shape) + ", dtype=" + std::string(name_of(a.tensor.dtype())) +
               ", device=" + a.tensor.device().str() + ")";
      });
}

}  // namespace based::python
