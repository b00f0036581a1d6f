#include "based/generation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "based/error.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::floats;
using test::greedy;
using test::random_tokens;
using test::tiny_config;

using Key = std::pair<int, int>;  // request, sample

std::map<Key, std::vector<std::int32_t>> run(Generator& generator) {
  std::map<Key, std::vector<std::int32_t>> out;
  while (!generator.done())
    for (const TokenEvent& event : generator.next()) out[{event.request, event.sample}].push_back(event.token);
  EXPECT_TRUE(generator.next().empty());
  return out;
}

std::int32_t argmax(const Tensor& logits) {
  const auto row = floats(logits);
  return static_cast<std::int32_t>(std::max_element(row.begin(), row.begin() + 61) - row.begin());
}

class GenerationTest : public ::testing::Test {
 protected:
  std::shared_ptr<const Model> model_ = Model::random(tiny_config(), 21);

  std::vector<std::int32_t> by_hand(const std::vector<std::int32_t>& prompt, std::size_t count) const {
    Session session(model_, 1);
    std::vector<std::int32_t> tokens{argmax(session.prefill({&prompt, 1}))};
    while (tokens.size() < count) tokens.push_back(argmax(session.step({&tokens.back(), 1})));
    return tokens;
  }
};

TEST_F(GenerationTest, GreedyIsTheArgmaxOfEachStep) {
  std::vector<GenerationRequest> requests;
  for (int i = 0; i < 7; ++i)
    requests.push_back(
        {random_tokens(static_cast<std::size_t>(1 + 13 * i), static_cast<std::uint32_t>(i)), greedy(3 + 5 * i)});
  for (const int batch : {1, 3, 100}) {
    Generator generator(model_, requests, batch);
    const auto out = run(generator);
    for (int i = 0; i < 7; ++i)
      EXPECT_EQ(out.at({i, 0}),
                by_hand(requests[static_cast<std::size_t>(i)].prompt, static_cast<std::size_t>(3 + 5 * i)));
  }
}

// A sequence has as many tokens as have room; the last one of a generator's own session is not fed.
TEST_F(GenerationTest, MaxContextEndsASequenceAndNoOther) {
  LoadOptions options;
  options.max_context = 20;
  const auto model = Model::random(tiny_config(), 21, options);
  const auto ends = [](Generator& generator) {
    std::map<int, std::pair<int, TokenEvent>> out;  // by request: tokens, the last event
    while (!generator.done())
      for (const TokenEvent& event : generator.next()) {
        out[event.request].first += event.token >= 0 ? 1 : 0;
        out[event.request].second = event;
      }
    return out;
  };
  const auto prompt = random_tokens(15, 1);
  {
    Generator generator(model,
                        {{prompt, greedy(9)},
                         {random_tokens(3, 2), greedy(17)},
                         {prompt, greedy(6)},
                         {prompt, greedy(SamplingParams::kNoLimit)}},
                        2);
    auto out = ends(generator);
    EXPECT_EQ(out[0].first, 6);
    EXPECT_EQ(out[0].second.finish, FinishReason::error);
    EXPECT_NE(out[0].second.error.find("max_context, 20 tokens"), std::string::npos) << out[0].second.error;
    EXPECT_EQ(out[1].first, 17);
    EXPECT_EQ(out[1].second.finish, FinishReason::length);
    for (const int i : {2, 3}) {
      EXPECT_EQ(out[i].first, 6);
      EXPECT_EQ(out[i].second.finish, FinishReason::length);
    }
  }
  EXPECT_THROW_WITH(Generator(model, {{random_tokens(21, 1), greedy(1)}}, 2), InvalidArgument,
                    "generate: prompt 0: 21 tokens are more than the model's max_context, 20 tokens");

  Session session(model, 2);
  {
    Generator generator(session, {{prompt, greedy(9)}, {random_tokens(3, 2), greedy(17)}});
    auto out = ends(generator);
    EXPECT_EQ(out[0].first, 5);  // all of them are fed
    EXPECT_EQ(out[0].second.finish, FinishReason::error);
    EXPECT_EQ(out[1].first, 17);
    EXPECT_EQ(out[1].second.finish, FinishReason::length);
    EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{20, 20}));
  }
  EXPECT_THROW_WITH(Generator(session, {{{1}, greedy(1)}, {{}, greedy(1)}}), InvalidArgument, "1 tokens behind 20");
  Generator generator(session, {{{}, greedy(4)}, {{}, greedy(4)}});
  auto out = ends(generator);
  for (const int i : {0, 1}) {
    EXPECT_EQ(out[i].first, 0);
    EXPECT_EQ(out[i].second.finish, FinishReason::error);
  }
  EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{20, 20}));
}

