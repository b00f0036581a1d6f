#include <pybind11/stl.h>

#include <string>

#include "based/device.h"
#include "bindings.h"

namespace based::python {

void bind_devices(py::module_& m) {
  using NoGil = py::call_guard<ReleaseGil>;
  py::class_<DeviceDescription>(m, "DeviceDescription", "The CPU, or a GPU of this machine.")
      .def_property_readonly("device", [](const DeviceDescription& d) { return d.device.str(); })
      .def_readonly("name", &DeviceDescription::name)
      .def_readonly("architecture", &DeviceDescription::architecture)
      .def_readonly("total_nbytes", &DeviceDescription::total_nbytes)
      .def_readonly("free_nbytes", &DeviceDescription::free_nbytes)
      .def_readonly("problem", &DeviceDescription::problem, "Why it cannot be used; empty when it can.");
  m.def("devices", &devices, NoGil(), "The CPU, then every GPU of this machine.");
  m.def("available_memory", &available_memory, NoGil(),
        "Bytes of the machine's memory that this process may still take.");
  m.def("cuda_problem", &cuda_problem, NoGil(), "Why no GPU can be used; empty when one can.");
  m.def(
      "synchronize", [](const std::string& device) { synchronize(Device::parse(device)); }, py::arg("device"), NoGil(),
      "Waits for everything that was enqueued on a device.");
  m.def("add_cublas_path", &add_cublas_path, py::arg("path"),
        "A folder to look into for cuBLASLt before the system's own. Before the first use of CUDA.");
}

}  // namespace based::python
