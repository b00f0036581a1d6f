#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace based::cpu {

/// Reference to a callable, valid during the call it is passed to.
class TaskRef {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, TaskRef>)
  TaskRef(F& f)  // NOLINT: implicit by design
      : object_(&f),
        call_([](void* object, std::int64_t task, int thread) { (*static_cast<F*>(object))(task, thread); }) {}
  void operator()(std::int64_t task, int thread) const { call_(object_, task, thread); }

 private:
  void* object_;
  void (*call_)(void*, std::int64_t, int);
};

/// A fixed set of threads, the caller being one of them. Any thread may call run(); calls of different threads take
/// turns. Workers spin for a short while between calls (a decode step is some 150 calls), then sleep.
/// A process may be forked at any time: the child's first run() starts threads of the child's own.
class ThreadPool {
 public:
  /// num_threads ≥ 1, the caller included. Throws IoError when a thread cannot be started.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  /// Calls f(task, thread) once for each task in [0, num_tasks), thread in [0, num_threads()), and returns when all
  /// have returned. Tasks are handed out one by one in order. f must not throw, call run() or fork the process. In a
  /// forked child, throws IoError when a thread cannot be started; no task was called then.
  template <typename F>
  void run(std::int64_t num_tasks, F&& f) {
    run_tasks(num_tasks, TaskRef(f));
  }

 private:
  void run_tasks(std::int64_t num_tasks, TaskRef f);
  struct Impl;
  Impl& impl();
  const int num_threads_;
  std::atomic<Impl*> impl_;
};

/// CPUs that this process may use: affinity mask and cgroup quota considered; ≥ 1.
int available_cpus();

}  // namespace based::cpu
