#pragma once

#include <cuda_runtime_api.h>

namespace based::cuda {

/// Throws DeviceError (OutOfMemory for cudaErrorMemoryAllocation) unless `status` is cudaSuccess. `doing` names the
/// operation, e.g. "sliding_window". An error of an earlier asynchronous operation surfaces here too: the message says
/// so, and lists the operations enqueued last (note_operation).
void check(cudaError_t status, const char* doing);

/// Keeps a failure of a call that nobody can be told of, in a destructor or a deleter: report_failures() throws the
/// first one. Any thread.
void keep_failure(cudaError_t status, const char* doing) noexcept;

/// Throws DeviceError when a failure was kept since the last call.
void report_failures();

/// Remembers, per thread, that `name` (a literal) was enqueued; check() tells it. Under BASED_CUDA_SYNC=1 it also waits
/// for it, so that a fault is reported by the operation that made it.
void note_operation(const char* name, cudaStream_t stream);

}  // namespace based::cuda
