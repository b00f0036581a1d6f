// The cache of states on a GPU: copies to the host and back, while another session records and replays steps.

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "based/session.h"
#include "cuda_test.h"
#include "session/state_cache.h"

namespace based {
namespace {

using test::CudaTest;
using test::kCuda;
using test::on;
using test::random_tokens;
using test::read_bytes;
using test::TemporaryFolder;

class CudaStateCacheSmall : public CudaTest, public ::testing::WithParamInterface<bool> {  // whether states grow
 protected:
  std::shared_ptr<const Model> make_model() const {
    ModelConfig config = test::gpu_config();
    if (GetParam()) config.layers.push_back(test::kFullAttention);
    return Model::random(config, 5, on(kCuda, DType::bfloat16));
  }
  std::string bytes_of(const State& state) const {
    state.save(folder_ / "state");
    return read_bytes(folder_ / "state");
  }

  const TemporaryFolder folder_;
};

TEST_P(CudaStateCacheSmall, CopiesAreBitForBit) {
  const auto model = make_model();
  StateCacheOptions options;
  options.device_nbytes = 3 * (model->state_nbytes(700) + 4096);
  options.host_nbytes = std::size_t{256} << 20;
  options.min_host_tokens = 1;
  options.folder = folder_ / "states";
  options.folder_nbytes = std::size_t{1} << 30;
  options.min_file_tokens = 100;
  options.write_delay = std::chrono::milliseconds(0);

  std::atomic<bool> done{false};
  std::thread runs([&] {
    while (!done) {
      Session session(model, 2);
      session.prefill({{random_tokens(30, 1), random_tokens(70, 2)}});
      for (std::int32_t i = 0; i < 40; ++i) session.step({{i, i}});
    }
  });

  struct Stored {
    std::vector<std::int32_t> tokens;
    std::string bytes;
  };
  std::vector<Stored> stored;
  {
    StateCache cache(model, options);
    for (std::uint32_t i = 0; i < 12; ++i) {
      Session session(model, 1);
      std::vector<std::int32_t> tokens = random_tokens(40 + 55 * i, i);
      session.prefill({{tokens}});
      for (std::uint32_t step = 0; step < i; ++step) {  // tokens that wait beside the sums
        tokens.push_back(static_cast<std::int32_t>(step));
        session.step({{tokens.back()}});
      }
      const auto state = session.snapshot(0);
      cache.insert(tokens, state);
      cache.flush();
      stored.push_back({tokens, bytes_of(*state)});
      EXPECT_LE(cache.stats().device.nbytes, options.device_nbytes);
      EXPECT_LE(cache.stats().host.nbytes, options.host_nbytes);
    }
    std::int64_t on_host = 0;
    for (const Stored& entry : stored) {
      const StateCache::Match match = cache.find(entry.tokens, std::ssize(entry.tokens));
      ASSERT_EQ(match.num_tokens, std::ssize(entry.tokens));
      EXPECT_TRUE(bytes_of(*match.state) == entry.bytes) << match.num_tokens;
      on_host += match.tier == CacheTier::host;
      cache.flush();
    }
    EXPECT_GE(on_host, 8);
    EXPECT_EQ(cache.stats().num_failed_copies, 0) << cache.stats().last_error;
  }
  StateCache cache(model, options);  // its files
  for (const Stored& entry : stored) {
    const StateCache::Match match = cache.find(entry.tokens, std::ssize(entry.tokens));
    if (std::ssize(entry.tokens) < options.min_file_tokens) continue;
    ASSERT_EQ(match.num_tokens, std::ssize(entry.tokens));
    EXPECT_TRUE(bytes_of(*match.state) == entry.bytes) << match.num_tokens;
  }
  EXPECT_GT(cache.stats().files.hit_tokens, 0);
  done = true;
  runs.join();
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaStateCacheSmall, ::testing::Bool());

}  // namespace
}  // namespace based
