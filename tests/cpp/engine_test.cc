#include "based/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "based/error.h"
#include "based/session.h"
#include "faulty_backend.h"
#include "session/step_budget.h"
#include "tiny_model.h"

namespace based {
namespace {

using namespace std::chrono_literals;
using test::Faults;
using test::FaultyBackend;
using test::floats;
using test::greedy;
using test::random_tokens;
using test::tiny_config;
using test::unlimited_config;

using Clock = EngineEvent::Clock;
using Tokens = std::vector<std::int32_t>;
using Key = std::pair<std::uint64_t, int>;  // request, sample

/// Keeps events, and waits for them.
class Reader {
 public:
  EngineRequest::Sink sink() {
    return [this](std::span<const EngineEvent> events) {
      const std::lock_guard lock(mutex_);
      for (const EngineEvent& event : events) events_[{event.request, event.sample}].push_back(event);
      changed_.notify_all();
    };
  }
  EngineRequest request(Tokens prompt, const SamplingParams& params) {
    EngineRequest request;
    request.request = {std::move(prompt), params};
    request.sink = sink();
    return request;
  }
  /// Waits for the end of a sample; false after a long time.
  bool wait(std::uint64_t id, int sample = 0) {
    return wait_until([&] { return has_ended({id, sample}); });
  }
  bool wait_tokens(std::uint64_t id, std::size_t count, int sample = 0) {
    return wait_until([&] { return events_[{id, sample}].size() >= count || has_ended({id, sample}); });
  }
  std::vector<EngineEvent> events(std::uint64_t id, int sample = 0) {
    const std::lock_guard lock(mutex_);
    return events_[{id, sample}];
  }
  Tokens tokens(std::uint64_t id, int sample = 0) {
    Tokens tokens;
    for (const EngineEvent& event : events(id, sample))
      if (event.token >= 0) tokens.push_back(event.token);
    return tokens;
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    events_.clear();
  }

 private:
  template <typename F>
  bool wait_until(F&& f) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, 60s, f);
  }
  bool has_ended(const Key& key) {
    const auto& events = events_[key];
    return !events.empty() && events.back().finish != FinishReason::none;
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Key, std::vector<EngineEvent>> events_;
};

EngineOptions slots(int count, bool elastic = false) {
  EngineOptions options;
  options.max_batch_size = count;
  options.elastic = elastic;
  return options;
}

SamplingParams sampled(int n, std::int64_t max_tokens, std::uint64_t seed) {
  SamplingParams params;
  params.n = n;
  params.max_tokens = max_tokens;
  params.seed = seed;
  params.ignore_eos = true;
  return params;
}

std::map<int, Tokens> alone(const std::shared_ptr<const Model>& model, const GenerationRequest& request) {
  Generator generator(model, {request}, 1);
  std::map<int, Tokens> out;
  while (!generator.done())
    for (const TokenEvent& event : generator.next()) out[event.sample].push_back(event.token);
  return out;
}

class EngineTest : public ::testing::Test {
 protected:
  std::shared_ptr<const Model> model_ = Model::random(tiny_config(), 21);
  Reader reader_;
};

// Prompts of all lengths, samples, penalties: from many threads, in batches of all sizes, with the smallest steps.
TEST_F(EngineTest, RequestsOfAnyThreadGetWhatTheyGetAlone) {
  std::vector<GenerationRequest> requests;
  for (int i = 0; i < 12; ++i) {
    SamplingParams params = i % 2 == 0 ? greedy(1 + 3 * i) : sampled(1 + i % 3, 5 + i, static_cast<std::uint64_t>(i));
    if (i % 4 == 1) params.presence_penalty = 1.5;
    if (i % 4 == 3) params.repetition_penalty = 1.5;
    requests.push_back({random_tokens(static_cast<std::size_t>(1 + 31 * i), static_cast<std::uint32_t>(i)), params});
  }
  const auto faults = std::make_shared<Faults>();
  RandomWeights weights(31);
  const std::shared_ptr<const Model> model = Model::Impl::make(
      tiny_config(), std::make_unique<FaultyBackend>(backend::make_backend({}, 2), faults), weights, DType::float32);
  std::vector<std::map<int, Tokens>> expected;
  for (const auto& request : requests) expected.push_back(alone(model, request));
  for (const auto& [batch, elastic, budget, asynchronous] :
       {std::tuple(1, false, 0, false), std::tuple(3, false, 64, false), std::tuple(32, true, 0, false),
        std::tuple(5, true, 64, false), std::tuple(1, false, 0, true), std::tuple(3, false, 64, true),
        std::tuple(32, true, 0, true)}) {
    SCOPED_TRACE(std::to_string(batch) + " slots" + (asynchronous ? ", a step ahead" : ""));
    faults->asynchronous = asynchronous;
    EngineOptions options = slots(batch, elastic);
    options.max_step_tokens = budget;
    Engine engine(model, options);
    std::vector<Engine::Id> ids(requests.size());
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < requests.size(); ++i)
      threads.emplace_back([&, i] {
        EngineRequest request;
        request.request = requests[i];
        request.sink = reader_.sink();
        request.every_token = i % 3 != 0;
        ids[i] = engine.submit(std::move(request));
      });
    for (auto& thread : threads) thread.join();
    for (std::size_t i = 0; i < requests.size(); ++i)
      for (int s = 0; s < requests[i].params.n; ++s) {
        ASSERT_TRUE(reader_.wait(ids[i], s));
        EXPECT_EQ(reader_.tokens(ids[i], s), expected[i][s]) << i << " " << s;
      }
    EXPECT_TRUE(engine.shutdown(true, 60s));
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.running, 0);
    EXPECT_EQ(stats.waiting_requests, 0);
    EXPECT_EQ(stats.waiting_tokens, 0);
    EXPECT_GT(stats.generated_tokens, 0);
    reader_.clear();
  }
}

