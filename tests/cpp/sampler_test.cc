// SamplingParams, log-probabilities and the CPU's sampler.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/philox.h"
#include "based/error.h"
#include "sample_step.h"

namespace based::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

CpuBackend make_cpu(Isa isa = choose_isa(), int threads = 2) { return {std::make_shared<ThreadPool>(threads), isa}; }

SamplingParams with(auto&& change) {
  SamplingParams params;
  change(params);
  return params;
}

// One row of logits and its sampler.
struct One {
  CpuBackend cpu;
  std::vector<float> logits;
  std::unique_ptr<backend::Sampler> sampler;
  std::int64_t vocab_size;

  explicit One(std::vector<float> row, std::int64_t vocab = 0, Isa isa = choose_isa())
      : cpu(make_cpu(isa)), logits(std::move(row)) {
    vocab_size = vocab > 0 ? vocab : static_cast<std::int64_t>(logits.size());
    sampler = cpu.make_sampler(vocab_size, 1);
  }
  void assign(const SamplingParams& params, const std::vector<std::int32_t>& prompt = {0},
              const std::vector<std::int32_t>& stop = {}, std::uint64_t seed = 1) {
    sampler->assign(0, params, seed, 0, prompt, stop);
  }
  backend::SampledToken sample(std::int64_t position = 0) {
    const std::vector<std::int32_t> rows{0};
    const std::vector<std::int64_t> positions{position};
    const auto cols = static_cast<std::int64_t>(logits.size());
    return sample_step(cpu, *sampler, {logits.data(), DType::float32, 1, cols}, rows, positions).at(0);
  }
  // How often each token comes in `draws` positions. Params must not depend on the history.
  std::vector<int> histogram(int draws) {
    std::vector<int> counts(static_cast<std::size_t>(vocab_size));
    for (int i = 0; i < draws; ++i) ++counts.at(static_cast<std::size_t>(sample(i).token));
    return counts;
  }
  std::set<std::int32_t> support(int draws = 4000) {
    std::set<std::int32_t> tokens;
    for (int i = 0; i < draws; ++i) tokens.insert(sample(i).token);
    return tokens;
  }
};

// Pearson's statistic stays below mean + 5 standard deviations. Rare tokens (fewer than 5 expected) count as one.
void expect_distribution(const std::vector<int>& counts, const std::vector<double>& probabilities) {
  const int draws = std::accumulate(counts.begin(), counts.end(), 0);
  double chi2 = 0, rare = 0;
  int cells = 0, rare_count = 0;
  const auto add = [&](int count, double expected) {
    chi2 += (count - expected) * (count - expected) / expected;
    ++cells;
  };
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = probabilities[i] * draws;
    if (expected == 0) {
      EXPECT_EQ(counts[i], 0) << i;
    } else if (expected < 5) {
      rare += expected;
      rare_count += counts[i];
    } else {
      add(counts[i], expected);
    }
  }
  if (rare >= 5) add(rare_count, rare);
  EXPECT_LT(chi2, cells - 1 + 5 * std::sqrt(2.0 * cells));
}

std::vector<double> softmax(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  std::vector<double> p;
  for (double v : x) p.push_back(std::exp(v - max));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& v : p) v /= sum;
  return p;
}

std::vector<float> random_logits(std::size_t size, unsigned seed, double sd = 2) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, sd);
  std::vector<float> x(size);
  for (float& v : x) v = static_cast<float>(normal(random));
  return x;
}

// ---- random numbers -------------------------------------------------------------------------------------------------

