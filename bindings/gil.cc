#include "gil.h"

#include <pybind11/gil_safe_call_once.h>
#include <unistd.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace based::python {

namespace py = pybind11;

namespace {

// What f returns; where f ends the thread instead, the thread waits for ever. It must not be unwound: destructors on
// the way would take the GIL again, or drop references without it.
template <typename F>
auto or_wait_for_the_end(F&& f) {
#if defined(__GLIBCXX__)
  try {
    return f();
  } catch (const abi::__forced_unwind&) {  // pthread_exit
    while (true) pause();
  }
#else
  return f();  // pthread_exit does not unwind
#endif
}

}  // namespace

void retake_gil(PyThreadState* thread) {
  or_wait_for_the_end([thread] { PyEval_RestoreThread(thread); });
}

AcquireGil::AcquireGil() : state_(or_wait_for_the_end([] { return PyGILState_Ensure(); })) {}

bool is_main_thread() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> main_thread;  // forks may change who it is
  const py::object& get =
      main_thread.call_once_and_store_result([] { return py::module_::import("threading").attr("main_thread"); })
          .get_stored();
  return get().attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

}  // namespace based::python
