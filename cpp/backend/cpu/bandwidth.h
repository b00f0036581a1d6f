#pragma once

#include <cstddef>

namespace based::cpu {

/// Bytes per second at which `num_threads` threads together read a buffer of `nbytes`, the median of several passes.
/// To measure memory and not a cache, take many times the last cache's size. num_threads 0: available_cpus(). Throws
/// InvalidArgument for less than 16 MiB or a number of threads outside 0 … 1024, std::bad_alloc.
double measure_read_bandwidth(int num_threads, std::size_t nbytes);

}  // namespace based::cpu