// A context shorter than what a step may take.
TEST_F(EngineTest, RunsInTheShortestContext) {
  LoadOptions options;
  options.max_context = 9;
  Engine engine(Model::random(tiny_config(), 21, options), slots(2));
  const auto id = engine.submit(reader_.request(random_tokens(5, 1), greedy(4)));
  ASSERT_TRUE(reader_.wait(id));
  EXPECT_EQ(reader_.tokens(id).size(), 4u);
}

TEST_F(EngineTest, AnElasticEngineHoldsNothingWhenNothingRuns) {
  const MemoryUse before = model_->memory();
  Engine engine(model_, slots(16, true));
  EXPECT_EQ(engine.stats().slots, 0);
  std::vector<Engine::Id> ids;
  for (int i = 0; i < 9; ++i)
    ids.push_back(engine.submit(reader_.request(random_tokens(5, static_cast<std::uint32_t>(i)), greedy(40))));
  for (int i = 0; i < 9; ++i) {
    ASSERT_TRUE(reader_.wait(ids[static_cast<std::size_t>(i)]));
    EXPECT_EQ(reader_.tokens(ids[static_cast<std::size_t>(i)]),
              alone(model_, {random_tokens(5, static_cast<std::uint32_t>(i)), greedy(40)})[0]);
  }
  EXPECT_EQ(engine.stats().slots, 0);
  EXPECT_EQ(model_->memory().states, before.states);
  EXPECT_EQ(model_->memory().workspace, before.workspace);
}

