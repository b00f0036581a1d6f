#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"
#include "backend/cpu/bandwidth.h"
#include "bindings.h"

namespace based::python {

void bind_bandwidth(py::module_& m) {
  m.def(
      "measure_read_bandwidth",
      [](const Arg<std::optional<int>>& num_threads, const Arg<std::int64_t>& nbytes) {
        const int threads = num_threads.get("num_threads").value_or(0);
        const std::int64_t size = nbytes.get("nbytes");
        if (size < 0) throw py::value_error("nbytes is " + std::to_string(size) + ", expected ≥ 0");
        const ReleaseGil nogil;
        return cpu::measure_read_bandwidth(threads, static_cast<std::size_t>(size));
      },
      py::arg("num_threads") = py::none(), py::arg("nbytes") = std::int64_t{1} << 30,
      "Bytes per second at which that many CPU threads (None: all) read a buffer of `nbytes`; median of several "
      "passes.");
}

}  // namespace based::python