TEST_F(GenerationTest, SamplesDependOnSeedAndIndexAlone) {
  SamplingParams params;
  params.n = 5;
  params.max_tokens = 12;
  params.seed = 99;
  const GenerationRequest request{random_tokens(10, 1), params};
  const GenerationRequest neighbour{random_tokens(50, 2), greedy(30)};
  std::vector<std::map<Key, std::vector<std::int32_t>>> results;
  for (const int batch : {1, 2, 4, 64}) {
    Generator alone(model_, {request}, batch), beside(model_, {request, neighbour, request}, batch);
    results.push_back(run(alone));
    const auto with = run(beside);
    for (int s = 0; s < 5; ++s) {
      EXPECT_EQ(with.at({0, s}), results.back().at({0, s}));
      EXPECT_EQ(with.at({2, s}), results.back().at({0, s}));
    }
  }
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
  EXPECT_NE(results[0].at({0, 0}), results[0].at({0, 1}));
}

TEST_F(GenerationTest, EndsAtStopTokensAndLength) {
  const auto prompt = random_tokens(10, 1);
  const auto tokens = by_hand(prompt, 20);
  SamplingParams params = greedy(20);
  params.stop_token_ids = {tokens[7]};
  const auto first = static_cast<std::size_t>(std::find(tokens.begin(), tokens.end(), tokens[7]) - tokens.begin());
  Generator generator(model_, {{prompt, params}, {prompt, greedy(4)}}, 8);
  std::vector<TokenEvent> last(2);
  std::vector<std::size_t> count(2);
  while (!generator.done())
    for (const TokenEvent& event : generator.next()) {
      const auto r = static_cast<std::size_t>(event.request);
      EXPECT_EQ(last[r].finish, FinishReason::none);
      last[r] = event;
      ++count[r];
    }
  EXPECT_EQ(last[0].finish, FinishReason::stop);
  EXPECT_EQ(last[0].stop_token, tokens[7]);
  EXPECT_EQ(count[0], first + 1);
  EXPECT_EQ(last[1].finish, FinishReason::length);
  EXPECT_EQ(count[1], 4u);
}

TEST_F(GenerationTest, TheEndTokenEndsUnlessIgnored) {
  SamplingParams params;
  params.logit_bias = {{60, 100.0}};  // the config's eos_token_id
  params.max_tokens = 5;
  const auto prompt = random_tokens(3, 1);
  Generator ended(model_, {{prompt, params}}, 1);
  EXPECT_EQ(run(ended).at({0, 0}), (std::vector<std::int32_t>{60}));
  params.ignore_eos = true;
  Generator ignored(model_, {{prompt, params}}, 1);
  EXPECT_EQ(run(ignored).at({0, 0}).size(), 5u);
  params.ignore_eos = false;
  params.min_tokens = 3;
  Generator later(model_, {{prompt, params}}, 1);
  const auto tokens = run(later).at({0, 0});
  EXPECT_EQ(tokens.size(), 4u);
  EXPECT_EQ(tokens.back(), 60);
  EXPECT_EQ(std::count(tokens.begin(), tokens.end() - 1, 60), 0);
}

TEST_F(GenerationTest, FinishEndsRunningAndWaitingSamples) {
  SamplingParams params = greedy(50);
  params.n = 3;
  Generator generator(model_, {{random_tokens(4, 1), params}, {random_tokens(4, 2), greedy(3)}}, 2);
  generator.next();
  generator.finish(0, 0);
  generator.finish(0, 1);
  generator.finish(0, 2);
  generator.finish(0, 2);
  std::map<Key, int> count;
  while (!generator.done())
    for (const TokenEvent& event : generator.next()) ++count[{event.request, event.sample}];
  EXPECT_EQ(count, (std::map<Key, int>{{{1, 0}, 3}}));
  EXPECT_THROW(generator.finish(2, 0), InvalidArgument);
  EXPECT_THROW(generator.finish(0, 3), InvalidArgument);
}

