#include "backend/cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

namespace based::cpu {
namespace {

TEST(ThreadPool, EveryTaskOnceOnAThreadOfThePool) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const std::int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<int> calls(static_cast<std::size_t>(tasks));  // not atomic: each task has its own
      std::atomic<bool> in_range = true;
      pool.run(tasks, [&](std::int64_t task, int thread) {
        if (thread < 0 || thread >= threads) in_range = false;
        ++calls[static_cast<std::size_t>(task)];
      });
      EXPECT_TRUE(in_range);
      EXPECT_EQ(std::count(calls.begin(), calls.end(), 1), tasks);
    }
  }
}

TEST(ThreadPool, ThreadIndexBelongsToOneThreadAtATime) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> users(4);
  std::atomic<bool> shared = false;
  for (int round = 0; round < 200; ++round)
    pool.run(16, [&](std::int64_t, int thread) {
      auto& user = users[static_cast<std::size_t>(thread)];
      if (user.fetch_add(1) != 0) shared = true;
      user.fetch_sub(1);
    });
  EXPECT_FALSE(shared);
}

TEST(ThreadPool, WritesAreVisibleFromRunToRun) {
  ThreadPool pool(4);
  std::vector<std::int64_t> values(64, 0);
  for (int round = 0; round < 5000; ++round)
    // Mirrored each time, so that a task mostly reads what another thread wrote in the round before.
    pool.run(64,
             [&](std::int64_t task, int) { ++values[static_cast<std::size_t>(round % 2 == 0 ? task : 63 - task)]; });
  for (const std::int64_t v : values) EXPECT_EQ(v, 5000);
}

TEST(ThreadPool, CallersTakeTurns) {
  ThreadPool pool(3);
  constexpr std::size_t kCallers = 4;
  std::vector<std::atomic<int>> inside(kCallers);  // tasks of each caller that are running
  std::vector<std::atomic<std::int64_t>> sums(kCallers);
  std::atomic<bool> mixed = false;
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 300; ++round)
        pool.run(10, [&](std::int64_t task, int) {
          ++inside[caller];
          for (std::size_t other = 0; other < kCallers; ++other)
            if (other != caller && inside[other] != 0) mixed = true;
          sums[caller] += task;
          --inside[caller];
        });
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_FALSE(mixed);
  for (const auto& sum : sums) EXPECT_EQ(sum, 300 * 45);
}

TEST(ThreadPool, WakesAfterSleep) {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // well beyond the spin
    // Two tasks that wait for each other end only if the worker has woken.
    std::atomic<int> arrived = 0;
    pool.run(2, [&](std::int64_t, int) {
      ++arrived;
      while (arrived < 2) std::this_thread::yield();
    });
    EXPECT_EQ(arrived, 2);
  }
}

TEST(ThreadPool, FarMoreThreadsThanCpus) {
  ThreadPool pool(16 * available_cpus());
  const auto start = std::chrono::steady_clock::now();
  std::atomic<std::int64_t> sum = 0;
  for (int round = 0; round < 500; ++round) pool.run(8, [&](std::int64_t task, int) { sum += task; });
  EXPECT_EQ(sum, 500 * 28);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST(ThreadPool, ManyPools) {
  for (int i = 0; i < 100; ++i) {
    ThreadPool pool(3);
    std::atomic<int> calls = 0;
    if (i % 2 == 0) pool.run(5, [&](std::int64_t, int) { ++calls; });
    EXPECT_EQ(calls, i % 2 == 0 ? 5 : 0);
  }
}

// Forks a child that calls `child` and ends with its result. Returns that, or −1 when a signal ended it, as an alarm
// does after 20 seconds.
template <typename F>
int in_child(F&& child) {
  std::fflush(nullptr);  // or the child writes it once more
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    child();
    std::_Exit(3);
  }
  int status = 0;
  EXPECT_EQ(waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Whether tasks run once each, and on every thread of the pool.
bool works(ThreadPool& pool) {
  const int threads = pool.num_threads();
  std::atomic<int> arrived = 0;
  std::vector<std::atomic<int>> calls(static_cast<std::size_t>(threads));
  pool.run(threads, [&](std::int64_t, int thread) {  // each waits for the others: no thread can take two
    ++arrived;
    while (arrived < threads) std::this_thread::yield();
    ++calls[static_cast<std::size_t>(thread)];
  });
  std::atomic<std::int64_t> sum = 0;
  for (int round = 0; round < 100; ++round) pool.run(50, [&](std::int64_t task, int) { sum += task; });
  return sum == 100 * 1225 && std::ranges::all_of(calls, [](const auto& n) { return n == 1; });
}

// Forks while another thread computes on the pool; the parent's pool goes on working.
class Forks : public testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "the thread sanitizer ends a process that starts threads after such a fork";
#endif
  }

  template <typename F>
  void fork_often(F&& child) {
    std::atomic<bool> stop = false;
    std::thread caller([&] {
      std::atomic<std::int64_t> sum = 0;
      while (!stop) pool_->run(40, [&](std::int64_t task, int) { sum += task; });
    });
    for (int round = 0; round < 20; ++round) ASSERT_EQ(in_child(child), 7) << round;
    stop = true;
    caller.join();
    EXPECT_TRUE(works(*pool_));
  }

  std::unique_ptr<ThreadPool> pool_ = std::make_unique<ThreadPool>(3);
};

TEST_F(Forks, AChildRunsTasksOnThreadsOfItsOwn) {
  fork_often([this] {
    const bool first = works(*pool_), second = works(*pool_);
    pool_.reset();
    std::_Exit(first && second ? 7 : 1);
  });
}

TEST_F(Forks, AChildDestroysThePoolThatItNeverUsed) {
  fork_often([this] {
    pool_.reset();
    std::_Exit(7);
  });
}

TEST_F(Forks, AChildExitsWithAPoolThatIsDestroyedThen) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "the leak check of a child that exits finds what the parent's threads hold";
#endif
  static std::unique_ptr<ThreadPool> destroyed_at_exit;
  destroyed_at_exit = std::move(pool_);
  const auto idle = [] { std::exit(7); };
  EXPECT_EQ(in_child(idle), 7);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // its threads sleep now
  EXPECT_EQ(in_child(idle), 7);
  EXPECT_EQ(in_child([] { std::exit(works(*destroyed_at_exit) ? 7 : 1); }), 7);
  destroyed_at_exit.reset();
}

TEST_F(Forks, ThreadsOfAChildUseThePoolAtOnce) {
  fork_often([this] {
    std::atomic<bool> all = true;
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
      callers.emplace_back([&] {
        if (!works(*pool_)) all = false;
      });
    for (std::thread& caller : callers) caller.join();
    std::_Exit(all ? 7 : 1);
  });
}

TEST_F(Forks, AGrandchildHasThreadsOfItsOwnToo) {
  fork_often([this] {
    bool child = works(*pool_);
    child = in_child([this] { std::_Exit(works(*pool_) ? 7 : 1); }) == 7 && child;
    std::_Exit(child && works(*pool_) ? 7 : 1);
  });
}

TEST(AvailableCpus, AtLeastOneAndNoMoreThanTheMachineHas) {
  EXPECT_GE(available_cpus(), 1);
  EXPECT_LE(available_cpus(), static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
}

}  // namespace
}  // namespace based::cpu
