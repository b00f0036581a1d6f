// The cache of states: what it finds, what it gives up, and its tiers.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "based/error.h"
#include "based/session.h"
#include "faulty_backend.h"
#include "model/model_impl.h"
#include "session/state_cache.h"
#include "session/state_impl.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::Faults;
using test::FaultyBackend;
using test::random_tokens;
using test::read_bytes;
using test::TemporaryFolder;
using test::write_bytes;

using Tokens = std::vector<std::int32_t>;
using SharedState = std::shared_ptr<const State>;

constexpr std::size_t kNoLimit = std::size_t{1} << 40;

Tokens first(const Tokens& tokens, std::int64_t count) { return {tokens.begin(), tokens.begin() + count}; }

Tokens joined(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// States of one size.
ModelConfig fixed_config() {
  ModelConfig config = test::gpu_config();
  config.layers.resize(3);
  return config;
}

// States that grow.
ModelConfig growing_config() {
  ModelConfig config = fixed_config();
  config.layers.push_back(test::kFullAttention);
  return config;
}

std::shared_ptr<const Model> make_model(const ModelConfig& config, std::uint64_t seed = 5) {
  LoadOptions options;
  options.num_threads = 1;
  return Model::random(config, seed, options);
}

// A model whose device says that its memory is not the host's.
std::shared_ptr<const Model> make_apart(const ModelConfig& config, const std::shared_ptr<Faults>& faults) {
  RandomWeights weights(5);
  faults->memory_apart = true;
  auto backend = std::make_unique<FaultyBackend>(backend::make_backend({}, 1), faults);
  return Model::Impl::make(config, std::move(backend), weights, DType::float32);
}

SharedState state_after(const std::shared_ptr<const Model>& model, const Tokens& tokens) {
  Session session(model, 1);
  session.prefill({{tokens}});
  return session.snapshot(0);
}

// The saved form of a state's layers, and its last hidden vector.
std::string layers_of(const State& state) {
  const State::Impl& impl = state.impl();
  const auto lease = state.model()->impl().executors.lease();
  std::string bytes = std::to_string(state.num_tokens());
  for (const auto& [name, tensor] : lease->backend().export_state(*impl.states, 0, state.num_tokens()))
    bytes.append(name).append(static_cast<const char*>(tensor.data()), tensor.nbytes());
  const backend::Buffer& last = impl.progress.last.rows;
  return bytes.append(static_cast<const char*>(last.data.get()), last.nbytes);
}

// With the counts of its tokens: all that a state is.
std::string bytes_of(const State& state) {
  std::string bytes = layers_of(state);
  for (const backend::SeenToken& seen : state.impl().progress.seen.entries())
    bytes += " " + std::to_string(seen.token) + (seen.in_prompt ? "p" : "o") + std::to_string(seen.num_outputs);
  return bytes;
}

void expect_equal(const SharedState& found, const SharedState& expected) {
  ASSERT_NE(found, nullptr);
  EXPECT_EQ(found->num_tokens(), expected->num_tokens());
  EXPECT_TRUE(bytes_of(*found) == bytes_of(*expected)) << "after " << expected->num_tokens() << " tokens";
}

void expect_within(const StateCacheStats& stats) {
  for (const StateCacheStats::Tier& tier : {stats.device, stats.host, stats.files}) {
    EXPECT_LE(tier.nbytes, tier.max_nbytes);
    EXPECT_GE(tier.num_states, 0);
  }
}

// ---- what is found -------------------------------------------------------------------------------------------------

// Against a plain set of the prefixes that were inserted. Three words, so that paths share and leave each other.
class Random {
 public:
  Random(std::shared_ptr<const Model> model, std::uint32_t seed) : model_(std::move(model)), random_(seed) {}

  const SharedState& state(const Tokens& tokens) {
    SharedState& state = states_[tokens];
    if (!state) state = state_after(model_, tokens);
    return state;
  }
  Tokens tokens() {
    Tokens result;
    if (!paths_.empty() && below(4) > 0) {
      const Tokens& path = paths_[below(paths_.size())];
      result = first(path, static_cast<std::int64_t>(below(path.size() + 1)));
    }
    for (std::size_t rest = 1 + below(12); rest-- > 0;) result.push_back(static_cast<std::int32_t>(below(3)));
    paths_.push_back(result);
    return result;
  }
  std::size_t below(std::size_t n) { return random_() % n; }

 private:
  std::shared_ptr<const Model> model_;
  std::mt19937 random_;
  std::map<Tokens, SharedState> states_;
  std::vector<Tokens> paths_;
};

std::int64_t common_length(const Tokens& a, const Tokens& b) { return std::ranges::mismatch(a, b).in1 - a.begin(); }

TEST(StateCache, FindsTheLongestPrefixAndWherePathsPart) {
  const auto model = make_model(fixed_config());
  Random random(model, 1);
  StateCacheOptions options;
  options.device_nbytes = kNoLimit;
  options.min_branch_tokens = 2;
  StateCache cache(model, options);
  std::set<Tokens> inserted;
  for (int i = 0; i < 600; ++i) {
    const Tokens tokens = random.tokens();
    const auto most = static_cast<std::int64_t>(random.below(tokens.size() + 3));
    const auto limit = std::min(most, std::ssize(tokens));
    std::int64_t longest = 0, matched = 0;
    for (const Tokens& path : inserted) {
      const std::int64_t common = std::min(common_length(path, tokens), limit);
      matched = std::max(matched, common);
      if (common == std::ssize(path)) longest = std::max(longest, common);
    }
    const StateCache::Match match = cache.find(tokens, most);
    ASSERT_EQ(match.num_tokens, longest);
    EXPECT_EQ(match.state != nullptr, longest > 0);
    EXPECT_EQ(match.branch, matched - longest >= 2 ? matched : 0);
    if (match.state) expect_equal(match.state, random.state(first(tokens, longest)));
    if (i % 2 == 0) {
      cache.insert(tokens, random.state(tokens));
      inserted.insert(tokens);
    }
    EXPECT_EQ(cache.stats().device.num_states, std::ssize(inserted));
  }
}

class Budgets : public ::testing::TestWithParam<bool> {};  // whether states grow

TEST_P(Budgets, AreKeptAndHitsAreWhatWasStored) {
  const auto model = make_model(GetParam() ? growing_config() : fixed_config());
  const std::size_t nbytes = model->state_nbytes(40);
  for (const int states : {1, 2, 5, 20}) {
    Random random(model, static_cast<std::uint32_t>(states));
    StateCacheOptions options;
    options.device_nbytes = static_cast<std::size_t>(states) * (nbytes + 1024);
    StateCache cache(model, options);
    std::set<Tokens> inserted;
    for (int i = 0; i < 400; ++i) {
      const Tokens tokens = random.tokens();
      if (i % 3 > 0) {
        const bool fits = random.state(tokens)->nbytes() <= options.device_nbytes;
        cache.insert(tokens, random.state(tokens));
        inserted.insert(tokens);
        EXPECT_EQ(cache.find(tokens, std::ssize(tokens)).num_tokens == std::ssize(tokens), fits);
      } else {
        const StateCache::Match match = cache.find(tokens, std::ssize(tokens) - 1);
        EXPECT_LT(match.num_tokens, std::ssize(tokens));
        if (match.state) {
          EXPECT_TRUE(inserted.contains(first(tokens, match.num_tokens)));
          expect_equal(match.state, random.state(first(tokens, match.num_tokens)));
        }
      }
      if (i % 97 == 0) cache.release(random.below(options.device_nbytes));
      expect_within(cache.stats());
    }
    const StateCacheStats stats = cache.stats();
    EXPECT_GT(stats.device.num_evicted, 0);
    EXPECT_GT(stats.device.evicted_tokens, 0);
    EXPECT_EQ(stats.hit_tokens, stats.device.hit_tokens);
    cache.clear();
    EXPECT_EQ(cache.stats().device.nbytes, 0u);
    EXPECT_EQ(cache.stats().device.num_states, 0);
    EXPECT_EQ(cache.find(*inserted.begin(), 100).num_tokens, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(StateCache, Budgets, ::testing::Bool());

TEST(StateCache, GivesTheMemoryBack) {
  const auto model = make_model(fixed_config());
  StateCacheOptions options;
  options.device_nbytes = 3 * (model->state_nbytes() + 1024);
  StateCache cache(model, options);
  const std::size_t before = model->memory().states;
  for (std::uint32_t i = 0; i < 20; ++i) {
    const Tokens tokens = random_tokens(10, i);
    cache.insert(tokens, state_after(model, tokens));
    EXPECT_LE(model->memory().states - before, options.device_nbytes);
  }
  EXPECT_EQ(cache.stats().device.num_states, 3);
  EXPECT_GE(cache.release(model->state_nbytes() + 1024), 2 * model->state_nbytes());
  EXPECT_EQ(cache.stats().device.num_states, 1);
  cache.clear();
  EXPECT_EQ(model->memory().states, before);
}

TEST(StateCache, CountsAnswersAsPrompts) {  // what one request was answered is what the next one asks with
  const auto model = make_model(fixed_config());
  const Tokens prompt = random_tokens(9, 1), answer = random_tokens(4, 2);
  Session session(model, 1);
  session.prefill({{prompt}});
  for (const std::int32_t token : answer) session.step({{token}});

  StateCacheOptions options;
  options.device_nbytes = kNoLimit;
  StateCache cache(model, options);
  const Tokens all = joined(prompt, answer);
  cache.insert(all, session.snapshot(0));
  expect_equal(cache.find(all, 13).state, state_after(model, all));
}

// ---- what is given up ----------------------------------------------------------------------------------------------

class Eviction : public ::testing::Test {
 protected:
  StateCache& cache(int states) {
    StateCacheOptions options;
    options.device_nbytes = static_cast<std::size_t>(states) * (model_->state_nbytes() + 1024);
    return cache_.emplace(model_, options);
  }
  void insert(const Tokens& tokens) { cache_->insert(tokens, state_after(model_, tokens)); }
  // Without a use: looks at the length that a longer request would find, which is a use of that alone.
  bool has(const Tokens& tokens) { return cache_->find(tokens, std::ssize(tokens)).num_tokens == std::ssize(tokens); }

  const std::shared_ptr<const Model> model_ = make_model(fixed_config());
  std::optional<StateCache> cache_;
};

TEST_F(Eviction, TakesInteriorPointsBeforeLeavesAndForks) {
  cache(4);
  const Tokens old = random_tokens(30, 1), path = random_tokens(90, 2);
  insert(old);
  for (const int n : {30, 60, 90}) insert(first(path, n));
  const Tokens fork = joined(first(path, 60), Tokens{1, 2, 3});
  insert(fork);  // 60 is a fork now, 30 the only interior point
  EXPECT_TRUE(has(old));
  EXPECT_TRUE(has(first(path, 60)));
  EXPECT_TRUE(has(path));
  EXPECT_TRUE(has(fork));
  EXPECT_FALSE(has(first(path, 30)));
}

TEST_F(Eviction, WhatAForkWithoutAStateGoesOnFromIsNoInteriorPoint) {
  cache(4);
  const Tokens stem = random_tokens(60, 1), leaf = joined(stem, random_tokens(40, 2));
  insert(first(stem, 20));
  insert(first(stem, 50));
  insert(leaf);
  insert(joined(stem, random_tokens(30, 3)));  // paths part at 60, which has no state
  insert(random_tokens(35, 4));
  EXPECT_TRUE(has(leaf));
  EXPECT_EQ(cache_->find(stem, 60).num_tokens, 50);
  EXPECT_EQ(cache_->find(first(stem, 49), 60).num_tokens, 0);
}

TEST_F(Eviction, TakesWhatSavesLeast) {
  cache(3);
  insert(random_tokens(100, 1));
  insert(random_tokens(10, 2));
  insert(random_tokens(50, 3));
  insert(random_tokens(40, 4));
  EXPECT_FALSE(has(random_tokens(10, 2)));
  EXPECT_TRUE(has(random_tokens(100, 1)));
  EXPECT_TRUE(has(random_tokens(50, 3)));
  EXPECT_TRUE(has(random_tokens(40, 4)));
}

TEST_F(Eviction, GrowsOld) {  // what is not used goes in the end, however much it saves
  cache(3);
  const Tokens costly = random_tokens(60, 1);
  insert(costly);
  std::uint32_t seed = 2;
  for (; cache_->stats().device.num_evicted < 20; ++seed) insert(random_tokens(20, seed));
  EXPECT_FALSE(has(costly));
}

TEST_F(Eviction, AUseRefreshesTheStateThatWasFoundAlone) {
  cache(4);
  const Tokens stem = random_tokens(40, 1), other = random_tokens(40, 2);
  const Tokens leaf = joined(stem, random_tokens(40, 3)), second = joined(stem, random_tokens(40, 4));
  for (const Tokens& tokens : {stem, leaf, second, other}) insert(tokens);
  for (const Tokens& tokens : {leaf, second, other}) EXPECT_TRUE(has(tokens));
  insert(random_tokens(40, 5));  // in the place of the stem, which lies on a path that was used, and was not used
  for (const Tokens& tokens : {leaf, second, other, random_tokens(40, 5)}) EXPECT_TRUE(has(tokens));
  EXPECT_EQ(cache_->find(stem, 40).num_tokens, 0);
}

TEST_F(Eviction, ABranchTakesFromWhatItsLeavesSave) {
  cache(3);
  const Tokens stem = random_tokens(60, 1), other = random_tokens(40, 2);
  const Tokens leaf = joined(stem, random_tokens(20, 3)), second = joined(stem, random_tokens(20, 4));
  for (const Tokens& tokens : {leaf, second, other, stem}) insert(tokens);
  EXPECT_TRUE(has(other));  // it saves 40; each leaf 80 before, and 20 since
  EXPECT_TRUE(has(stem));
  EXPECT_TRUE(has(second));
  EXPECT_FALSE(has(leaf));
}

TEST_F(Eviction, AStateThatIsTooLargeIsNotStored) {
  const auto model = make_model(growing_config());
  StateCacheOptions options;
  options.device_nbytes = model->state_nbytes(20) + 1024;
  StateCache cache(model, options);
  const Tokens small = random_tokens(10, 1), large = random_tokens(900, 2);
  cache.insert(small, state_after(model, small));
  cache.insert(large, state_after(model, large));
  EXPECT_EQ(cache.stats().num_not_stored, 1);
  EXPECT_EQ(cache.stats().device.num_evicted, 0);
  EXPECT_EQ(cache.find(small, 10).num_tokens, 10);
  EXPECT_EQ(cache.find(large, 900).num_tokens, 0);
}

// ---- arguments -----------------------------------------------------------------------------------------------------

TEST(StateCache, RefusesWhatContradictsItself) {
  const auto model = make_model(fixed_config());
  const TemporaryFolder folder;
  const auto refused = [&](auto change) {
    StateCacheOptions options;
    options.device_nbytes = kNoLimit;
    change(options);
    EXPECT_THROW(StateCache(model, options), InvalidArgument);
  };
  refused([](auto& o) { o.host_nbytes = kNoLimit; });  // a CPU
  refused([](auto& o) { o.device_nbytes = 8; });
  refused([&](auto& o) { o.folder = folder.path(); });
  refused([](auto& o) { o.folder_nbytes = 8; });
  refused([](auto& o) { o.interval = 0; });
  refused([](auto& o) { o.min_file_tokens = 0; });
  refused([&](auto& o) {
    o.device_nbytes = 0;
    o.folder = folder.path();
    o.folder_nbytes = 8;
  });
  write_bytes(folder / "file", "x");
  StateCacheOptions options;
  options.device_nbytes = kNoLimit;
  options.folder = folder / "file";
  options.folder_nbytes = kNoLimit;
  EXPECT_THROW(StateCache(model, options), IoError);

  StateCacheOptions plain;
  plain.device_nbytes = kNoLimit;
  StateCache cache(model, plain);
  const Tokens tokens = random_tokens(5, 1);
  EXPECT_THROW(cache.insert(first(tokens, 4), state_after(model, tokens)), InvalidArgument);
  EXPECT_THROW(cache.insert(tokens, state_after(make_model(fixed_config()), tokens)), StateError);
  EXPECT_EQ(cache.find({}, 10).num_tokens, 0);
  EXPECT_EQ(cache.find(tokens, -1).num_tokens, 0);

  StateCache none(model, {});
  none.insert(tokens, state_after(model, tokens));
  EXPECT_EQ(none.find(tokens, 5).num_tokens, 0);
  none.flush();
}

TEST(StateCache, KeepsNoStateInsideAPrefix) {  // there, the tokens that follow decide it
  ModelConfig config = fixed_config();
  config.layers.push_back(PrefixLinearAttentionConfig{2, 3, 5, 8, 1e-12});
  const auto model = make_model(config);
  StateCacheOptions options;
  options.device_nbytes = kNoLimit;
  options.min_branch_tokens = 1;
  StateCache cache(model, options);
  const Tokens tokens = random_tokens(20, 1);
  cache.insert(first(tokens, 7), state_after(model, first(tokens, 7)));
  EXPECT_EQ(cache.find(tokens, 20).num_tokens, 0);
  cache.insert(tokens, state_after(model, tokens));
  EXPECT_EQ(cache.find(joined(first(tokens, 7), {60}), 8).branch, 0);
  EXPECT_EQ(cache.find(joined(first(tokens, 9), {60}), 10).branch, 9);
}

// ---- the host ------------------------------------------------------------------------------------------------------

TEST_P(Budgets, OfTheHost) {
  const auto faults = std::make_shared<Faults>();
  const auto model = make_apart(GetParam() ? growing_config() : fixed_config(), faults);
  StateCacheOptions options;
  const std::size_t device_states = 4, host_states = 12;
  options.device_nbytes = device_states * (model->state_nbytes(200) + 1024);
  options.host_nbytes = GetParam() ? host_states << 21 : host_states * (model->state_nbytes(200) + 1024);
  options.min_host_tokens = 8;
  StateCache cache(model, options);
  std::vector<std::pair<Tokens, SharedState>> inserted;
  for (std::uint32_t i = 0; i < 40; ++i) {
    const Tokens tokens = random_tokens(20 + 9 * (i % 20), i);
    inserted.emplace_back(tokens, state_after(model, tokens));
    cache.insert(tokens, inserted.back().second);
    cache.flush();
    expect_within(cache.stats());
  }
  EXPECT_GT(cache.stats().host.num_states, 6);
  EXPECT_GT(cache.stats().host.num_evicted, 0);
  std::int64_t hits = 0;
  for (const auto& [tokens, state] : inserted) {
    const StateCache::Match match = cache.find(tokens, std::ssize(tokens));
    expect_within(cache.stats());
    if (!match.state) continue;
    expect_equal(match.state, state);
    hits += match.tier == CacheTier::host;
    if (match.tier == CacheTier::host) {
      EXPECT_EQ(cache.find(tokens, std::ssize(tokens)).tier, CacheTier::device);
    }
    cache.flush();
  }
  EXPECT_GT(hits, 6);
  EXPECT_GT(cache.stats().host.hit_tokens, 0);
  EXPECT_EQ(cache.stats().num_failed_copies, 0) << cache.stats().last_error;
}

TEST(StateCache, AFailedCopyIsCounted) {
  const auto faults = std::make_shared<Faults>();
  const auto model = make_apart(fixed_config(), faults);
  StateCacheOptions options;
  options.device_nbytes = 2 * (model->state_nbytes() + 1024);
  options.host_nbytes = 8 * (model->state_nbytes() + 1024);
  StateCache cache(model, options);
  std::vector<SharedState> states;
  for (std::uint32_t i = 0; i < 4; ++i) states.push_back(state_after(model, random_tokens(80, i)));
  faults->arm(0, true);
  for (std::uint32_t i = 0; i < 4; ++i) cache.insert(random_tokens(80, i), states[i]);
  cache.flush();
  faults->disarm();
  EXPECT_GT(cache.stats().num_failed_copies, 0);
  EXPECT_NE(cache.stats().last_error.find("planted fault"), std::string::npos);
  EXPECT_EQ(cache.stats().host.nbytes, 0u);
  EXPECT_EQ(cache.find(random_tokens(80, 3), 80).num_tokens, 80);
}

// ---- files ---------------------------------------------------------------------------------------------------------

class Files : public ::testing::Test {
 protected:
  StateCacheOptions options(std::size_t folder_nbytes = kNoLimit) const {
    StateCacheOptions options;
    options.device_nbytes = kNoLimit;
    options.folder = folder_ / "states";
    options.folder_nbytes = folder_nbytes;
    options.min_file_tokens = 8;
    options.write_delay = std::chrono::milliseconds(0);
    return options;
  }
  std::vector<std::filesystem::path> files() const {
    std::vector<std::filesystem::path> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_.path()))
      if (entry.path().extension() == ".safetensors") found.push_back(entry.path());
    std::ranges::sort(found);
    return found;
  }
  std::size_t nbytes() const {
    std::size_t total = 0;
    std::error_code gone;
    for (const auto& path : files())
      if (const auto size = std::filesystem::file_size(path, gone); !gone) total += size;
    return total;
  }
  void fill(int count, const std::shared_ptr<const Model>& model) {
    StateCache cache(model, options());
    for (int i = 0; i < count; ++i) cache.insert(tokens(i), state_after(model, tokens(i)));
    cache.flush();
    EXPECT_EQ(cache.stats().files.num_states, count) << cache.stats().last_error;
  }
  static Tokens tokens(int i) {
    return random_tokens(30 + 5 * static_cast<std::size_t>(i % 3), 100u + static_cast<std::uint32_t>(i));
  }

  const TemporaryFolder folder_;
  const std::shared_ptr<const Model> model_ = make_model(growing_config());
};

TEST_F(Files, OutliveTheProcess) {
  fill(5, model_);
  EXPECT_EQ(files().size(), 5u);
  const auto again = make_model(growing_config());
  StateCache cache(again, options());
  EXPECT_EQ(cache.stats().files.num_states, 5);
  for (int i = 0; i < 5; ++i) {
    const Tokens longer = joined(tokens(i), random_tokens(10, 7));
    const StateCache::Match match = cache.find(longer, std::ssize(longer));
    EXPECT_EQ(match.num_tokens, std::ssize(tokens(i)));
    EXPECT_EQ(match.tier, CacheTier::files);
    expect_equal(match.state, state_after(again, tokens(i)));
    EXPECT_EQ(cache.find(longer, std::ssize(longer)).tier, CacheTier::device);
  }
  EXPECT_EQ(cache.find(random_tokens(40, 9), 40).num_tokens, 0);
  EXPECT_EQ(cache.stats().num_refused_files, 0) << cache.stats().last_error;
  EXPECT_GT(cache.stats().files.hit_tokens, 150);
  const SharedState loaded = State::load(files().front(), again);  // a state file like any other
  EXPECT_TRUE(bytes_of(*loaded) == bytes_of(*state_after(again, tokens(0))) ||
              bytes_of(*loaded) == bytes_of(*state_after(again, tokens(3))));
}

TEST_F(Files, AreReadOnlyWhereTheySaveEnough) {
  fill(1, model_);
  const Tokens all = tokens(0);
  StateCache cache(model_, options());
  cache.insert(first(all, 23), state_after(model_, first(all, 23)));
  EXPECT_EQ(cache.find(all, 30).num_tokens, 23);  // 7 tokens more
  StateCache second(model_, options());
  second.insert(first(all, 22), state_after(model_, first(all, 22)));
  second.set_seconds_per_token(1e-12);  // reading a file takes longer
  EXPECT_EQ(second.find(all, 30).num_tokens, 22);
  second.set_seconds_per_token(1);
  EXPECT_EQ(second.find(all, 30).num_tokens, 30);
}

TEST_F(Files, InteriorPointsAreNotWritten) {
  StateCacheOptions slow = options();
  slow.write_delay = std::chrono::hours(1);
  StateCache cache(model_, slow);
  const Tokens all = random_tokens(60, 3);
  for (const int n : {10, 20, 30, 40, 50, 60}) cache.insert(first(all, n), state_after(model_, first(all, n)));
  EXPECT_TRUE(files().empty());
  cache.flush();
  EXPECT_EQ(files().size(), 1u);
  EXPECT_EQ(StateCache(model_, options()).find(all, 60).num_tokens, 60);
}

TEST_F(Files, OfOtherProcessesAreFound) {
  StateCache cache(model_, options());
  fill(1, make_model(growing_config()));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (cache.stats().files.num_states == 0 && std::chrono::steady_clock::now() < end)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(cache.find(tokens(0), 30).tier, CacheTier::files);
}

TEST_F(Files, OfAnotherModelAreNotSeen) {
  fill(3, make_model(growing_config(), 6));
  StateCache cache(model_, options());
  EXPECT_EQ(cache.stats().files.num_states, 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(cache.find(tokens(i), 40).num_tokens, 0);
}

TEST_F(Files, TheFolderStaysWithinItsLimit) {
  fill(1, model_);
  const std::size_t one = nbytes();
  std::filesystem::remove_all(folder_ / "states");
  const std::size_t limit = 3 * one + 10000;  // 3 of them: what a header may have is counted
  {
    StateCache cache(model_, options(limit));
    for (int i = 0; i < 3; ++i) {
      cache.insert(tokens(3 * i), state_after(model_, tokens(3 * i)));
      cache.flush();
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
  ASSERT_EQ(files().size(), 3u);
  StateCache cache(model_, options(limit));
  EXPECT_EQ(cache.find(tokens(0), 30).tier, CacheTier::files);  // used last now
  for (int i = 3; i < 9; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (i == 4) {
      StateCache other(model_, options(limit));
      EXPECT_EQ(other.find(tokens(0), 30).tier, CacheTier::files);
    }
    cache.insert(tokens(3 * i), state_after(model_, tokens(3 * i)));
    cache.flush();
    EXPECT_LE(nbytes(), limit);
    EXPECT_LE(cache.stats().files.nbytes, limit);
    StateCache other(model_, options(limit));
    EXPECT_EQ(other.find(tokens(3 * i), 30).tier, CacheTier::files);
    if (i == 4) {
      EXPECT_EQ(other.find(tokens(0), 30).tier, CacheTier::files);
    }
  }
  EXPECT_GT(cache.stats().files.num_evicted, 0);
  StateCache small(model_, options(100));
  small.insert(tokens(1), state_after(model_, tokens(1)));
  small.flush();
  EXPECT_EQ(small.stats().num_not_copied, 1);
}

TEST_F(Files, SeveralProcessesShareAFolder) {  // threads here, with models and caches of their own
  fill(1, model_);
  const std::size_t limit = 5 * nbytes() + 5 * 16384;
  std::atomic<bool> done{false};
  std::atomic<std::size_t> greatest{0};
  std::thread watch([&] {
    while (!done) {
      greatest = std::max(greatest.load(), nbytes());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      const auto model = make_model(growing_config());
      for (int round = 0; round < 8; ++round) {
        StateCache cache(model, options(limit));
        for (int i = 0; i < 3; ++i) {
          const int which = (7 * t + 5 * round + i) % 12;
          const StateCache::Match match = cache.find(tokens(which), 40);
          if (match.state) expect_equal(match.state, state_after(model, tokens(which)));
          cache.insert(tokens(which), state_after(model, tokens(which)));
        }
        cache.flush();
        EXPECT_EQ(cache.stats().num_failed_copies, 0) << cache.stats().last_error;
        EXPECT_EQ(cache.stats().num_refused_files, 0) << cache.stats().last_error;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  watch.join();
  EXPECT_LE(greatest, limit);
  EXPECT_GT(greatest, 0u);
}

TEST_F(Files, AFullDiskIsCounted) {
  StateCache cache(model_, options());
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000, before.rlim_max};  // writing more to a file fails
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  cache.insert(tokens(0), state_after(model_, tokens(0)));
  cache.flush();
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(cache.stats().num_failed_copies, 1);
  EXPECT_NE(cache.stats().last_error.find("write"), std::string::npos) << cache.stats().last_error;
  EXPECT_TRUE(files().empty());
  EXPECT_EQ(cache.find(tokens(0), 30).num_tokens, 30);  // from memory
  cache.insert(tokens(1), state_after(model_, tokens(1)));
  cache.flush();
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(Files, AProcessThatHoldsTheFolderDelaysNoMoreThanOneFile) {
  StateCache cache(model_, options());
  const int held = ::open((folder_ / "states/.lock").c_str(), O_RDWR | O_CREAT, 0600);
  ASSERT_EQ(::flock(held, LOCK_EX), 0);
  for (int i = 0; i < 4; ++i) cache.insert(tokens(i), state_after(model_, tokens(i)));
  const auto begin = std::chrono::steady_clock::now();
  cache.flush();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(12));
  EXPECT_EQ(cache.stats().num_not_copied, 4);
  EXPECT_TRUE(files().empty());
  ::close(held);
  cache.insert(tokens(4), state_after(model_, tokens(4)));
  cache.flush();
  EXPECT_EQ(files().size(), 1u) << cache.stats().last_error;
}

TEST_F(Files, AFolderThatIsDeletedIsMadeAgain) {
  StateCache cache(model_, options());
  std::filesystem::remove_all(folder_ / "states");
  cache.insert(tokens(0), state_after(model_, tokens(0)));
  cache.flush();
  EXPECT_EQ(files().size(), 1u) << cache.stats().last_error;
}

// Damage of every kind: a find answers with what was stored, or with nothing.
TEST_F(Files, DamageIsNoHit) {
  constexpr int kCount = 4;
  fill(kCount, model_);
  const auto paths = files();
  std::vector<std::string> whole;
  for (const auto& path : paths) whole.push_back(read_bytes(path));
  const TemporaryFolder elsewhere;
  const auto stranger = make_model(growing_config(), 6);
  state_after(stranger, tokens(0))->save(elsewhere / "stranger");
  state_after(model_, tokens(0))->save(elsewhere / "without tokens");

  std::mt19937 random(3);
  std::int64_t hits = 0, refused = 0;
  for (int round = 0; round < 120; ++round) {
    const int kind = round % 8;
    std::string trace = "round " + std::to_string(round);
    SCOPED_TRACE(trace);
    const std::size_t which = random() % paths.size();
    std::string bytes = whole[which];
    bool is_right = false;  // what the file holds now
    switch (kind) {
      case 0:
        bytes.resize(random() % bytes.size());
        break;
      case 1:
        bytes[random() % bytes.size()] ^= static_cast<char>(1 << (random() % 8));
        break;
      case 2:
        bytes += std::string(1 + random() % 100, 'x');
        break;
      case 3:
        bytes = whole[(which + 1) % paths.size()];
        break;
      case 4:
        bytes = read_bytes(elsewhere / "stranger");
        break;
      case 5:
        bytes = read_bytes(elsewhere / "without tokens");
        break;
      case 6:
        for (std::size_t i = 0, at = random() % bytes.size(); i < 500 && at + i < bytes.size(); ++i) bytes[at + i] = 0;
        break;
      default:
        is_right = true;
    }
    is_right = is_right || bytes == whole[which];
    write_bytes(paths[which], bytes);
    StateCache cache(model_, options());
    for (int i = 0; i < kCount; ++i) {
      const StateCache::Match match = cache.find(tokens(i), 40);
      if (!match.state) continue;
      ++hits;
      expect_equal(match.state, state_after(model_, tokens(i)));
    }
    const StateCacheStats stats = cache.stats();
    EXPECT_EQ(stats.num_refused_files, is_right || bytes.empty() ? 0 : 1) << stats.last_error;
    EXPECT_EQ(stats.num_refused_files == 0, stats.last_error.empty());
    refused += stats.num_refused_files;
    write_bytes(paths[which], whole[which]);
    if (HasFailure()) break;
  }
  EXPECT_GT(hits, 300);
  EXPECT_GT(refused, 60);
}

TEST_F(Files, ForeignEntriesOfTheFolderAreLeftAlone) {
  fill(2, model_);
  const auto paths = files();
  const auto folder = paths[0].parent_path();
  const std::string whole = read_bytes(paths[0]);
  std::filesystem::remove(paths[0]);
  std::filesystem::create_directory(paths[0]);
  write_bytes(folder / "notes.txt", "a note");
  write_bytes(folder / "12-xyz.safetensors", "x");
  write_bytes(folder / "012-0123456789abcdef.safetensors", "x");
  write_bytes(folder / "99999999999999999999-0123456789abcdef.safetensors", "x");
  std::filesystem::create_symlink("/dev/zero", folder / "30-0123456789abcdef.safetensors");
  StateCache cache(model_, options(2 * whole.size() + 40000));
  EXPECT_EQ(cache.stats().files.num_states, 1);
  for (int i = 0; i < 8; ++i) cache.insert(tokens(i), state_after(model_, tokens(i)));
  cache.flush();
  EXPECT_EQ(read_bytes(folder / "notes.txt"), "a note");
  EXPECT_TRUE(std::filesystem::exists(folder / "12-xyz.safetensors"));
  EXPECT_TRUE(std::filesystem::is_directory(paths[0]));
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "30-0123456789abcdef.safetensors"));
  EXPECT_GT(cache.stats().files.num_evicted, 0);
}

// A file that was refused is not read again, but written again.
TEST_F(Files, ADamagedFileIsReplaced) {
  fill(1, model_);
  const auto path = files().front();
  const std::string whole = read_bytes(path);
  write_bytes(path, whole.substr(0, 100));
  StateCache cache(model_, options());
  EXPECT_EQ(cache.find(tokens(0), 30).num_tokens, 0);
  EXPECT_EQ(cache.find(tokens(0), 30).num_tokens, 0);
  EXPECT_EQ(cache.stats().num_refused_files, 1);
  cache.insert(tokens(0), state_after(model_, tokens(0)));
  cache.flush();
  EXPECT_EQ(read_bytes(path), whole);
  EXPECT_EQ(cache.stats().files.num_states, 1);
}

// ---- as an engine uses it ------------------------------------------------------------------------------------------

// The prompts of one sequence after another. `cut`: where a prompt may be cut. At multiples of 64 its state is, to the
// bit, what it is without a cut (linear attention takes so many tokens at a time).
class FakeEngine {
 public:
  FakeEngine(std::shared_ptr<const Model> model, StateCacheOptions options, std::int64_t cut = 1)
      : cache(model, options), cut_(cut), session_(std::move(model), 1) {}

  // Reads a prompt; returns how many of its tokens were cached. `answer`: tokens that are chosen behind it.
  std::int64_t serve(const Tokens& prompt, const Tokens& answer = {}) {
    const auto n = std::ssize(prompt);
    const StateCache::Match match = cache.find(prompt, n - 1);
    session_.reset();
    if (match.state) session_.restore(0, *match.state);
    const std::int64_t interval = cache.options().interval;
    for (std::int64_t at = match.num_tokens; at < n;) {
      std::int64_t end = std::min(n, (at / interval + 1) * interval);
      for (const std::int64_t stop : {match.branch / cut_ * cut_, n / cut_ * cut_})
        if (stop > at) end = std::min(end, stop);
      session_.prefill({{Tokens(prompt.begin() + at, prompt.begin() + end)}});
      if (end % cut_ == 0) keep(first(prompt, end));
      at = end;
    }
    for (const std::int32_t token : answer) session_.step({{token}});
    if (!answer.empty()) keep(joined(prompt, answer));
    return match.num_tokens;
  }
  SharedState state() const { return session_.snapshot(0); }

  StateCache cache;

 private:
  void keep(const Tokens& tokens) { cache.insert(tokens, session_.snapshot(0)); }
  const std::int64_t cut_;
  Session session_;
};

class SharedPrefix : public ::testing::TestWithParam<std::pair<int, int>> {
 protected:
  static constexpr int kRequests = 64;

  // Tokens found by all of the requests, of `states` states of memory.
  std::int64_t hits(std::size_t states, std::int64_t cut) {
    const auto [shared, own] = GetParam();
    StateCacheOptions options;
    options.device_nbytes = states * (model_->state_nbytes() + 1024);
    FakeEngine engine(model_, options, cut);
    const Tokens stem = random_tokens(static_cast<std::size_t>(shared), 1);
    std::int64_t hits = 0;
    for (int i = 0; i < kRequests; ++i) {
      const Tokens mine = random_tokens(static_cast<std::size_t>(own) - 1, 10u + static_cast<std::uint32_t>(i));
      const Tokens prompt = joined(stem, joined({i % 61}, mine));
      hits += engine.serve(prompt);
      if (cut == 64 && (i < 3 || i == kRequests - 1)) expect_equal(engine.state(), state_after(model_, prompt));
    }
    expect_within(engine.cache.stats());
    EXPECT_EQ(engine.cache.stats().hit_tokens, hits);
    return hits;
  }
  // The first request can find nothing.
  double possible(std::int64_t tokens) const { return static_cast<double>((kRequests - 1) * tokens); }

  const std::shared_ptr<const Model> model_ = make_model(fixed_config());
};

TEST_P(SharedPrefix, IsFoundByAllButTheFirst) {
  const std::int64_t shared = GetParam().first;
  EXPECT_GE(static_cast<double>(hits(10000, 1)), 0.97 * possible(shared));
  EXPECT_GE(static_cast<double>(hits(10000, 64)), 0.97 * possible(shared / 64 * 64));
}

// One of 40 tokens saves less than what each request has of its own, and goes first.
class LongSharedPrefix : public SharedPrefix {};

TEST_P(LongSharedPrefix, IsFoundWithLittleMemory) {
  const std::int64_t shared = GetParam().first;
  EXPECT_GE(static_cast<double>(hits(12, 1)), 0.97 * possible(shared));
  EXPECT_GE(static_cast<double>(hits(12, 64)), 0.97 * possible(shared / 64 * 64));
}

constexpr std::pair<int, int> kLong[] = {{1600, 600}, {1500, 700}, {1000, 40}};
INSTANTIATE_TEST_SUITE_P(StateCache, SharedPrefix, ::testing::ValuesIn(kLong));
INSTANTIATE_TEST_SUITE_P(OfFewTokens, SharedPrefix, ::testing::Values(std::pair(40, 600)));
INSTANTIATE_TEST_SUITE_P(StateCache, LongSharedPrefix, ::testing::ValuesIn(kLong));

TEST(StateCache, ALongConversationIsNeverReadAgain) {
  const auto model = make_model(fixed_config());
  StateCacheOptions options;
  options.device_nbytes = 6 * (model->state_nbytes() + 1024);
  FakeEngine engine(model, options);
  Tokens seen;
  for (std::uint32_t turn = 0; seen.size() < 40000; ++turn) {
    const Tokens prompt = joined(seen, random_tokens(1900, 2 * turn));
    const Tokens answer = random_tokens(100, 2 * turn + 1);
    EXPECT_EQ(engine.serve(prompt, answer), std::ssize(seen));
    seen = joined(prompt, answer);
    const std::string left = layers_of(*engine.state());
    engine.serve(random_tokens(300, 1000 + turn));  // another one between the turns
    const StateCache::Match match = engine.cache.find(seen, std::ssize(seen));
    ASSERT_EQ(match.num_tokens, std::ssize(seen));
    EXPECT_TRUE(layers_of(*match.state) == left);
    expect_within(engine.cache.stats());
  }
}

TEST(StateCache, AskedTheSameAgainReadsOneToken) {
  const auto model = make_model(fixed_config());
  StateCacheOptions options;
  options.device_nbytes = kNoLimit;
  FakeEngine engine(model, options);
  const Tokens prompt = random_tokens(700, 1);
  EXPECT_EQ(engine.serve(prompt), 0);
  EXPECT_EQ(engine.serve(prompt), 512);
  EXPECT_EQ(engine.serve(prompt), 699);
}

TEST(StateCache, StatisticsMayBeReadByAnyThread) {
  const auto model = make_model(fixed_config());
  StateCacheOptions options;
  options.device_nbytes = 5 * (model->state_nbytes() + 1024);
  FakeEngine engine(model, options);
  std::atomic<bool> done{false};
  std::thread reader([&] {
    while (!done) expect_within(engine.cache.stats());
  });
  for (std::uint32_t i = 0; i < 60; ++i) engine.serve(random_tokens(300, i % 9));
  done = true;
  reader.join();
  EXPECT_GT(engine.cache.stats().query_tokens, 60 * 299 - 1);
}

}  // namespace
}  // namespace based