TEST_F(GenerationTest, RequestsMayComeWhileOthersRun) {
  std::map<int, std::vector<std::int32_t>> expected, found;
  const auto request = [&](int i) { return GenerationRequest{random_tokens(3 + i % 4, i), greedy(1 + i % 5)}; };
  Generator generator(model_, {request(0), request(1)}, 2);
  for (int i = 0; i < 40; ++i) {
    if (i > 1) {
      EXPECT_EQ(generator.add(request(i)), i);
    }
    for (const TokenEvent& event : generator.next()) found[event.request].push_back(event.token);
    Generator alone(model_, {request(i)}, 1);
    while (!alone.done())
      for (const TokenEvent& event : alone.next()) expected[i].push_back(event.token);
  }
  while (!generator.done())
    for (const TokenEvent& event : generator.next()) found[event.request].push_back(event.token);
  EXPECT_EQ(found, expected);
  generator.finish(3, 0);  // has ended
  EXPECT_THROW(generator.finish(40, 0), InvalidArgument);
  EXPECT_THROW(generator.add({{}, greedy(1)}), InvalidArgument);
  EXPECT_THROW(generator.add({random_tokens(3, 1), greedy(0)}), InvalidArgument);
  EXPECT_TRUE(generator.done());
  Session session(model_, 1);
  Generator on_session(session, {request(0)});
  EXPECT_THROW(on_session.add(request(1)), InvalidArgument);
}

TEST_F(GenerationTest, ASessionHasSeenEveryReturnedToken) {
  const std::vector<std::vector<std::int32_t>> prompts{random_tokens(10, 1), random_tokens(20, 2)};
  Session session(model_, 2);
  std::map<Key, std::vector<std::int32_t>> out;
  {
    Generator generator(session, {{prompts[0], greedy(5)}, {prompts[1], greedy(9)}});
    out = run(generator);
  }
  EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{15, 29}));
  const std::vector<std::int32_t> next{1, 1};
  const auto logits = floats(session.step(next));
  for (int i = 0; i < 2; ++i) {
    Session replay(model_, 1);
    replay.prefill({&prompts[static_cast<std::size_t>(i)], 1});
    for (const std::int32_t token : out.at({i, 0})) replay.step({&token, 1});
    EXPECT_EQ(floats(replay.step({next.data(), 1})),
              std::vector<float>(logits.begin() + 64 * i, logits.begin() + 64 * (i + 1)));
  }
}

TEST_F(GenerationTest, FinishOnASessionFeedsTheLastToken) {
  Session session(model_, 1);
  Generator generator(session, {{random_tokens(10, 1), greedy(50)}});
  generator.next();
  generator.next();
  generator.finish(0, 0);
  EXPECT_TRUE(generator.done());
  EXPECT_EQ(session.num_tokens()[0], 12);
}

TEST_F(GenerationTest, AnInterruptDuringPrefillLosesNothing) {
  const GenerationRequest request{random_tokens(300, 1), greedy(6)};
  Generator generator(model_, {request}, 1);
  bool thrown = false;
  const auto interrupt = [&] {
    if (!std::exchange(thrown, true)) throw std::runtime_error("stop here");
  };
  EXPECT_THROW(generator.next(interrupt), std::runtime_error);
  EXPECT_EQ(run(generator).at({0, 0}), by_hand(request.prompt, 6));
}

TEST_F(GenerationTest, RefusesWrongRequests) {
  Session session(model_, 2);
  SamplingParams two = greedy(3);
  two.n = 2;
  SamplingParams cold = greedy(3);
  cold.temperature = -1;
  const auto prompt = random_tokens(3, 1);
  EXPECT_THROW(Generator(session, {{prompt, greedy(3)}}), InvalidArgument);
  EXPECT_THROW(Generator(session, {{prompt, two}, {prompt, greedy(3)}}), InvalidArgument);
  EXPECT_THROW(Generator(model_, {{{}, greedy(3)}}, 1), InvalidArgument);
  EXPECT_THROW(Generator(model_, {{{61}, greedy(3)}}, 1), InvalidArgument);
  EXPECT_THROW(Generator(model_, {{prompt, cold}}, 1), InvalidArgument);
  EXPECT_THROW(Generator(model_, {{prompt, greedy(3)}}, 0), InvalidArgument);
  Generator none(model_, {}, 4);
  EXPECT_TRUE(none.done());
}

}  // namespace
}  // namespace based
