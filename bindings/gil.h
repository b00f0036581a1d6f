#pragma once

#include <pybind11/pybind11.h>

// pybind11's own guards end the process when Python ends while another thread is in a call: CPython up to 3.13 answers
// a thread that asks for the GIL then with pthread_exit, whose unwinding meets their destructors, which are noexcept.
// These guards keep such a thread where it is until the process is gone, as CPython 3.14 does.

namespace based::python {

/// Takes the GIL back for this thread; does not return once Python is ending.
void retake_gil(PyThreadState* thread);

/// Others may run Python while this lives. To be made with the GIL held.
class ReleaseGil {
 public:
  ReleaseGil() : thread_(PyEval_SaveThread()) {}
  ~ReleaseGil() { retake_gil(thread_); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* thread_;
};

/// Holds the GIL, in a thread that Python knows.
class AcquireGil {
 public:
  AcquireGil();
  ~AcquireGil() { PyGILState_Release(state_); }
  AcquireGil(const AcquireGil&) = delete;
  AcquireGil& operator=(const AcquireGil&) = delete;

 private:
  PyGILState_STATE state_;
};

/// Learns which thread is Python's main one. Once, when the module is imported.
void find_main_thread();

/// Whether Python runs signal handlers in this thread. It runs no Python code itself, so no handler runs in it.
bool is_main_thread();

}  // namespace based::python
