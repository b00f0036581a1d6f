// Failures of sampling on a GPU belong to their row, though the host learns of them a step late.

#include <cmath>

#include "based/error.h"
#include "mixed_step.h"

namespace based {
namespace {

using test::CudaTest;
using test::MixedStep;
using test::saved_bytes;

class CudaFailedRows : public CudaTest, public ::testing::WithParamInterface<DType> {
 protected:
  static std::vector<float> logits(const std::vector<int>& nan_rows) {
    auto values = test::random_floats(MixedStep::kRows * MixedStep::kVocab, 6);
    for (const int row : nan_rows)
      for (std::int64_t i = 0; i < MixedStep::kVocab; ++i)
        values[static_cast<std::size_t>(row * MixedStep::kVocab + i)] = std::nanf("");
    return values;
  }
};

INSTANTIATE_TEST_SUITE_P(DTypes, CudaFailedRows, ::testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

TEST_P(CudaFailedRows, AreLeftAloneByLaterSteps) {
  const auto device = backend::make_backend(test::kCuda, 0);
  MixedStep mixed(*device, GetParam());
  SamplingParams params;
  params.temperature = 0;
  for (int row = 0; row < 4; ++row) mixed.sampler->assign(row, params, 0, 0, std::vector<std::int32_t>{0}, {});
  const std::vector<std::int32_t> slots{3, 1, 0, -1};  // row 1 of the logits is slot 1's, the last one fills up
  const auto check = [&](const std::vector<backend::SampledToken>& tokens, const std::string& failure) {
    for (const std::size_t b : {0u, 2u}) {
      EXPECT_GE(tokens[b].token, 0);
      EXPECT_EQ(tokens[b].failure, "");
    }
    EXPECT_EQ(tokens[1].token, failure.empty() ? tokens[1].token : -1);
    if (failure.empty())
      EXPECT_EQ(tokens[1].failure, "");
    else
      EXPECT_NE(tokens[1].failure.find(failure), std::string::npos) << tokens[1].failure;
  };

  mixed.sample({3, 1, 0}, 9);
  check(mixed.sampler->take(), "");
  mixed.step(slots, 10);  // unrecorded
  check(mixed.sampler->take(), "");
  const auto moved = [&](int slot, const std::vector<std::byte>& before) {
    return saved_bytes(*device, *mixed.states, slot, 11) != before;
  };

  mixed.set_logits(logits({1}));
  mixed.step(slots, 11);  // recorded; feeds slot 1 for the last time, and fails
  const auto failed = saved_bytes(*device, *mixed.states, 1, 11);
  for (std::int64_t position = 12; position < 22; ++position) {  // over a whole round of pending tokens
    const auto other = saved_bytes(*device, *mixed.states, 3, 11);
    mixed.set_logits(logits({}));  // not by its logits does it fail now
    mixed.step(slots, position);
    check(mixed.sampler->take(), position == 12 ? "all 100 logits are NaN or -inf" : "no token to go on from");
    EXPECT_FALSE(moved(1, failed)) << position;
    EXPECT_TRUE(moved(3, other)) << position;
  }
  check(mixed.sampler->take(), "sampling row 1 at position 22: the row has no token to go on from");

  // A row whose sequence is started anew advances again.
  mixed.sampler->assign(1, params, 0, 0, std::vector<std::int32_t>{0}, {});
  mixed.sample({3, 1, 0}, 22);
  check(mixed.sampler->take(), "");
  mixed.step(slots, 22);
  check(mixed.sampler->take(), "");
  EXPECT_TRUE(moved(1, failed));
}

// Tokens of a prompt beside those that were chosen on the device.
TEST_P(CudaFailedRows, AreLeftAloneBesidePrompts) {
  const auto device = backend::make_backend(test::kCuda, 0);
  MixedStep mixed(*device, GetParam());
  SamplingParams params;
  params.temperature = 0;
  for (int row = 0; row < 4; ++row) mixed.sampler->assign(row, params, 0, 0, std::vector<std::int32_t>{0}, {});
  mixed.set_logits(logits({1}));
  mixed.sample({3, 0}, 9);
  const auto chosen = mixed.sampler->take();
  ASSERT_EQ(chosen[0].failure, "");
  ASSERT_FALSE(chosen[1].failure.empty());
  const auto embedding = [&](std::int32_t token) {
    mixed.feed({token, token, token, token}, {0, 4}, {2}, 0);
    return mixed.residual();
  };
  std::vector<float> want;
  for (const std::int32_t token : {chosen[0].token, 5, 6, 0}) {  // what failed reads token 0
    const auto row = embedding(token);
    want.insert(want.end(), row.begin(), row.begin() + MixedStep::kHidden);
  }
  const auto state = [&](int slot) { return saved_bytes(*device, *mixed.states, slot, 11); };
  const auto ran = state(3), read = state(1), failed = state(0);
  mixed.feed({backend::kChosenToken, 5, 6, backend::kChosenToken}, {0, 1, 3, 4}, {3, 1, 0}, 10);
  EXPECT_EQ(mixed.residual(), want);
  EXPECT_NE(state(3), ran);
  EXPECT_NE(state(1), read);
  EXPECT_EQ(state(0), failed);
}

TEST_P(CudaFailedRows, DoNotChangeTheirNeighbours) {
  const auto device = backend::make_backend(test::kCuda, 0);
  MixedStep whole(*device, GetParam()), hurt(*device, GetParam());
  SamplingParams params;
  params.frequency_penalty = 1.5;
  params.logprobs = 3;
  const std::vector<std::int32_t> slots{0, 1, 2, 3};
  for (MixedStep* mixed : {&whole, &hurt}) {
    for (int row = 0; row < 4; ++row)
      mixed->sampler->assign(row, params, 7, static_cast<std::uint32_t>(row), std::vector<std::int32_t>{0}, {});
    mixed->set_logits(logits(mixed == &hurt ? std::vector<int>{2} : std::vector<int>{}));
    mixed->sample(slots, 9);
    mixed->sampler->take();
    for (std::int64_t position = 10; position < 20; ++position) mixed->step(slots, position), mixed->sampler->take();
    mixed->step(slots, 20);
  }
  const auto want = whole.sampler->take(), found = hurt.sampler->take();
  EXPECT_FALSE(found[2].failure.empty());
  for (const std::size_t b : {0u, 1u, 3u}) {
    EXPECT_EQ(found[b].failure, "");
    EXPECT_EQ(found[b].token, want[b].token);
    EXPECT_EQ(found[b].logprob, want[b].logprob);
    EXPECT_EQ(found[b].top_logprobs.size(), 3u);
    EXPECT_EQ(saved_bytes(*device, *hurt.states, static_cast<int>(b), 21),
              saved_bytes(*device, *whole.states, static_cast<int>(b), 21));
  }
}

TEST_F(CudaTest, ARowThatChoseNothingIsNotFed) {
  const auto device = backend::make_backend(test::kCuda, 0);
  MixedStep mixed(*device, DType::float32);
  const auto fresh = saved_bytes(*device, *mixed.states, 2, 0);
  mixed.step({2, -1, -1, -1}, 0);  // before anything was assigned or sampled
  EXPECT_NE(mixed.sampler->take()[0].failure.find("no token to go on from"), std::string::npos);
  EXPECT_EQ(saved_bytes(*device, *mixed.states, 2, 0), fresh);
}

}  // namespace
}  // namespace based
