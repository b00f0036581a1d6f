#include "backend/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
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

TEST(AvailableCpus, AtLeastOneAndNoMoreThanTheMachineHas) {
  EXPECT_GE(available_cpus(), 1);
  EXPECT_LE(available_cpus(), static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
}

}  // namespace
}  // namespace based::cpu
