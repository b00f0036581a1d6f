#include "gil.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <new>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace based::python {

namespace py = pybind11;

namespace {

std::atomic<unsigned long> main_thread{0};

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

void find_main_thread() {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  // The thread that forks is the child's only one.
  if (pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); }) != 0) throw std::bad_alloc();
}

bool is_main_thread() { return main_thread == PyThread_get_thread_ident(); }

}  // namespace based::python