TEST(Philox, KnownAnswers) {
  using Four = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}), (Four{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const std::uint32_t ones = 0xffffffff;
  EXPECT_EQ(philox4x32_10({ones, ones, ones, ones}, {ones, ones}),
            (Four{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Four{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, UniformTakesEveryWordOfItsArguments) {
  EXPECT_EQ(uniform(0, 0, 0), ((0x6627e8d5u >> 5) * 67108864.0 + (0xe169c58du >> 6)) / 9007199254740992.0);
  const std::set<double> numbers{uniform(0, 0, 0), uniform(1, 0, 0), uniform(1ull << 32, 0, 0),
                                 uniform(0, 1, 0), uniform(0, 0, 1), uniform(0, 0, 1ull << 32)};
  EXPECT_EQ(numbers.size(), 6u);
  double sum = 0, least = 1, most = 0;
  for (std::uint64_t i = 0; i < 100000; ++i) {
    const double u = uniform(3, 4, i);
    sum += u;
    least = std::min(least, u);
    most = std::max(most, u);
  }
  EXPECT_GE(least, 0.0);
  EXPECT_LT(most, 1.0);
  EXPECT_NEAR(sum / 100000, 0.5, 0.005);
}

// ---- log-probabilities ----------------------------------------------------------------------------------------------

TEST(LogProbs, MatchDoubleLogSoftmaxOnEveryInstructionSet) {
  for (Isa isa : available_isas()) {
    CpuBackend cpu = make_cpu(isa);
    for (std::int64_t vocab : {1, 3, 16, 1000, 1024, 1025, 5003}) {
      const std::int64_t cols = vocab + 7, rows = 5;
      for (double sd : {0.1, 3.0, 60.0}) {
        auto logits = random_logits(static_cast<std::size_t>(rows * cols), 3, sd);
        for (std::int64_t r = 0; r < rows; ++r) logits[static_cast<std::size_t>(r * cols + vocab)] = 1e6f;  // no token
        std::vector<std::int32_t> targets;
        for (std::int64_t r = 0; r < rows; ++r) targets.push_back(static_cast<std::int32_t>(r * 997 % vocab));
        std::vector<float> out(static_cast<std::size_t>(rows));
        cpu.token_log_probs({logits.data(), DType::float32, rows, cols}, vocab, targets, out);
        for (std::size_t r = 0; r < out.size(); ++r) {
          const float* x = logits.data() + static_cast<std::int64_t>(r) * cols;
          double max = x[0], sum = 0;
          for (std::int64_t i = 0; i < vocab; ++i) max = std::max<double>(max, x[i]);
          for (std::int64_t i = 0; i < vocab; ++i) sum += std::exp(x[i] - max);
          const double expected = x[targets[r]] - max - std::log(sum);
          EXPECT_NEAR(out[r], expected, 4e-7 + 1e-7 * std::abs(expected));
        }
      }
    }
  }
}

TEST(LogProbs, NonFiniteLogits) {
  CpuBackend cpu = make_cpu();
  const std::vector<float> logits{-kInf, 0, 0, -kInf, kNan, 1, 1, 1, -kInf, -kInf, -kInf, -kInf};
  std::vector<float> out(3);
  cpu.token_log_probs({const_cast<float*>(logits.data()), DType::float32, 3, 4}, 4, std::vector<std::int32_t>{1, 0, 2},
                      out);
  EXPECT_NEAR(out[0], std::log(0.5), 1e-6);
  EXPECT_TRUE(std::isnan(out[1]));
  EXPECT_TRUE(std::isnan(out[2]));
}

// ---- greedy ---------------------------------------------------------------------------------------------------------

TEST(Sampler, GreedyTakesTheLowestIdOfTheMaximum) {
  for (Isa isa : available_isas()) {
    std::vector<float> logits = random_logits(3000, 4);
    logits[2999] = logits[1500] = logits[1501] = 50;
    One one(logits, 2999, isa);
    one.assign(with([](auto& p) { p.temperature = 0; }));
    const auto chosen = one.sample();
    EXPECT_EQ(chosen.token, 1500);
    EXPECT_NEAR(chosen.logprob, std::log(0.5), 1e-5);
  }
}

TEST(Sampler, GreedyOverlooksWhatIsNoNumber) {
  One one({kNan, -kInf, 3, kNan, 2});
  one.assign(with([](auto& p) { p.temperature = 0; }));
  EXPECT_EQ(one.sample().token, 2);
  One infinite({0, kInf, 1, kInf});
  infinite.assign(with([](auto& p) { p.temperature = 0; }));
  EXPECT_EQ(infinite.sample().token, 1);
  infinite.assign({});
  EXPECT_EQ(infinite.support(), (std::set<std::int32_t>{1, 3}));
}

TEST(Sampler, ARowWithNothingToChooseFailsAlone) {
  CpuBackend cpu = make_cpu();
  const auto sampler = cpu.make_sampler(3, 2);
  const auto params = with([](auto& p) {
    p.temperature = 0;
    p.frequency_penalty = 1;
  });
  for (int row : {0, 1}) sampler->assign(row, params, 1, 0, std::vector<std::int32_t>{0}, {});
  const std::vector<std::int32_t> rows{0, 1};
  const std::vector<std::int64_t> positions{5, 6};
  std::vector<float> logits{0, 1, 0.5, kNan, -kInf, kNan};
  const backend::Matrix matrix{logits.data(), DType::float32, 2, 3};
  const auto failed = sample_step(cpu, *sampler, matrix, rows, positions);
  EXPECT_EQ(failed[0].token, 1);
  EXPECT_EQ(failed[0].failure, "");
  EXPECT_EQ(failed[1].token, -1);
  EXPECT_EQ(failed[1].failure, "sampling row 1 at position 6: all 3 logits are NaN or -inf");
  logits = {0, 1, 0.5, 0, 1, 0.5};
  const auto second = sample_step(cpu, *sampler, matrix, rows, positions);
  EXPECT_EQ(second[0].token, 2);  // token 1 was counted above
  EXPECT_EQ(second[1].token, 1);  // nothing was
  EXPECT_EQ(second[1].failure, "");

  One one({0, -kInf});
  one.assign(with([](auto& p) {
               p.min_tokens = 2;
               p.logprobs = 1;
             }),
             {0}, {0});
  const auto none = one.sample(7);
  EXPECT_EQ(none.token, -1);
  EXPECT_TRUE(none.top_logprobs.empty());
  EXPECT_EQ(none.failure,
            "sampling row 0 at position 7: logit_bias, min_tokens and penalties leave no token with a logit above "
            "-inf");
}

TEST(Sampler, ARowWithoutATokenIsNotFed) {
  One one({kNan, kNan});
  const std::vector<float> table{1, 2, 3, 4};
  const backend::LinearSource source{{{DType::float32, {2, 2}, reinterpret_cast<const std::byte*>(table.data())}}, {}};
  const auto weight = one.cpu.pack_linear(source, DType::float32);
  const std::vector<std::int32_t> offsets{0, 1}, slots{0};
  const std::vector<std::int64_t> positions{0};
  const backend::RaggedBatch batch{{}, offsets, slots, positions, one.sampler.get()};
  std::vector<float> r{7, 7};
  const auto embed = [&] { one.cpu.embed(*weight, batch, {r.data(), DType::float32, 1, 2}); };
  one.assign(with([](auto& p) { p.temperature = 0; }));
  EXPECT_THROW(embed(), InvalidArgument);  // nothing was sampled yet
  one.sample();
  EXPECT_THROW(embed(), InvalidArgument);
  EXPECT_EQ(r, (std::vector<float>{7, 7}));
  one.logits = {kNan, 1};
  one.sample();
  embed();
  EXPECT_EQ(r, (std::vector<float>{3, 4}));
}

// ---- distributions --------------------------------------------------------------------------------------------------

TEST(Sampler, DrawsFromTheSoftmax) {
  for (double temperature : {0.5, 1.0, 3.0}) {
    const auto logits = random_logits(20, 6, 1.5);
    One one(logits);
    one.assign(with([&](auto& p) { p.temperature = temperature; }));
    std::vector<double> scaled;
    for (float x : logits) scaled.push_back(x / temperature);
    expect_distribution(one.histogram(40000), softmax(scaled));
  }
}

TEST(Sampler, DrawsFromLargeVocabularies) {
  for (Isa isa : available_isas()) {
    std::vector<float> logits(50264, 0.0f);
    for (std::size_t i = 50257; i < logits.size(); ++i) logits[i] = 30;  // rows that are no tokens
    One one(logits, 50257, isa);
    one.assign({});
    std::vector<int> parts(13);
    for (int i = 0; i < 2500; ++i) {
      const auto token = one.sample(i).token;
      ASSERT_LT(token, 50257);
      ++parts[static_cast<std::size_t>(token / 4096)];
    }
    std::vector<double> p;
    for (int i = 0; i < 13; ++i) p.push_back(std::min(4096, 50257 - i * 4096) / 50257.0);
    expect_distribution(parts, p);
  }
}

TEST(Sampler, TinyAndHugeTemperatures) {
  One one({1, 1.0001f, 0, -5});
  one.assign(with([](auto& p) { p.temperature = 1e-300; }));
  EXPECT_EQ(one.support(200), (std::set<std::int32_t>{1}));
  one.assign(with([](auto& p) { p.temperature = 1e300; }));
  expect_distribution(one.histogram(8000), {0.25, 0.25, 0.25, 0.25});
}

// The tokens that may be drawn, by sorting.
std::set<std::int32_t> expected_support(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<double> scaled;
  for (float x : logits) scaled.push_back(x / params.temperature);
  std::vector<double> p = softmax(scaled);
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  const auto prob = [&](std::int32_t token) { return p[static_cast<std::size_t>(token)]; };
  std::erase_if(order, [&](auto t) { return prob(t) < params.min_p * prob(order[0]) || prob(t) == 0; });
  if (params.top_k > 0 && order.size() > static_cast<std::size_t>(params.top_k))
    order.resize(static_cast<std::size_t>(params.top_k));
  double total = 0, sum = 0;
  for (auto t : order) total += prob(t);
  std::set<std::int32_t> kept;
  for (auto t : order) {
    if (params.top_p < 1 && sum >= params.top_p * total) break;
    kept.insert(t);
    sum += prob(t);
  }
  return kept;
}

TEST(Sampler, KeepsExactlyTheRightTokens) {
  const std::vector<std::vector<float>> rows{random_logits(12, 7, 1),
                                             random_logits(12, 8, 3),
                                             {0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
                                             {3, 1, 3, 2, 3, -kInf, 2, 0, 3, 1}};
  for (const auto& logits : rows) {
    One one(logits);
    for (std::int64_t top_k : {-1, 0, 1, 2, 5, 100}) {
      for (double top_p : {1e-9, 0.33, 0.71, 0.97, 1.0}) {
        for (double min_p : {0.0, 0.05, 0.45, 1.0}) {
          for (double temperature : {0.7, 2.0}) {
            const auto params = with([&](auto& p) {
              p.top_k = top_k;
              p.top_p = top_p;
              p.min_p = min_p;
              p.temperature = temperature;
            });
            const auto expected = expected_support(logits, params);
            one.assign(params);
            const auto seen = one.support(1500);
            EXPECT_TRUE(std::includes(expected.begin(), expected.end(), seen.begin(), seen.end()))
                << top_k << " " << top_p << " " << min_p;
            if (temperature == 2.0 && logits[0] == 0) {
              EXPECT_EQ(seen, expected) << top_k << " " << top_p << " " << min_p;
            }
          }
        }
      }
    }
  }
}

TEST(Sampler, KeptTokensOfALargeVocabularyHaveTheRightDistribution) {
  // 20,000 tokens in 10 classes of equal logit: which class is drawn, and whether the cut falls in the right place.
  std::vector<float> logits(20000);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = -0.7f * static_cast<float>(i * 7919 % 10);
  One one(logits);
  for (const auto& [top_k, top_p, min_p] : std::vector<std::tuple<std::int64_t, double, double>>{{0, 0.9, 0},
                                                                                                 {2500, 1, 0},
                                                                                                 {3000, 0.5, 0},
                                                                                                 {0, 1, 0.2},
                                                                                                 {0, 0.6, 0.2},
                                                                                                 {19999, 0.999, 0},
                                                                                                 {0, 0.999, 0.001}}) {
    const auto params = with([&, k = top_k, p = top_p, m = min_p](auto& s) {
      s.top_k = k;
      s.top_p = p;
      s.min_p = m;
    });
    const auto kept = expected_support(logits, params);
    std::vector<double> weights(10);
    for (std::int32_t t : kept)
      weights[static_cast<std::size_t>(t) * 7919 % 10] += std::exp(logits[static_cast<std::size_t>(t)]);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& w : weights) w /= total;
    one.assign(params);
    std::vector<int> counts(10);
    for (int i = 0; i < 1000; ++i) {
      const auto token = one.sample(i).token;
      ASSERT_TRUE(kept.contains(token)) << token << " with " << top_k << " " << top_p << " " << min_p;
      ++counts[static_cast<std::size_t>(token) * 7919 % 10];
    }
    expect_distribution(counts, weights);
  }
}

TEST(Sampler, TopKOfOneIsGreedy) {
  One one(random_logits(5000, 9));
  one.assign(with([](auto& p) { p.temperature = 0; }));
  const auto greedy = one.sample().token;
  one.assign(with([](auto& p) { p.top_k = 1; }));
  EXPECT_EQ(one.support(50), (std::set<std::int32_t>{greedy}));
  one.assign(with([](auto& p) { p.top_p = 1e-6; }));
  EXPECT_EQ(one.support(50), (std::set<std::int32_t>{greedy}));
  one.assign(with([](auto& p) { p.min_p = 1; }));
  EXPECT_EQ(one.support(50), (std::set<std::int32_t>{greedy}));
}

// ---- what changes logits --------------------------------------------------------------------------------------------

TEST(Sampler, BiasMovesLogitsButNotLogprobs) {
  One one({0, 1, 2});
  one.assign(with([](auto& p) {
    p.temperature = 0;
    p.logit_bias = {{0, 2.5}, {2, -100}};
  }));
  const auto chosen = one.sample();
  EXPECT_EQ(chosen.token, 0);
  EXPECT_NEAR(chosen.logprob, std::log(softmax({0, 1, 2})[0]), 1e-6);
  one.assign(with([](auto& p) { p.logit_bias = {{1, std::log(4.0) - 1}, {2, -2}}; }));
  expect_distribution(one.histogram(20000), {1 / 6., 4 / 6., 1 / 6.});
}

TEST(Sampler, MinTokensHoldsStopIdsBack) {
  One one({0, 5, 3, 1});
  one.assign(with([](auto& p) {
               p.temperature = 0;
               p.min_tokens = 2;
             }),
             {0}, {1, 2, 50256, -1});  // the last two are no tokens here
  EXPECT_EQ(one.sample().token, 3);
  EXPECT_EQ(one.sample().token, 3);
  EXPECT_EQ(one.sample().token, 1);
}

TEST(Sampler, RepetitionPenaltyCountsPromptAndOutput) {
  One one({4, 3.5f, -1, -1.5f});
  one.assign(with([](auto& p) {
               p.temperature = 0;
               p.repetition_penalty = 2;
             }),
             {0, 0, 2});  // → {2, 3.5, −2, −1.5}
  EXPECT_EQ(one.sample().token, 1);
  EXPECT_EQ(one.sample().token, 0);  // {2, 1.75, …}
  EXPECT_EQ(one.sample().token, 0);

  One negative({-1, -1.5f});
  negative.assign(with([](auto& p) {
                    p.temperature = 0;
                    p.repetition_penalty = 2;
                  }),
                  {0});
  EXPECT_EQ(negative.sample().token, 1);  // −2, −1.5
  EXPECT_EQ(negative.sample().token, 0);  // −2, −3
}

TEST(Sampler, PresenceAndFrequencyCountOutputOnly) {
  One one({4, 3.5f, 2.2f});
  const auto presence = with([](auto& p) {
    p.temperature = 0;
    p.presence_penalty = 1;
  });
  one.assign(presence, {0, 0, 0});
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < 5; ++i) tokens.push_back(one.sample().token);
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{0, 1, 0, 0, 0}));  // 4 | 3, 3.5 | 3, 2.5 …
  const auto frequency = with([](auto& p) {
    p.temperature = 0;
    p.frequency_penalty = 1;
  });
  one.assign(frequency, {0, 0, 0});
  tokens.clear();
  for (int i = 0; i < 6; ++i) tokens.push_back(one.sample().token);
  EXPECT_EQ(tokens,
            (std::vector<std::int32_t>{0, 1, 0, 1, 2, 0}));  // 4 3.5 | 3 3.5 | 3 2.5 | 2 2.5 | 2 1.5 2.2 | 2 1.5 1.2
}

TEST(Sampler, PenaltiesComeBeforeTemperature) {
  One one({0, 0});
  int zeros = 0;
  const int draws = 4000;
  for (int i = 0; i < draws; ++i) {
    one.assign(with([](auto& p) {
                 p.repetition_penalty = std::exp(1.0);
                 p.temperature = 0.5;
                 p.logit_bias = {{0, 1}};
               }),
               {0});
    zeros += one.sample(i).token == 0;
  }
  const double p0 = 1 / (1 + std::exp(-2 * std::exp(-1.0)));  // logit 1/e over temperature ½
  EXPECT_NEAR(static_cast<double>(zeros) / draws, p0, 5 * std::sqrt(p0 * (1 - p0) / draws));
}

// ---- logprobs -------------------------------------------------------------------------------------------------------

TEST(Sampler, TopLogprobsAreOfTheRawLogits) {
  for (std::size_t size : {7u, 5000u}) {
    auto logits = random_logits(size, 12);
    logits[5] = logits[2];
    logits[1] = -kInf;
    One one(logits);
    for (int wanted : {0, 1, 3, 20, 10000}) {
      one.assign(with([&](auto& p) {
        p.logprobs = wanted;
        p.temperature = 0.1;
        p.logit_bias = {{3, 100}};
        p.top_k = 1;
      }));
      const auto chosen = one.sample();
      EXPECT_EQ(chosen.token, 3);
      const std::vector<double> p = softmax({logits.begin(), logits.end()});
      std::vector<std::int32_t> order(size);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
        return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
      });
      EXPECT_NEAR(chosen.logprob, std::log(p[3]), 1e-5);
      ASSERT_EQ(chosen.top_logprobs.size(), std::min(size, static_cast<std::size_t>(wanted)));
      for (std::size_t i = 0; i < chosen.top_logprobs.size(); ++i) {
        ASSERT_EQ(chosen.top_logprobs[i].token, order[i]);
        const double expected = std::log(p[static_cast<std::size_t>(order[i])]);
        if (std::isfinite(expected)) {
          EXPECT_NEAR(chosen.top_logprobs[i].logprob, expected, 1e-5);
        } else {
          EXPECT_EQ(chosen.top_logprobs[i].logprob, -kInf);
        }
      }
    }
  }
}

