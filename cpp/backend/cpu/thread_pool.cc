#include "backend/cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>

#include <fstream>
#include <sstream>
#endif

#include "based/error.h"

namespace based::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A wake-up from sleep costs some 50 µs, the pause between two operations of a decode step a few.
constexpr auto kSpin = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Polls until done() or the deadline; gives the CPU away now and then, in case that what it waits for needs it.
template <typename F>
bool spin_until(F&& done, Clock::duration limit) {
  const auto start = Clock::now();
  while (true) {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
    if (Clock::now() - start > limit) return false;
    std::this_thread::yield();
  }
}

// How many forks lie between the first process and this one. A pool that was made before the last of them belongs to a
// parent: its threads are not in this process, and its locks may be held for ever.
std::atomic<std::uint64_t> num_forks{0};
const int fork_handler_error = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });

}  // namespace

// A run is open while `epoch` is odd. A worker enters by raising `active`, then looks at `epoch` again; the caller
// closes by setting `epoch`, then waits for `active` to fall to 0. Both in sequentially consistent order, so either
// the worker sees the run closed or the caller sees the worker. A worker that is late (asleep, not scheduled) is
// thus never waited for.
struct ThreadPool::Impl {
  std::mutex turn;  // held by the thread whose run it is

  alignas(64) std::atomic<std::uint32_t> epoch{0};
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<int> active{0};

  // Of the open run: written while it is closed.
  alignas(64) const TaskRef* task = nullptr;
  std::int64_t num_tasks = 0;

  std::atomic<int> sleepers{0};
  std::mutex sleep_mutex;
  std::condition_variable wake;

  Clock::duration spin = kSpin;
  std::vector<std::thread> workers;

  const std::uint64_t made_after = num_forks.load();
  Impl* older = nullptr;  // see abandon()

  explicit Impl(int num_threads);
  ~Impl() { stop_all(); }
  bool in_this_process() const { return made_after == num_forks.load(std::memory_order_relaxed); }

  // Keeps a parent's pool, which no function may touch: destroying a condition variable waits for its waiters, which
  // are threads of the parent. Its few hundred bytes stay in a list, so that they do not count as lost.
  static void abandon(Impl* impl) {
    static std::atomic<Impl*> last{nullptr};
    impl->older = last.exchange(impl);
  }

  void work_through(int thread) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) (*task)(i, thread);
  }

  void work(int thread) {
    std::uint32_t seen = 0;
    while (true) {
      const auto news = [&] {
        const std::uint32_t e = epoch.load(std::memory_order_relaxed);
        return (e != seen && (e & 1u) != 0) || stop.load(std::memory_order_relaxed);
      };
      if (!spin_until(news, spin)) {
        std::unique_lock lock(sleep_mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return (epoch.load() != seen && (epoch.load() & 1u) != 0) || stop.load(); });
        sleepers.fetch_sub(1);
      }
      if (stop.load()) return;
      active.fetch_add(1);
      const std::uint32_t now = epoch.load();
      if ((now & 1u) != 0) work_through(thread);
      active.fetch_sub(1);
      seen = now;
    }
  }

  void stop_all() {
    {
      std::lock_guard lock(sleep_mutex);
      stop.store(true);
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
};

ThreadPool::Impl::Impl(int num_threads) {
  if (fork_handler_error != 0) throw IoError(fork_handler_error, "registering a handler of forks");
  // With more threads than CPUs a spinning one holds up a working one.
  if (num_threads > available_cpus()) spin = std::chrono::microseconds(5);
  workers.reserve(static_cast<std::size_t>(num_threads - 1));
  for (int thread = 1; thread < num_threads; ++thread) {
    try {
      workers.emplace_back([this, thread] { work(thread); });
    } catch (const std::system_error& e) {
      stop_all();
      throw IoError(e.code().value(), "creating thread " + std::to_string(thread + 1) + " of " +
                                          std::to_string(num_threads) + " of the CPU backend");
    }
  }
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), impl_(new Impl(num_threads)) {}

ThreadPool::~ThreadPool() {
  Impl* const impl = impl_.load();
  impl->in_this_process() ? delete impl : Impl::abandon(impl);
}

ThreadPool::Impl& ThreadPool::impl() {
  Impl* found = impl_.load(std::memory_order_acquire);
  if (found->in_this_process()) return *found;
  auto fresh = std::make_unique<Impl>(num_threads_);
  Impl* const parents = found;
  if (!impl_.compare_exchange_strong(found, fresh.get())) return *found;  // another thread was faster
  Impl::abandon(parents);
  return *fresh.release();
}

void ThreadPool::run_tasks(std::int64_t num_tasks, TaskRef f) {
  Impl& pool = impl();
  std::lock_guard turn(pool.turn);
  if (num_tasks <= 1 || pool.workers.empty()) {
    for (std::int64_t i = 0; i < num_tasks; ++i) f(i, 0);
    return;
  }
  pool.task = &f;
  pool.num_tasks = num_tasks;
  pool.next.store(0, std::memory_order_relaxed);
  pool.epoch.fetch_add(1);
  if (pool.sleepers.load() > 0) {
    {
      std::lock_guard lock(pool.sleep_mutex);
    }
    pool.wake.notify_all();
  }
  pool.work_through(0);
  pool.epoch.fetch_add(1);
  const auto idle = [&] { return pool.active.load() == 0; };
  while (!spin_until(idle, std::chrono::milliseconds(1))) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

namespace {

#if defined(__linux__)

// CPUs of the affinity mask, 0 when unknown.
int affinity_cpus() {
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(cpus));
    if (set == nullptr) return 0;
    const std::size_t size = CPU_ALLOC_SIZE(static_cast<std::size_t>(cpus));
    const bool ok = sched_getaffinity(0, size, set) == 0;
    const int count = ok ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (ok) return count;
  }
  return 0;
}

// ⌈quota / period⌉, 0 for none.
int quota_cpus(const std::string& quota, double period) {
  double q = 0;
  if (!(std::istringstream(quota) >> q) || q <= 0 || period <= 0) return 0;  // "max" and -1 mean none
  return static_cast<int>((q + period - 1) / period);
}

// Smallest quota of this process's control groups and their ancestors, 0 for none.
int cgroup_cpus() {
  int least = 0;
  std::ifstream groups("/proc/self/cgroup");  // lines "id:controllers:path"
  for (std::string line; std::getline(groups, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = line.substr(first, second - first).append(":");  // ":cpu:cpuacct:", v2 "::"
    std::replace(controllers.begin(), controllers.end(), ',', ':');
    const bool v2 = controllers == "::";
    if (!v2 && controllers.find(":cpu:") == std::string::npos) continue;
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    // In a container the path may be the host's: what is not there is skipped, and the root is looked at last.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      std::string quota;
      double period = 0;
      if (v2) {
        std::ifstream(root + path + "/cpu.max") >> quota >> period;
      } else {
        std::ifstream(root + path + "/cpu.cfs_quota_us") >> quota;
        std::ifstream(root + path + "/cpu.cfs_period_us") >> period;
      }
      const int cpus = quota_cpus(quota, period);
      if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

#endif

}  // namespace

int available_cpus() {
  int cpus = 0;
#if defined(__linux__)
  cpus = affinity_cpus();
#endif
  if (cpus < 1) cpus = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  const int quota = cgroup_cpus();
  if (quota > 0 && quota < cpus) cpus = quota;
#endif
  return cpus < 1 ? 1 : cpus;
}

}  // namespace based::cpu
