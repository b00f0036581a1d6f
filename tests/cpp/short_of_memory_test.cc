// An engine whose loop gets no memory from operator new, at each of its calls in turn.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "based/engine.h"
#include "operator_new.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::greedy;
using test::random_tokens;
using test::shortage;

struct Answer {
  std::vector<std::int32_t> tokens{};
  int num_ends = 0;
  bool failed = false;
};

// Three requests of an engine for two, while the k-th request for memory of its loop fails, and `times` from there on.
// Each of them ends once, whatever happens; one that does not fail has its tokens.
std::vector<Answer> run(const std::shared_ptr<const Model>& model, long k, long times) {
  std::mutex mutex;
  std::condition_variable news;
  std::vector<Answer> answers(3);
  int num_ended = 0;
  for (Answer& answer : answers) answer.tokens.reserve(64);
  {
    EngineOptions options;
    options.max_batch_size = 2;
    Engine engine(model, std::move(options));
    shortage.arm(k, times);
    for (int i = 0; i < 3; ++i) {
      EngineRequest request;
      request.request = {random_tokens(5 + 40 * static_cast<std::size_t>(i), 1 + static_cast<std::uint32_t>(i)),
                         greedy(5)};
      request.sink = [&, i](std::span<const EngineEvent> events) {
        const std::lock_guard lock(mutex);
        Answer& answer = answers[static_cast<std::size_t>(i)];
        for (const EngineEvent& event : events) {
          if (event.token >= 0) answer.tokens.push_back(event.token);
          if (event.finish == FinishReason::none) continue;
          answer.failed = event.finish == FinishReason::error || event.finish == FinishReason::abort;
          ++answer.num_ends;
          ++num_ended;
          news.notify_all();
        }
      };
      try {
        engine.submit(std::move(request));
      } catch (const Error&) {  // the loop has failed too often, and the engine takes no more
        const std::lock_guard lock(mutex);
        answers[static_cast<std::size_t>(i)] = {{}, 1, true};
        ++num_ended;
      }
    }
    std::unique_lock lock(mutex);
    EXPECT_TRUE(news.wait_for(lock, std::chrono::seconds(20), [&] { return num_ended >= 3; })) << k;
    lock.unlock();
    shortage.disarm();
    EXPECT_TRUE(engine.shutdown(false, std::chrono::seconds(20))) << k;
  }
  return answers;
}

class ShortOfMemoryAt : public ::testing::TestWithParam<long> {};
INSTANTIATE_TEST_SUITE_P(Times, ShortOfMemoryAt, ::testing::Values(1, 2));

TEST_P(ShortOfMemoryAt, EveryRequestOfAnEngineEndsOnce) {
  if (!test::kReplacesNew) GTEST_SKIP() << "a sanitizer brings an operator new of its own";
  LoadOptions options;
  options.num_threads = 1;  // the loop computes by itself
  const auto model = Model::random(test::tiny_config(), 21, options);
  const std::vector<Answer> expected = run(model, 1L << 40, 1);
  for (const Answer& answer : expected) EXPECT_EQ(answer.tokens.size(), 5u);
  int num_failed = 0;
  for (long k = 0; k < 100'000; ++k) {
    const std::vector<Answer> found = run(model, k, GetParam());
    if (!shortage.fired()) {
      EXPECT_GT(k, 300);
      break;
    }
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(found[i].num_ends, 1) << "allocation " << k << ", request " << i;
      num_failed += found[i].failed;
      ASSERT_LE(found[i].tokens.size(), 5u);
      EXPECT_TRUE(std::equal(found[i].tokens.begin(), found[i].tokens.end(), expected[i].tokens.begin())) << k;
      if (!found[i].failed) {
        EXPECT_EQ(found[i].tokens, expected[i].tokens) << k;
      }
    }
    if (HasFailure()) break;
  }
  EXPECT_GT(num_failed, 0);
}

// Where there is no memory for the ends of requests either, they come when there is some again; if that takes long, the
// engine has ended.
TEST(ShortOfMemory, ForLongEndsAnEngine) {
  if (!test::kReplacesNew) GTEST_SKIP() << "a sanitizer brings an operator new of its own";
  LoadOptions options;
  options.num_threads = 1;
  const auto model = Model::random(test::tiny_config(), 21, options);
  for (long k = 0; k < 700; k += 23) {
    Engine engine(model, {});
    shortage.arm(k, 1L << 40);
    EngineRequest request;
    request.request = {random_tokens(70, 1), greedy(40)};
    try {
      engine.submit(std::move(request));
    } catch (const Error&) {  // the loop has failed too often
    }
    for (int i = 0; i < 20 && !shortage.fired(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    shortage.disarm();
    EXPECT_TRUE(engine.shutdown(false, std::chrono::seconds(20))) << k;
  }
}

}  // namespace
}  // namespace based