// ---- independence ---------------------------------------------------------------------------------------------------

TEST(Sampler, ChoicesDependOnSeedSequenceAndPositionAlone) {
  const std::int64_t vocab = 3000;
  const int count = 9;
  const auto logits = random_logits(static_cast<std::size_t>(count * vocab), 13, 1);
  const auto params_of = [](int i) {
    return with([&](auto& p) {
      p.temperature = 0.4 * (i % 4);
      if (i % 3 == 1) p.top_k = 40;
      if (i % 3 == 2) p.top_p = 0.8;
      if (i % 2 == 1) p.repetition_penalty = 1.3;
    });
  };
  // Alone, on one thread.
  std::vector<std::vector<std::int32_t>> alone;
  for (int i = 0; i < count; ++i) {
    CpuBackend cpu = make_cpu(choose_isa(), 1);
    const auto sampler = cpu.make_sampler(vocab, 1);
    sampler->assign(0, params_of(i), 42, static_cast<std::uint32_t>(i), std::vector<std::int32_t>{7}, {});
    alone.emplace_back();
    for (std::int64_t step = 0; step < 5; ++step) {
      auto row = std::vector<float>(logits.begin() + i * vocab, logits.begin() + (i + 1) * vocab);
      const std::vector<std::int32_t> rows{0};
      const std::vector<std::int64_t> positions{100 + step};
      alone.back().push_back(
          sample_step(cpu, *sampler, {row.data(), DType::float32, 1, vocab}, rows, positions)[0].token);
    }
  }
  // Together, in another order of rows.
  CpuBackend cpu = make_cpu(choose_isa(), 3);
  const auto sampler = cpu.make_sampler(vocab, 20);
  std::vector<std::int32_t> rows;
  for (int i = 0; i < count; ++i) {
    rows.push_back(19 - 2 * i);
    sampler->assign(rows.back(), params_of(i), 42, static_cast<std::uint32_t>(i), std::vector<std::int32_t>{7}, {});
  }
  for (std::int64_t step = 0; step < 5; ++step) {
    const std::vector<std::int64_t> positions(static_cast<std::size_t>(count), 100 + step);
    const auto chosen =
        sample_step(cpu, *sampler, {const_cast<float*>(logits.data()), DType::float32, count, vocab}, rows, positions);
    for (std::size_t i = 0; i < chosen.size(); ++i)
      EXPECT_EQ(chosen[i].token, alone[i][static_cast<std::size_t>(step)]);
  }
  EXPECT_GT(std::set<std::int32_t>(alone[3].begin(), alone[3].end()).size(), 1u);
}