TEST_F(EngineTest, AShortPromptDoesNotWaitForALongOne) {
  const auto model = Model::random(unlimited_config(), 21);
  Engine engine(model, slots(4));
  const auto is_long = engine.submit(reader_.request(random_tokens(20'000, 1), greedy(1)));
  std::this_thread::sleep_for(20ms);
  const auto is_short = engine.submit(reader_.request(random_tokens(5, 2), greedy(3)));
  ASSERT_TRUE(reader_.wait(is_short));
  EXPECT_TRUE(reader_.events(is_long).empty());
  EXPECT_EQ(reader_.tokens(is_short), alone(model, {random_tokens(5, 2), greedy(3)})[0]);
  engine.cancel(is_long);
  ASSERT_TRUE(reader_.wait(is_long));
  EXPECT_EQ(reader_.events(is_long).back().finish, FinishReason::abort);
  EXPECT_EQ(reader_.events(is_long).back().error, "cancelled");
}

TEST_F(EngineTest, PriorityComesBeforeWaitAndWaitBeforeLength) {
  Engine engine(model_, slots(1));
  const auto first = engine.submit(reader_.request(random_tokens(4, 1), greedy(400)));
  ASSERT_TRUE(reader_.wait_tokens(first, 1));
  std::vector<Engine::Id> ids;
  for (const auto& [length, priority] : {std::pair(300, 0), std::pair(3, 0), std::pair(900, -1), std::pair(2, 5)}) {
    auto request = reader_.request(random_tokens(static_cast<std::size_t>(length), 3), greedy(1));
    request.priority = priority;
    ids.push_back(engine.submit(std::move(request)));
  }
  std::vector<Clock::time_point> scheduled;
  for (const auto id : ids) {
    ASSERT_TRUE(reader_.wait(id));
    scheduled.push_back(reader_.events(id).back().scheduled);
  }
  EXPECT_LT(scheduled[2], scheduled[1]);  // the smallest priority
  EXPECT_LT(scheduled[1], scheduled[0]);  // few tokens
  EXPECT_LT(scheduled[0], scheduled[3]);
}

TEST_F(EngineTest, RefusesWhatItHasNoRoomForAndWhatIsWrong) {
  EngineOptions options = slots(1);
  options.max_waiting_requests = 2;
  options.max_waiting_tokens = 100;
  Engine engine(model_, options);
  const auto running = engine.submit(reader_.request(random_tokens(4, 1), greedy(SamplingParams::kNoLimit)));
  ASSERT_TRUE(reader_.wait_tokens(running, 1));
  engine.pause(running, true);  // so that it keeps its slot, however fast the machine is
  const auto is_long = engine.submit(reader_.request(random_tokens(200, 1), greedy(1)));  // a single one may be long
  EXPECT_THROW(engine.submit(reader_.request(random_tokens(4, 1), greedy(1))), EngineBusyError);
  engine.cancel(is_long);
  ASSERT_TRUE(reader_.wait(is_long));
  engine.submit(reader_.request(random_tokens(4, 1), greedy(1)));
  EXPECT_THROW(engine.submit(reader_.request(random_tokens(97, 1), greedy(1))), EngineBusyError);
  engine.submit(reader_.request(random_tokens(90, 1), greedy(1)));
  EXPECT_THROW(engine.submit(reader_.request(random_tokens(1, 1), greedy(1))), EngineBusyError);
  EXPECT_EQ(engine.stats().waiting_requests, 2);
  EXPECT_EQ(engine.stats().waiting_tokens, 94);

  // What free slots are about to take does not wait: one more than they hold does.
  Engine roomy(model_, [&] {
    EngineOptions with_room = slots(4);
    with_room.max_waiting_requests = with_room.max_waiting_tokens = 1;
    return with_room;
  }());
  for (int round = 0; round < 50; ++round) {
    std::vector<std::uint64_t> ids;
    for (int i = 0; i < 2; ++i)
      ids.push_back(roomy.submit(reader_.request(random_tokens(8, 1), sampled(2, SamplingParams::kNoLimit, 1))));
    ids.push_back(roomy.submit(reader_.request(random_tokens(8, 1), greedy(1))));
    EXPECT_THROW(roomy.submit(reader_.request(random_tokens(8, 1), greedy(1))), EngineBusyError);
    for (const auto id : ids) roomy.cancel(id);
    for (const auto id : ids) ASSERT_TRUE(reader_.wait(id));
  }

  EXPECT_THROW(engine.submit(reader_.request({}, greedy(1))), InvalidArgument);
  EXPECT_THROW(engine.submit(reader_.request({61}, greedy(1))), InvalidArgument);
  EXPECT_THROW(engine.submit(reader_.request({1}, greedy(0))), InvalidArgument);
  EXPECT_THROW(engine.submit(reader_.request(random_tokens(5000, 1), greedy(1))), InvalidArgument);  // max_context
  auto other = reader_.request({1}, greedy(1));
  Session session(Model::random(tiny_config(), 21), 1);
  other.state = session.snapshot(0);
  EXPECT_THROW(engine.submit(other), StateError);
  EXPECT_THROW(engine.cancel(1000), InvalidArgument);
  EXPECT_THROW(Engine(model_, slots(0)), InvalidArgument);
  engine.shutdown(false);
  EXPECT_THROW(engine.submit(reader_.request({1}, greedy(1))), EngineClosedError);
  ASSERT_TRUE(reader_.wait(running));
  EXPECT_EQ(reader_.events(running).back().finish, FinishReason::abort);
  EXPECT_EQ(reader_.events(running).back().error, "the engine was shut down");
}

TEST_F(EngineTest, ADeadlineEndsWhatWaitsAndWhatRuns) {
  Engine engine(model_, slots(1));
  auto request = reader_.request(random_tokens(4, 1), greedy(SamplingParams::kNoLimit));
  request.deadline = Clock::now() + 100ms;
  const auto running = engine.submit(request);
  request.deadline = Clock::now() + 30ms;
  const auto waiting = engine.submit(request);
  ASSERT_TRUE(reader_.wait(waiting));
  ASSERT_TRUE(reader_.wait(running));
  for (const auto id : {running, waiting}) {
    EXPECT_EQ(reader_.events(id).back().finish, FinishReason::abort);
    EXPECT_EQ(reader_.events(id).back().error, "its deadline has passed");
  }
  EXPECT_TRUE(reader_.tokens(waiting).empty());
}

TEST_F(EngineTest, SamplesThatAreFinishedMakeRoom) {
  Engine engine(model_, slots(2));
  const auto first = engine.submit(reader_.request(random_tokens(4, 1), sampled(2, SamplingParams::kNoLimit, 1)));
  ASSERT_TRUE(reader_.wait_tokens(first, 3, 0));
  const auto second = engine.submit(reader_.request(random_tokens(4, 2), greedy(3)));
  engine.finish(first, 0, 2);
  ASSERT_TRUE(reader_.wait(second));
  engine.finish(first, 1, 1);
  engine.finish(first, 1, 1);
  EXPECT_TRUE(engine.shutdown(true, 60s));
}

TEST_F(EngineTest, APausedRequestTakesNoStep) {
  Engine engine(model_, slots(2));
  const auto id = engine.submit(reader_.request(random_tokens(4, 1), greedy(300)));
  ASSERT_TRUE(reader_.wait_tokens(id, 3));
  engine.pause(id, true);
  const auto other = engine.submit(reader_.request(random_tokens(4, 2), greedy(20)));
  ASSERT_TRUE(reader_.wait(other));
  const std::size_t count = reader_.events(id).size();
  const auto third = engine.submit(reader_.request(random_tokens(4, 2), greedy(20)));
  ASSERT_TRUE(reader_.wait(third));
  EXPECT_EQ(reader_.events(id).size(), count);
  EXPECT_LT(count, 300u);
  engine.pause(id, false);
  ASSERT_TRUE(reader_.wait(id));
  EXPECT_EQ(reader_.tokens(id), alone(model_, {random_tokens(4, 1), greedy(300)})[0]);
}

// ---- states --------------------------------------------------------------------------------------------------------

// A state after a request is that of a session which was fed the prompt and all tokens returned.
TEST_F(EngineTest, StatesGoOn) {
  const Tokens prompt = random_tokens(70, 1);
  const auto whole = alone(model_, {prompt, greedy(20)})[0];
  Engine engine(model_, slots(3));
  for (const bool every_token : {true, false}) {
    auto request = reader_.request(prompt, greedy(8));
    request.keep_state = true;
    request.every_token = every_token;
    const auto id = engine.submit(request);
    ASSERT_TRUE(reader_.wait(id));
    const auto state = reader_.events(id).back().state;
    ASSERT_NE(state, nullptr);
    EXPECT_EQ(reader_.events(id).back().finish, FinishReason::length);
    EXPECT_EQ(state->num_tokens(), 78);
    auto next = reader_.request({}, greedy(12));
    next.state = state;
    const auto second = engine.submit(next);
    ASSERT_TRUE(reader_.wait(second));
    Tokens found = reader_.tokens(id);
    const Tokens more = reader_.tokens(second);
    found.insert(found.end(), more.begin(), more.end());
    EXPECT_EQ(found, whole);
    // With another prompt, as a session does.
    next.request.prompt = random_tokens(9, 4);
    const auto third = engine.submit(next);
    ASSERT_TRUE(reader_.wait(third));
    Session session(model_, {{state}});
    Generator generator(session, {{random_tokens(9, 4), greedy(12)}});
    Tokens expected;
    while (!generator.done())
      for (const TokenEvent& event : generator.next()) expected.push_back(event.token);
    EXPECT_EQ(reader_.tokens(third), expected);
  }
}

// Its reader stops a sample after fewer tokens than were made: the state has seen as many.
TEST_F(EngineTest, AStateHasSeenWhatItsReaderTook) {
  const Tokens prompt = random_tokens(70, 1);
  Engine engine(model_, slots(3));
  for (const std::int64_t max_tokens : {std::int64_t{9}, SamplingParams::kNoLimit}) {
    for (const std::int64_t num_read : {0, 1, 5, 9}) {
      auto request = reader_.request(prompt, greedy(max_tokens));
      request.keep_state = request.reader_ends = true;
      const auto id = engine.submit(request);
      ASSERT_TRUE(reader_.wait_tokens(id, 9));
      engine.finish(id, 0, num_read);
      engine.finish(id, 0, 3);  // too late
      for (int i = 0; i < 2000 && reader_.events(id).back().state == nullptr; ++i) std::this_thread::sleep_for(5ms);
      const auto state = reader_.events(id).back().state;
      ASSERT_NE(state, nullptr);
      ASSERT_EQ(state->num_tokens(), 70 + num_read);
      Session session(model_, {{state}}), replay(model_, 1);
      replay.prefill({&prompt, 1});
      const Tokens tokens = reader_.tokens(id);
      for (std::int64_t i = 0; i < num_read; ++i) replay.step({&tokens[static_cast<std::size_t>(i)], 1});
      const std::int32_t probe = 5;
      const auto found = floats(session.step({&probe, 1})), expected = floats(replay.step({&probe, 1}));
      for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-4);
    }
  }
}

// ---- cached states -------------------------------------------------------------------------------------------------

EngineOptions caching(int count) {
  EngineOptions options = slots(count);
  options.cache.device_nbytes = std::size_t{1} << 30;
  return options;
}

Tokens joined(std::initializer_list<Tokens> parts) {
  Tokens all;
  for (const Tokens& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Requests that begin alike and come together: the first one reads what they share, and the others wait for its state.
TEST_F(EngineTest, ASharedPrefixIsReadOnce) {
  for (const int shared : {640, 600}) {
    Reader reader;
    Engine engine(model_, caching(16));
    const Tokens prefix = random_tokens(static_cast<std::size_t>(shared), 1);
    std::vector<Engine::Id> ids;
    std::vector<Tokens> prompts;
    for (std::uint32_t i = 0; i < 8; ++i) {
      prompts.push_back(joined({prefix, {static_cast<std::int32_t>(i)}, random_tokens(100 + i, 2 + i)}));
      ids.push_back(engine.submit(reader.request(prompts.back(), greedy(6))));
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ASSERT_TRUE(reader.wait(ids[i]));
      EXPECT_EQ(reader.tokens(ids[i]), alone(model_, {prompts[i], greedy(6)})[0]);
    }
    EXPECT_TRUE(engine.shutdown(true, 60s));
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.cached_tokens, 7 * (shared / 64 * 64));
    EXPECT_EQ(stats.cache.hit_tokens, stats.cached_tokens);
    EXPECT_EQ(stats.step_tokens, stats.prompt_tokens - stats.cached_tokens + 8 * 5);
  }
}

// A hit gives what no hit gives, whatever is in the cache: the same prompts again, their beginnings, and longer ones.
TEST_F(EngineTest, AHitGivesTheSameTokens) {
  ModelConfig with_prefix = tiny_config();
  for (MixerConfig& layer : with_prefix.layers)
    if (auto* mixer = std::get_if<PrefixLinearAttentionConfig>(&layer)) mixer->enc_length = 100;
  for (const auto& model : {model_, Model::random(with_prefix, 5)}) {
    Reader reader;
    EngineOptions options = caching(3);
    options.cache.interval = 64;
    Engine engine(model, options);
    const Tokens text = random_tokens(900, 1);
    std::int64_t hits = 0;
    for (const std::size_t length : {900, 30, 300, 300, 900, 65, 64, 550, 899, 120, 640}) {
      for (const bool changed : {false, true}) {
        Tokens prompt(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(length));
        if (changed) prompt[length * 3 / 4] = (prompt[length * 3 / 4] + 1) % 61;
        const SamplingParams params = sampled(2, 5, length);
        const auto id = engine.submit(reader.request(prompt, params));
        auto expected = alone(model, {prompt, params});
        for (const int s : {0, 1}) {
          ASSERT_TRUE(reader.wait(id, s));
          EXPECT_EQ(reader.tokens(id, s), expected[s]) << length;
        }
        hits += reader.events(id).back().num_cached_tokens;
      }
    }
    EXPECT_GT(hits, 4000);
    EXPECT_EQ(engine.stats().cached_tokens, hits);
  }
}

// A device whose bits depend on where a prompt is cut has all prompts cut alike: whatever the budget, and behind a hit.
TEST(EngineCuts, AreAllOfThoseThatADeviceAsksFor) {
  const auto faults = std::make_shared<Faults>();
  faults->piece = 128;
  RandomWeights weights(31);
  const std::shared_ptr<const Model> model = Model::Impl::make(
      tiny_config(), std::make_unique<FaultyBackend>(backend::make_backend({}, 1), faults), weights, DType::float32);
  const Tokens text = random_tokens(1000, 1);
  for (const bool asynchronous : {false, true}) {
    faults->asynchronous = asynchronous;
    for (const std::int64_t budget : {0, 64, 300, 5000}) {
      Reader reader;
      EngineOptions options = caching(3);
      options.cache.interval = 64;
      options.max_step_tokens = budget;
      Engine engine(model, options);
      std::int64_t hits = 0;
      for (const std::size_t length : {129, 1000, 513, 1000, 900, 257}) {
        const Tokens prompt(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(length));
        faults->pieces.clear();
        const auto id = engine.submit(reader.request(prompt, greedy(3)));
        ASSERT_TRUE(reader.wait(id));
        const std::int64_t found = reader.events(id).back().num_cached_tokens;
        hits += found;
        EXPECT_EQ(found % 128, 0) << length;
        std::int64_t at = found;
        for (const auto& [position, count] : faults->pieces) {
          EXPECT_EQ(position, at) << length;
          EXPECT_EQ(count, std::min<std::int64_t>(128, static_cast<std::int64_t>(length) - at)) << length;
          at += count;
        }
        EXPECT_GE(at, static_cast<std::int64_t>(length) - 1);  // the last one may be alone
      }
      EXPECT_GT(hits, 2000);
    }
  }
  // So are those of a session.
  Session session(model, 1);
  faults->pieces.clear();
  session.prefill(std::vector<Tokens>{text});
  ASSERT_EQ(faults->pieces.size(), 8u);
  for (std::size_t i = 0; i < 7; ++i) EXPECT_EQ(faults->pieces[i].second, 128);
}

// A reader that ends a sample has to be given its tokens.
TEST_F(EngineTest, AReaderThatEndsNeedsEveryToken) {
  Reader reader;
  Engine engine(model_, {});
  EngineRequest request = reader.request(random_tokens(70, 1), greedy(6));
  request.keep_state = request.reader_ends = true;
  request.every_token = false;
  EXPECT_THROW(engine.submit(request), InvalidArgument);
  // One whose reader does not say that it will: the state cannot be taken back to where it ended.
  request.reader_ends = false;
  request.request.params.max_tokens = 2000;
  const auto id = engine.submit(request);
  while (engine.stats().generated_tokens < 5) std::this_thread::yield();
  engine.finish(id, 0, 3);
  ASSERT_TRUE(reader.wait(id));
  EXPECT_EQ(reader.events(id).back().state, nullptr);
  EXPECT_NE(reader.events(id).back().error.find("does not give every token"), std::string::npos);
}

// Without room for more than a state, requests run as without a cache.
TEST_F(EngineTest, RunningDoesNotNeedTheCache) {
  Reader reader;
  EngineOptions options = caching(4);
  options.cache.device_nbytes = model_->state_nbytes(256) + 4096;
  Engine engine(model_, options);
  const Tokens prompt = random_tokens(700, 1);
  std::vector<Engine::Id> ids;
  for (int i = 0; i < 8; ++i) ids.push_back(engine.submit(reader.request(prompt, greedy(5))));
  for (const auto id : ids) {
    ASSERT_TRUE(reader.wait(id));
    EXPECT_EQ(reader.tokens(id), alone(model_, {prompt, greedy(5)})[0]);
  }
  const StateCacheStats stats = engine.stats().cache;
  EXPECT_GT(stats.num_not_stored + stats.device.num_evicted, 0);
}

// ---- failures ------------------------------------------------------------------------------------------------------

// Every operation fails once: who is concerned ends with an error, who is not gets its tokens, and the engine goes on.
TEST(EngineFailures, EndTheRequestsConcerned) {
  const auto faults = std::make_shared<Faults>();
  RandomWeights weights(31);
  const std::shared_ptr<const Model> model = Model::Impl::make(
      tiny_config(), std::make_unique<FaultyBackend>(backend::make_backend({}, 1), faults), weights, DType::float32);
  const GenerationRequest good{random_tokens(70, 1), greedy(4)};
  const auto expected = alone(model, good)[0];
  for (const bool sticky : {false, true}) {
    for (int k = 0; k < 400; k += 1 + k / 16) {
      SCOPED_TRACE("fault at operation " + std::to_string(k) + (sticky ? " and later" : ""));
      Reader reader;
      EngineOptions options = slots(4, true);
      if (k % 2 == 1) options.cache.device_nbytes = std::size_t{1} << 26;
      options.cache.interval = 64;
      Engine engine(model, options);
      const auto first = engine.submit(reader.request(random_tokens(5, 2), sampled(2, 200, 1)));
      ASSERT_TRUE(reader.wait_tokens(first, 1));
      faults->arm(k, sticky);
      const auto second = engine.submit(reader.request(good.prompt, good.params));
      ASSERT_TRUE(reader.wait(second));
      faults->disarm();
      const auto last = reader.events(second).back();
      if (last.finish == FinishReason::error)
        EXPECT_NE(last.error.find("planted fault"), std::string::npos) << last.error;
      else
        EXPECT_EQ(reader.tokens(second), expected);
      engine.cancel(first);
      for (const int s : {0, 1}) ASSERT_TRUE(reader.wait(first, s));
      const auto third = engine.submit(reader.request(good.prompt, good.params));
      ASSERT_TRUE(reader.wait(third));
      EXPECT_EQ(reader.tokens(third), expected);
      EXPECT_TRUE(engine.shutdown(true, 60s));
      if (::testing::Test::HasFailure()) return;
    }
  }
}

// Where there is memory for few sequences, the others wait: at the start, and beside those that run.
TEST(EngineFailures, AsManyRunAsThereIsMemoryFor) {
  const auto faults = std::make_shared<Faults>();
  RandomWeights weights(31);
  const std::shared_ptr<const Model> model = Model::Impl::make(
      tiny_config(), std::make_unique<FaultyBackend>(backend::make_backend({}, 1), faults), weights, DType::float32);
  const GenerationRequest request{random_tokens(70, 1), greedy(4)};
  const auto expected = alone(model, request)[0];
  for (const int max_states : {1, 2, 3, 5}) {
    SCOPED_TRACE("memory for " + std::to_string(max_states));
    faults->max_states = max_states;
    Reader reader;
    Engine engine(model, slots(16, true));
    for (const bool is_busy : {false, true}) {
      std::atomic<bool> is_open = false;
      EngineRequest gate = reader.request(random_tokens(5, 2), sampled(1, is_busy ? 400 : 1, 1));
      gate.sink = [&, sink = gate.sink](std::span<const EngineEvent> events) {
        is_open.wait(false);  // the engine's thread: what is submitted meanwhile arrives together
        sink(events);
      };
      const auto first = engine.submit(std::move(gate));
      std::vector<std::uint64_t> ids;
      for (int i = 0; i < 12; ++i) ids.push_back(engine.submit(reader.request(request.prompt, request.params)));
      is_open = true;
      is_open.notify_all();
      for (const auto id : ids) {
        ASSERT_TRUE(reader.wait(id));
        EXPECT_EQ(reader.tokens(id), expected) << reader.events(id).back().error;
      }
      ASSERT_TRUE(reader.wait(first));
    }
    // Samples of one request run together: two are one more than a memory for one holds.
    const auto both = engine.submit(reader.request(request.prompt, sampled(2, 4, 1)));
    for (const int s : {0, 1}) {
      ASSERT_TRUE(reader.wait(both, s));
      EXPECT_EQ(reader.events(both, s).back().finish, max_states < 2 ? FinishReason::error : FinishReason::length);
    }
  }
}

// Where there is memory for a step of some and not of all, they take turns, and none fails.
TEST(EngineFailures, AStepOfAsManyAsThereIsMemoryFor) {
  const GenerationRequest request{random_tokens(60, 1), greedy(5)};
  for (const bool asynchronous : {false, true}) {
    int num_apart = 0;  // limits that a step of eight meets, and a step of one does not
    for (std::size_t limit = std::size_t{1} << 20; limit > 1024; limit -= limit / 3) {
      SCOPED_TRACE(std::to_string(limit) + " bytes" + (asynchronous ? ", a step ahead" : ""));
      const auto run = [&](int count, const Tokens* expected) {
        const auto faults = std::make_shared<Faults>();
        faults->asynchronous = asynchronous;
        RandomWeights weights(31);
        const std::shared_ptr<const Model> model =
            Model::Impl::make(tiny_config(), std::make_unique<FaultyBackend>(backend::make_backend({}, 1), faults),
                              weights, DType::float32);
        Reader reader;
        Engine engine(model, slots(8));
        faults->max_workspace = limit;
        std::vector<Engine::Id> ids;
        for (int i = 0; i < count; ++i) ids.push_back(engine.submit(reader.request(request.prompt, request.params)));
        Tokens tokens;
        for (const auto id : ids) {
          EXPECT_TRUE(reader.wait(id));
          tokens = reader.tokens(id);
          const std::vector<EngineEvent> events = reader.events(id);
          if (expected != nullptr) {
            EXPECT_EQ(tokens, *expected) << (events.empty() ? "" : events.back().error);
          }
        }
        EXPECT_TRUE(engine.shutdown(true, 60s));
        num_apart += count > 1 && faults->num_refused > 0;
        return tokens;
      };
      const Tokens expected = run(1, nullptr);
      if (expected.size() < 5) break;  // too little for one
      run(8, &expected);
      if (::testing::Test::HasFailure()) return;
    }
    EXPECT_GT(num_apart, 0);
  }
}

// ---- steps' lengths ------------------------------------------------------------------------------------------------

// A device that takes `fixed` seconds for a step, so many for a sample and for a token of a prompt.
struct Timing {
  double fixed, row, token;
  double step(std::int64_t rows, std::int64_t prompt) const {
    return fixed + row * static_cast<double>(rows) + token * static_cast<double>(prompt);
  }
};

constexpr Timing kTiming{1.2e-3, 7.5e-6, 5e-6};
constexpr double kRowCost = 7.5e-6 / 1.2e-3;

TEST(StepBudget, FewSamplesWaitForShortSteps) {
  StepBudget budget(64, 8192, 0, kRowCost);
  EXPECT_FALSE(budget.knows_plain());
  budget.measured(1, 0, 0, 0.2);  // recorded: not its length
  for (int i = 0; i < 3; ++i) budget.measured(1, 0, 0, kTiming.step(1, 0));
  EXPECT_TRUE(budget.knows_plain());
  const auto read = [&](int times) {
    for (int i = 0; i < times; ++i) {
      const std::int64_t tokens = budget.tokens(1, 1);
      budget.measured(1, tokens, tokens, kTiming.step(1, tokens));
    }
  };
  read(10);
  EXPECT_LE(kTiming.step(1, budget.tokens(1, 1)), 4.1e-3);
  EXPECT_GE(kTiming.step(1, budget.tokens(1, 1)), 3.5e-3);
  // A step that takes a hundred times as long, or none at all, does not stay in the way.
  const std::int64_t tokens = budget.tokens(1, 1);
  budget.measured(1, tokens, tokens, 100 * kTiming.step(1, tokens));
  EXPECT_GE(budget.tokens(1, 1), tokens / 2);
  for (const double seconds : {1e-6, 1.0}) budget.measured(1, 0, 0, seconds);
  read(10);
  for (int i = 0; i < 3; ++i) budget.measured(1, 0, 0, kTiming.step(1, 0));
  EXPECT_LE(kTiming.step(1, budget.tokens(1, 1)), 4.3e-3);
  EXPECT_GE(kTiming.step(1, budget.tokens(1, 1)), 3.5e-3);
}

// Prompts that come all at once are read in steps that are short for the samples that they will be, not for those that
// run already.
TEST(StepBudget, ManyPromptsAtOnceAreReadInLongSteps) {
  StepBudget budget(64, 8192, 0, kRowCost);
  for (int i = 0; i < 3; ++i) budget.measured(1, 0, 0, kTiming.step(1, 0));
  std::int64_t prompt = 256 * 1024;
  double seconds = 0;
  std::int64_t late = 0, in_time = 0;  // gaps between tokens
  while (prompt > 0) {
    const std::int64_t rows = 256 - (prompt + 1023) / 1024;
    const std::int64_t tokens = std::min(budget.tokens(rows, 256), prompt);
    const double step = kTiming.step(rows, tokens);
    budget.measured(rows, tokens, tokens, step);
    prompt -= tokens;
    seconds += step;
    (step <= 3 * kTiming.step(256, 0) ? in_time : late) += rows;
  }
  EXPECT_LE(late, 256 * 256 / 100);  // of those of 256 tokens each
  EXPECT_GT(in_time, 10 * late);
  EXPECT_LE(seconds, 1.4 * kTiming.token * 256 * 1024);
  // The same with few that wait: those who run have waited long enough.
  EXPECT_LE(kTiming.step(1, budget.tokens(1, 1)), 4.1e-3);
  // Prompts that are shorter than what a step may take are measured, too.
  const Timing slower{kTiming.fixed, kTiming.row, 4 * kTiming.token};
  for (int i = 0; i < 30; ++i) budget.measured(200, 700, budget.tokens(200, 256), slower.step(200, 700));
  EXPECT_LE(slower.step(200, budget.tokens(200, 256)), 3 * slower.step(256, 0));
}

TEST(StepBudget, KeepsItsBounds) {
  StepBudget fixed(64, 8192, 100, kRowCost);
  fixed.measured(1, 100, 100, 1);
  EXPECT_EQ(fixed.tokens(1, 1), 100);
  StepBudget budget(64, 8192, 0, kRowCost);
  for (int i = 0; i < 50; ++i) budget.measured(1, budget.tokens(1, 1), budget.tokens(1, 1), 0);
  EXPECT_EQ(budget.tokens(1, 1), 8192);
  for (int i = 0; i < 100; ++i) budget.measured(1, budget.tokens(1, 1), budget.tokens(1, 1), 10);
  EXPECT_EQ(budget.tokens(1, 1), 64);
}

// ---- shutting down -------------------------------------------------------------------------------------------------

TEST_F(EngineTest, DrainsOrAborts) {
  {
    Engine engine(model_, slots(1));
    const auto first = engine.submit(reader_.request(random_tokens(4, 1), greedy(50)));
    const auto second = engine.submit(reader_.request(random_tokens(4, 2), greedy(50)));
    EXPECT_TRUE(engine.shutdown(true));
    for (const auto id : {first, second}) EXPECT_EQ(reader_.tokens(id).size(), 50u);
    EXPECT_TRUE(engine.shutdown(true));
    EXPECT_TRUE(engine.shutdown(false));
    engine.cancel(first);  // has ended
  }
  reader_.clear();
  Engine engine(model_, slots(1));
  const auto endless = engine.submit(reader_.request(random_tokens(4, 1), greedy(SamplingParams::kNoLimit)));
  EXPECT_FALSE(engine.shutdown(true, 50ms));
  EXPECT_TRUE(engine.shutdown(false, 60s));
  EXPECT_EQ(reader_.events(endless).back().finish, FinishReason::abort);
}

// Every method from many threads at once, while requests come, run, end and are cancelled.
TEST_F(EngineTest, AnyThreadMayCallAnything) {
  Engine engine(model_, slots(3, true));
  std::vector<std::thread> threads;
  std::atomic<int> refused = 0;
  for (std::uint32_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (std::uint32_t i = 0; i < 25; ++i) {
        try {
          auto request =
              reader_.request(random_tokens(1 + 17 * i % 90, i), sampled(1 + static_cast<int>(i % 3), 20, i));
          request.keep_state = i % 5 == 0;
          request.priority = static_cast<int>(i % 2);
          const auto id = engine.submit(std::move(request));
          if (i % 3 == 1) engine.cancel(id);
          if (i % 3 == 2) engine.finish(id, 0, 1);
          engine.pause(id, true);
          engine.pause(id, false);
          engine.stats();
          if (t == 3 && i == 20) engine.shutdown(true, 1ms);
        } catch (const EngineClosedError&) {
          ++refused;
        }
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(engine.shutdown(true, 60s));
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace based
