// A decode step takes no memory: what it needs is there before a state changes.

#include <gtest/gtest.h>

#include <memory>
#include <variant>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "model/transformer.h"
#include "operator_new.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::count_allocations;
using test::kReplacesNew;

TEST(StepMemory, TheCounterCounts) {
  if (!kReplacesNew) GTEST_SKIP() << "a sanitizer brings allocation functions of its own";
  std::unique_ptr<std::vector<int>> kept;
  EXPECT_EQ(count_allocations([&] { kept = std::make_unique<std::vector<int>>(3); }), 2);
  EXPECT_EQ(count_allocations([] {}), 0);
  cpu::CpuBackend backend(std::make_shared<cpu::ThreadPool>(1), cpu::choose_isa());
  for (const std::size_t nbytes : {std::size_t{100}, std::size_t{8} << 20})
    EXPECT_GT(count_allocations([&] { backend.allocate(nbytes, backend::MemoryKind::workspace); }), 0);
}

// A model on a backend of its own, fed directly.
class Stepper {
 public:
  Stepper(int threads, DType dtype, int capacity)
      : backend_(std::make_shared<cpu::ThreadPool>(threads), cpu::choose_isa()),
        transformer_([&] {
          RandomWeights weights(5);
          WeightLoader loader{backend_, weights, dtype};
          return Transformer(config(), loader);
        }()),
        states_(backend_.make_states(transformer_.config(), dtype, capacity)),
        sampler_(backend_.make_sampler(transformer_.config().vocab_size, capacity)),
        logits_(static_cast<std::size_t>(capacity * transformer_.config().padded_vocab_size)) {
    SamplingParams greedy;
    greedy.temperature = 0;
    for (int row = 0; row < capacity; ++row) sampler_->assign(row, greedy, 0, 0, {}, {});
  }

  std::size_t workspace_nbytes() const {
    return backend_.memory().nbytes[static_cast<std::size_t>(backend::MemoryKind::workspace)];
  }

  void prefill(int slot, std::int64_t count) {
    const auto tokens = test::random_tokens(static_cast<std::size_t>(count), 3);
    const std::int32_t offsets[] = {0, static_cast<std::int32_t>(count)}, slots[] = {slot};
    const std::int64_t positions[] = {0}, lengths[] = {count};
    backend_.reserve_states(*states_, slots, lengths);
    transformer_.hidden(backend_, {tokens, offsets, slots, positions}, *states_, workspace_, {});
  }

  // Steps slots 0 … rows − 1. Returns the allocations of the operations, with the token given and with the token that
  // the sampler chose.
  std::pair<int, int> step(std::int64_t rows, std::int64_t position) {
    std::vector<std::int32_t> tokens, offsets{0}, slots;
    for (std::int32_t i = 0; i < rows; ++i) {
      tokens.push_back(i);
      offsets.push_back(i + 1);
      slots.push_back(i);
    }
    std::vector<std::int64_t> positions(static_cast<std::size_t>(rows), position);
    backend_.reserve_states(*states_, slots, std::vector<std::int64_t>(static_cast<std::size_t>(rows), position + 2));
    const ModelConfig& config = transformer_.config();
    const backend::Matrix logits{logits_.data(), DType::float32, rows, config.padded_vocab_size};
    backend::RaggedBatch batch{tokens, offsets, slots, positions};
    const auto feed = [&] {
      transformer_.reserve(backend_, workspace_, rows);
      backend_.reserve_step(config, rows);
      return count_allocations([&] {
        backend_.begin(batch);
        const auto r = transformer_.hidden(backend_, batch, *states_, workspace_, {});
        const backend::Matrix x{workspace_.x.data.get(), transformer_.activation_dtype(), rows, config.hidden_size};
        transformer_.final_norm(backend_, r, {}, x);
        transformer_.logits(backend_, x, logits);
      });
    };
    const int given = feed();
    sampler_->sample(logits, batch);
    sampler_->take();
    ++position;
    batch.tokens = {};
    batch.chosen = sampler_.get();
    return {given, feed()};
  }

 private:
  // Its sequences are longer than other tests'.
  static ModelConfig config() {
    ModelConfig config = test::tiny_config();
    for (MixerConfig& layer : config.layers)
      if (auto* hyena = std::get_if<HyenaConfig>(&layer)) hyena->max_length = 1 << 14;
    return config;
  }

  cpu::CpuBackend backend_;
  Transformer transformer_;
  std::unique_ptr<backend::StatePool> states_;
  std::unique_ptr<backend::Sampler> sampler_;
  Workspace workspace_;
  std::vector<float> logits_;
};

TEST(StepMemory, OperationsOfAStepTakeNone) {
  if (!kReplacesNew) GTEST_SKIP() << "a sanitizer brings allocation functions of its own";
  for (const int threads : {1, 2, 5})
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      Stepper stepper(threads, dtype, 8);
      for (const std::int64_t rows : {1, 8, 3, 1}) {
        EXPECT_EQ(stepper.step(rows, 100), std::pair(0, 0)) << threads << " threads, " << rows << " rows";
        const std::size_t nbytes = stepper.workspace_nbytes();
        EXPECT_EQ(stepper.step(rows, 10'000), std::pair(0, 0));
        EXPECT_EQ(stepper.workspace_nbytes(), nbytes);
      }
    }
}

TEST(StepMemory, ThatOfAPromptServesSteps) {
  if (!kReplacesNew) GTEST_SKIP() << "a sanitizer brings allocation functions of its own";
  Stepper stepper(2, DType::float32, 2);
  stepper.prefill(0, 300);
  const std::size_t nbytes = stepper.workspace_nbytes();
  EXPECT_EQ(stepper.step(2, 300), std::pair(0, 0));
  EXPECT_EQ(stepper.workspace_nbytes(), nbytes);
}

}  // namespace
}  // namespace based