TEST(Sampler, AssignRefusesAndKeepsTheRow) {
  One one({0, 1, 0});
  one.assign(with([](auto& p) {
    p.temperature = 0;
    p.presence_penalty = 2;
  }));
  EXPECT_EQ(one.sample().token, 1);
  EXPECT_THROW(one.assign(with([](auto& p) { p.temperature = -1; })), InvalidArgument);
  EXPECT_THROW(one.assign(with([](auto& p) { p.repetition_penalty = 2; }), {3}), InvalidArgument);
  EXPECT_THROW(one.assign(with([](auto& p) { p.logit_bias = {{3, 1.0}}; })), InvalidArgument);
  EXPECT_THROW(one.sampler->assign(1, {}, 0, 0, {}, {}), InvalidArgument);
  EXPECT_EQ(one.sample().token, 0);  // still penalised
}

// ---- validate -------------------------------------------------------------------------------------------------------

TEST(SamplingParamsTest, AcceptsTheEdgesOfEveryDomain) {
  EXPECT_NO_THROW(SamplingParams{}.validate(1));
  for (bool low : {true, false}) {
    EXPECT_NO_THROW(with([low](auto& p) {
                      p.n = low ? 1 : 1000;
                      p.max_tokens = low ? 1 : std::numeric_limits<std::int64_t>::max();
                      p.min_tokens = low ? 0 : p.max_tokens;
                      p.temperature = low ? 0 : 1e30;
                      p.top_p = low ? 1e-300 : 1;
                      p.top_k = low ? -1 : std::numeric_limits<std::int64_t>::max();
                      p.min_p = low ? 0 : 1;
                      p.repetition_penalty = low ? 1e-300 : 1e30;
                      p.presence_penalty = low ? -2 : 2;
                      p.frequency_penalty = low ? -2 : 2;
                      p.stop_token_ids = {low ? 0 : 99};
                      p.logprobs = low ? 0 : 1000000;
                      p.logit_bias = {{low ? 0 : 99, low ? -100.0 : 100.0}};
                    }).validate(100));
  }
}

