#include "backend/cpu/bandwidth.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_features.h"
#include "backend/cpu/kernels/read.h"
#include "backend/cpu/thread_pool.h"
#include "based/error.h"

namespace based::cpu {

double measure_read_bandwidth(int num_threads, std::size_t nbytes) {
  constexpr std::size_t kTaskBytes = std::size_t{1} << 20;
  constexpr std::size_t kMinBytes = 16 * kTaskBytes;
  if (num_threads < 0 || num_threads > 1024)
    throw InvalidArgument("num_threads is " + std::to_string(num_threads) + ", expected 0 … 1024");
  if (nbytes < kMinBytes)
    throw InvalidArgument("nbytes is " + std::to_string(nbytes) + ", expected at least " + std::to_string(kMinBytes));
  const auto pool = std::make_shared<ThreadPool>(num_threads == 0 ? available_cpus() : num_threads);
  const Isa isa = choose_isa();
  const auto fold = for_isa(isa, [](auto tag) -> const ReadKernels& { return read_kernels(tag); }).fold;

  const auto num_tasks = static_cast<std::int64_t>(nbytes / kTaskBytes);
  const backend::Buffer buffer =
      CpuBackend(pool, isa).allocate(static_cast<std::size_t>(num_tasks) * kTaskBytes, backend::MemoryKind::workspace);
  const auto task_data = [&](std::int64_t task) {
    return static_cast<char*>(buffer.data.get()) + static_cast<std::size_t>(task) * kTaskBytes;
  };
  // Written, or every page would be the system's one page of zeros, in cache.
  pool->run(num_tasks,
            [&](std::int64_t task, int) { std::memset(task_data(task), static_cast<int>(task), kTaskBytes); });

  std::array<double, 7> seconds;
  std::atomic<std::uint32_t> result = 0;  // keeps the reads alive
  for (double& s : seconds) {
    const auto start = std::chrono::steady_clock::now();
    pool->run(num_tasks, [&](std::int64_t task, int) { result ^= fold(task_data(task), kTaskBytes); });
    s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  std::ranges::nth_element(seconds, seconds.begin() + seconds.size() / 2);
  return static_cast<double>(num_tasks) * static_cast<double>(kTaskBytes) / seconds[seconds.size() / 2];
}

}  // namespace based::cpu