TEST(SamplingParamsTest, RefusesEveryFieldOutsideItsDomain) {
  const auto refuses = [](auto&& change, const std::string& fragment) {
    try {
      with(change).validate(100);
      ADD_FAILURE() << "no exception: " << fragment;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(fragment), std::string::npos) << e.what();
    }
  };
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  refuses([](auto& p) { p.n = 0; }, "n is 0");
  refuses([](auto& p) { p.n = SamplingParams::kMaxSamples + 1; }, "n is 16385");
  refuses([](auto& p) { p.max_tokens = 0; }, "max_tokens is 0");
  refuses([](auto& p) { p.min_tokens = -1; }, "min_tokens is -1");
  refuses([](auto& p) { p.min_tokens = 17; }, "min_tokens is 17, expected 0 … max_tokens (16)");
  for (double bad : {-0.001, nan, inf, -inf}) {
    refuses([=](auto& p) { p.temperature = bad; }, "temperature is ");
    refuses([=](auto& p) { p.top_p = bad; }, "top_p is ");
    refuses([=](auto& p) { p.min_p = bad; }, "min_p is ");
    refuses([=](auto& p) { p.repetition_penalty = bad; }, "repetition_penalty is ");
  }
  refuses([](auto& p) { p.top_p = 0; }, "top_p is 0");
  refuses([](auto& p) { p.top_p = 1.5; }, "top_p is 1.5");
  refuses([](auto& p) { p.min_p = 1.5; }, "min_p is 1.5");
  refuses([](auto& p) { p.repetition_penalty = 0; }, "repetition_penalty is 0");
  refuses([](auto& p) { p.top_k = -2; }, "top_k is -2");
  for (double bad : {-2.1, 2.1, nan, inf}) {
    refuses([=](auto& p) { p.presence_penalty = bad; }, "presence_penalty is ");
    refuses([=](auto& p) { p.frequency_penalty = bad; }, "frequency_penalty is ");
  }
  for (std::int64_t bad : {-1, 100}) {
    refuses([=](auto& p) { p.stop_token_ids = {3, bad}; }, "stop_token_ids: an element is " + std::to_string(bad));
    refuses([=](auto& p) { p.logit_bias = {{bad, 1.0}}; }, "logit_bias: a key is " + std::to_string(bad));
  }
  refuses([](auto& p) { p.logprobs = -1; }, "logprobs is -1");
  for (double bad : {-100.5, 100.5, nan})
    refuses([=](auto& p) { p.logit_bias = {{7, bad}}; }, "logit_bias of token 7 is ");
}

}  // namespace
}  // namespace based::cpu
