// The CUDA device against the CPU's, through the public API: same seed, same weights, same results.

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "based/error.h"
#include "based/generation.h"
#include "based/session.h"
#include "cuda_test.h"
#include "filled_memory.h"

namespace based {
namespace {

using test::CudaTest;
using test::host_floats;
using test::kCuda;
using test::on;
using test::random_tokens;
using test::read_bytes;
using test::relative_error;
using test::TemporaryFolder;

using Prompts = std::vector<std::vector<std::int32_t>>;

// Mixers of the BASED models at sizes that the fast kernels take.
ModelConfig fast_config() {
  ModelConfig config = test::gpu_config();
  config.vocab_size = 500;
  config.padded_vocab_size = 504;
  config.hidden_size = 128;
  config.mlp = {true, Activation::silu, 256, false, false};
  SlidingWindowConfig window;
  window.num_heads = 4;
  window.num_kv_heads = 4;
  window.head_dim = 32;
  window.window = 129;
  window.scale = 0.177;
  window.rotary_dim = 32;
  config.layers = {GatedConvConfig{256, 3, true}, LinearAttentionConfig{4, 16, 32, 1e-12}, window,
                   GatedConvConfig{256, 3, true}, LinearAttentionConfig{2, 24, 64, 1e-12}};
  config.layers.push_back(SelectiveScanConfig{256, 16, 4, 8, true, false});
  config.layers.push_back(PrefixLinearAttentionConfig{4, 16, 32, 1, 1e-12});
  config.layers.push_back(GatedDeltaNetConfig{4, 32, 64, 4, 1e-2, true, true});
  config.layers.push_back(GatedDeltaNetConfig{1, 128, 40, 2, 1e-2, false, false});
  config.eos_token_id.reset();
  return config;
}

ModelConfig no_mlp_config() {
  ModelConfig config = fast_config();
  config.mlp.reset();
  return config;
}

// Rings whose memory is mapped as they fill: two of one length, which tests fill, and a third that they do not.
ModelConfig long_config() {
  ModelConfig config = fast_config();
  SlidingWindowConfig window = std::get<SlidingWindowConfig>(config.layers[2]);
  window.num_heads = window.num_kv_heads = 16;
  window.head_dim = 256;
  window.scale = 0.0625;
  window.window = 600;
  config.layers = {GatedConvConfig{256, 3, true}, window, LinearAttentionConfig{4, 16, 32, 1e-12}, window};
  window.num_heads = 2;
  window.num_kv_heads = 1;
  window.head_dim = 32;
  window.scale = 0.177;
  window.window = 131'072;
  config.layers.push_back(window);
  return config;
}

// Keys and values of all tokens: heads that the fast kernels take, and heads that they do not.
ModelConfig context_config() {
  ModelConfig config = fast_config();
  config.layers = {FullAttentionConfig{4, 2, 32, 0.177, true, false, 32}, GatedConvConfig{256, 3, true},
                   FullAttentionConfig{6, 3, 70, 0.12, false, true, 35}, LinearAttentionConfig{4, 16, 32, 1e-12},
                   FullAttentionConfig{2, 2, 128, 0.0884, false, false, 64}};
  return config;
}

// Of float32 arithmetic, and of 16-bit activations through five layers of a few dozen numbers each.
double tolerance(DType dtype) { return dtype == DType::float32 ? 2e-5 : dtype == DType::float16 ? 1e-2 : 6e-2; }

struct Case {
  const char* name;
  ModelConfig (*config)();
  DType dtype;
};

class CudaSmall : public CudaTest, public ::testing::WithParamInterface<Case> {
 protected:
  std::shared_ptr<const Model> cpu() const { return Model::random(GetParam().config(), 11); }
  std::shared_ptr<const Model> cuda() const {
    return Model::random(GetParam().config(), 11, on(kCuda, GetParam().dtype));
  }
  std::int64_t vocab() const { return GetParam().config().vocab_size; }
  void expect_close(const Tensor& a, const Tensor& b, double inherent = 0) const {
    EXPECT_LE(relative_error(host_floats(a), host_floats(b)), std::max(tolerance(GetParam().dtype), 4 * inherent));
  }
};

INSTANTIATE_TEST_SUITE_P(Models, CudaSmall,
                         ::testing::Values(Case{"OddSizesFloat32", test::gpu_config, DType::float32},
                                           Case{"OddSizesBfloat16", test::gpu_config, DType::bfloat16},
                                           Case{"OddSizesFloat16", test::gpu_config, DType::float16},
                                           Case{"FastSizesFloat32", fast_config, DType::float32},
                                           Case{"FastSizesBfloat16", fast_config, DType::bfloat16},
                                           Case{"FastSizesFloat16", fast_config, DType::float16},
                                           Case{"NoMlpFloat32", no_mlp_config, DType::float32},
                                           Case{"NoMlpBfloat16", no_mlp_config, DType::bfloat16},
                                           Case{"LongWindowsFloat32", long_config, DType::float32},
                                           Case{"LongWindowsBfloat16", long_config, DType::bfloat16},
                                           Case{"ContextFloat32", context_config, DType::float32},
                                           Case{"ContextBfloat16", context_config, DType::bfloat16},
                                           Case{"ContextFloat16", context_config, DType::float16}),
                         [](const auto& param) { return std::string(param.param.name); });

TEST_P(CudaSmall, EveryLayerMatchesTheCpu) {
  const auto tokens = random_tokens(200, 1, vocab());
  const LayerTrace a = cuda()->trace(tokens), b = cpu()->trace(tokens);
  // A mixer of few numbers may make much of a rounding: the CPU's bfloat16 shows how much. A GPU rounds what a mixer
  // reads of its projections, too: four matrices of a selective scan.
  const DType rounded = GetParam().dtype == DType::bfloat16 ? DType::bfloat16 : DType::float32;
  const LayerTrace c = Model::random(GetParam().config(), 11, on({}, rounded))->trace(tokens);
  expect_close(a.embed, b.embed);
  for (std::size_t i = 0; i < b.mixer_out.size(); ++i) {
    SCOPED_TRACE("layer " + std::to_string(i) + ", " + std::string(mixer_name(GetParam().config().layers[i])));
    expect_close(a.mixer_out[i], b.mixer_out[i],
                 relative_error(host_floats(c.mixer_out[i]), host_floats(b.mixer_out[i])));
    expect_close(a.block_out[i], b.block_out[i],
                 relative_error(host_floats(c.block_out[i]), host_floats(b.block_out[i])));
  }
  expect_close(a.final_norm, b.final_norm);
  expect_close(a.logits, b.logits);
}

TEST_P(CudaSmall, RaggedPrefillsAndStepsMatchTheCpu) {
  const auto on_cuda = cuda(), on_cpu = cpu();
  Session a(on_cuda, 5), b(on_cpu, 5);
  std::vector<std::size_t> lengths{300, 1, 70, 2, 513};
  for (int round = 0; round < 2; ++round) {  // the second after what the first left
    Prompts prompts;
    for (std::size_t i = 0; i < lengths.size(); ++i)
      prompts.push_back(
          random_tokens(lengths[i], static_cast<std::uint32_t>(10 * round) + static_cast<std::uint32_t>(i), vocab()));
    expect_close(a.prefill(prompts), b.prefill(prompts));
    std::swap(lengths[0], lengths[1]);
  }
  for (std::uint32_t t = 0; t < 6; ++t) {  // the first unrecorded, the second recorded, then replayed
    SCOPED_TRACE(t);
    const auto next = random_tokens(5, 40 + t, vocab());
    expect_close(a.step(next), b.step(next));
  }
  const std::vector<int> some{4, 0, 2};
  for (std::uint32_t t = 0; t < 3; ++t) {
    const auto next = random_tokens(3, 50 + t, vocab());
    expect_close(a.step(next, some), b.step(next, some));
  }
  EXPECT_EQ(a.num_tokens(), b.num_tokens());
}

TEST_P(CudaSmall, NothingIsReadBeforeItIsWritten) {
  for (const bool deterministic : {false, true}) {
    const auto results = [&](int fill) {
      return test::results_in_filled_memory(GetParam().config(), backend::make_backend(kCuda, 0, deterministic),
                                            GetParam().dtype, std::byte(fill));
    };
    EXPECT_EQ(results(0), results(0xff)) << deterministic;
  }
}

TEST_P(CudaSmall, CutsAndStatesAgree) {
  const auto model = cuda();
  const auto tokens = random_tokens(330, 1, vocab());
  const Tensor all = model->forward(tokens);
  const auto whole = host_floats(all);
  const auto cols = static_cast<std::ptrdiff_t>(all.shape()[1]);
  for (const std::size_t cut : {1u, 2u, 63u, 64u, 65u, 129u, 257u, 320u}) {
    SCOPED_TRACE(cut);
    Session session(model, 1);
    Tensor last = session.prefill(Prompts{{tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(cut)}});
    for (std::size_t t = cut; t < std::min(cut + 10, tokens.size()); ++t) last = session.step({&tokens[t], 1});
    const auto end = static_cast<std::ptrdiff_t>(std::min(cut + 10, tokens.size())) * cols;
    EXPECT_LE(relative_error(host_floats(last), {whole.begin() + end - cols, whole.begin() + end}),
              tolerance(GetParam().dtype));
  }
}

TEST_P(CudaSmall, StatesAreSavedForkedAndRolledBackBitForBit) {
  const auto model = cuda();
  Session session(model, 2);
  session.prefill(Prompts{random_tokens(150, 1, vocab()), random_tokens(9, 2, vocab())});
  const TemporaryFolder dir;
  session.save_state(dir.path() / "state");
  const auto fork = session.fork();
  const auto checkpoint = session.checkpoint();
  const auto next = random_tokens(2, 3, vocab());
  const auto want = host_floats(session.step(next));
  EXPECT_EQ(host_floats(fork->step(next)), want);
  session.rollback(*checkpoint);
  EXPECT_EQ(host_floats(session.step(next)), want);
  Session loaded(model, 2);
  loaded.load_state(dir.path() / "state");
  loaded.save_state(dir.path() / "again");
  EXPECT_EQ(read_bytes(dir.path() / "state"), read_bytes(dir.path() / "again"));
  EXPECT_EQ(host_floats(loaded.step(next)), want);
}

// A linear layer adds tokens to its sums kPendingTokens at a time. At every number of those that wait:
TEST_P(CudaSmall, PendingTokensAreSavedForkedAndRolledBackBitForBit) {
  const auto model = cuda();
  const TemporaryFolder dir;
  for (std::uint32_t pending = 0; pending <= 9; ++pending) {
    SCOPED_TRACE(pending);
    Session session(model, 2);
    session.prefill(Prompts{random_tokens(70, 1, vocab()), random_tokens(3, 2, vocab())});
    for (std::uint32_t t = 0; t < pending; ++t) session.step(random_tokens(2, 20 + t, vocab()));
    session.save_state(dir.path() / "state");
    const auto fork = session.fork();
    const auto checkpoint = session.checkpoint();
    // By steps across the end of the window, by a prompt, and by a prompt of one sequence and a step of the other.
    const auto go_on = [&](Session& which) {
      std::vector<float> all;
      const auto add = [&](const Tensor& logits) {
        const auto x = host_floats(logits);
        all.insert(all.end(), x.begin(), x.end());
      };
      for (std::uint32_t t = 0; t < 9; ++t) add(which.step(random_tokens(2, 50 + t, vocab())));
      add(which.prefill(Prompts{random_tokens(5, 3, vocab()), random_tokens(66, 4, vocab())}));
      for (std::uint32_t t = 0; t < 3; ++t) add(which.step(random_tokens(2, 60 + t, vocab())));
      add(which.prefill(Prompts{random_tokens(1, 5, vocab()), random_tokens(20, 6, vocab())}));
      add(which.step(random_tokens(2, 70, vocab())));
      return all;
    };
    const auto want = go_on(session);
    session.save_state(dir.path() / "end");
    const auto same = [&](Session& which) {
      EXPECT_EQ(go_on(which), want);
      which.save_state(dir.path() / "other_end");
      EXPECT_EQ(read_bytes(dir.path() / "other_end"), read_bytes(dir.path() / "end"));
    };
    same(*fork);
    session.rollback(*checkpoint);
    same(session);
    Session loaded(model, 2);
    loaded.step(random_tokens(2, 80, vocab()));  // to be forgotten
    loaded.load_state(dir.path() / "state");
    loaded.save_state(dir.path() / "again");
    EXPECT_EQ(read_bytes(dir.path() / "state"), read_bytes(dir.path() / "again"));
    same(loaded);
    session.rollback(*checkpoint);
    session.copy(0, 1);  // a sequence's tokens go with it
    const std::vector<std::int32_t> twice{3, 3};
    const auto logits = host_floats(session.step(twice));
    const auto half = static_cast<std::ptrdiff_t>(logits.size() / 2);
    EXPECT_EQ(std::vector<float>(logits.begin(), logits.begin() + half),
              std::vector<float>(logits.begin() + half, logits.end()));
  }
}

// Sequences of one batch that have stepped and waited differently; each as if alone, and as if fed at once.
TEST_P(CudaSmall, PendingTokensOfNeighboursDiffer) {
  const auto model = cuda();
  constexpr int kSequences = 9;
  std::vector<std::vector<std::int32_t>> tokens;
  Prompts prompts;
  for (std::uint32_t b = 0; b < kSequences; ++b) {
    tokens.push_back(random_tokens(60, b, vocab()));
    prompts.push_back({tokens[b].begin(), tokens[b].begin() + 2 + b});
  }
  Session session(model, kSequences);
  session.prefill(prompts);
  const auto seen = [&](int b) { return static_cast<std::size_t>(session.num_tokens()[static_cast<std::size_t>(b)]); };
  const auto cols = static_cast<std::ptrdiff_t>(host_floats(model->forward(tokens[0])).size() / 60);
  std::vector<float> found, want;
  for (int round = 0; round < 20; ++round) {
    std::vector<int> some;
    std::vector<std::int32_t> next;
    for (int b = 0; b < kSequences; ++b)
      if (round % (1 + b % 4) == 0) some.push_back(b), next.push_back(tokens[static_cast<std::size_t>(b)][seen(b)]);
    const auto logits = host_floats(session.step(next, some));
    found.insert(found.end(), logits.begin(), logits.end());
    for (const int b : some) {
      const auto& all = tokens[static_cast<std::size_t>(b)];
      const auto whole = host_floats(model->forward({all.data(), seen(b)}));
      want.insert(want.end(), whole.end() - cols, whole.end());
    }
  }
  EXPECT_LE(relative_error(found, want), tolerance(GetParam().dtype));
}

std::vector<std::vector<std::int32_t>> generate(const std::shared_ptr<const Model>& model,
                                                const std::vector<GenerationRequest>& requests, int max_batch_size) {
  std::vector<std::vector<std::int32_t>> out;
  std::size_t samples = 0;
  for (const auto& r : requests) samples = std::max<std::size_t>(samples, static_cast<std::size_t>(r.params.n));
  out.resize(requests.size() * samples);
  Generator generator(model, requests, max_batch_size);
  while (!generator.done())
    for (const TokenEvent& event : generator.next())
      out[static_cast<std::size_t>(event.request) * samples + static_cast<std::size_t>(event.sample)].push_back(
          event.token);
  return out;
}

TEST_P(CudaSmall, GeneratesWhatTheCpuGenerates) {
  std::vector<GenerationRequest> requests;
  for (std::uint32_t i = 0; i < 7; ++i) {
    SamplingParams params;
    params.seed = 5 + i;
    params.max_tokens = 12 + 3 * static_cast<std::int64_t>(i);
    params.temperature = i % 3 == 0 ? 0.0 : 0.9;
    if (i == 1) params.top_k = 20;
    if (i == 2) params.top_p = 0.8, params.n = 3;
    if (i == 4) params.min_p = 0.05, params.logprobs = 3;
    if (i == 5) params.repetition_penalty = 1.3, params.frequency_penalty = 0.2;
    if (i == 6) params.logit_bias = {{7, 3.0}, {9, -5.0}}, params.min_tokens = 4, params.stop_token_ids = {7, 11};
    requests.push_back({random_tokens(3 + 40 * i, i, vocab()), params});
  }
  // 16-bit roundings choose other tokens than the CPU's, the same ones each time.
  const bool exact = GetParam().dtype == DType::float32;
  for (const int batch : {1, 3, 16})
    EXPECT_EQ(generate(cuda(), requests, batch), generate(exact ? cpu() : cuda(), requests, batch));
}

TEST_P(CudaSmall, ASessionHasSeenWhatItsGeneratorReturned) {
  const auto model = cuda();
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = 9;
  params.ignore_eos = true;
  const auto prompt = random_tokens(20, 1, vocab());
  Session session(model, 1);
  std::vector<std::int32_t> said;
  {
    Generator generator(session, {{prompt, params}});
    while (!generator.done())
      for (const TokenEvent& event : generator.next()) said.push_back(event.token);
  }
  EXPECT_EQ(said.size(), 9u);
  EXPECT_EQ(session.num_tokens()[0], 29);
  Session other(model, 1);
  auto all = prompt;
  all.insert(all.end(), said.begin(), said.end());
  other.prefill(Prompts{all});
  const std::int32_t next[] = {3};
  EXPECT_LE(relative_error(host_floats(session.step(next)), host_floats(other.step(next))),
            tolerance(GetParam().dtype));

  // Ended from outside in the middle.
  Session third(model, 1);
  Generator generator(third, {{prompt, params}});
  std::int64_t returned = 0;
  while (returned < 4) returned += static_cast<std::int64_t>(generator.next().size());
  generator.finish(0, 0);
  EXPECT_TRUE(generator.done());
  EXPECT_EQ(third.num_tokens()[0], 20 + returned);
}

// Prompts shorter than the prefix, as long, longer, and cut behind it; beside them sequences that have begun before.
TEST_F(CudaTest, PrefixesAreReadAsAWhole) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (const PrefixLinearAttentionConfig& layer :
         {PrefixLinearAttentionConfig{4, 16, 32, 100, 1e-12}, PrefixLinearAttentionConfig{2, 24, 64, 4500, 1e-12},
          PrefixLinearAttentionConfig{3, 5, 7, 70, 1e-12}}) {
      SCOPED_TRACE(layer.summary() + " " + std::string(name_of(dtype)));
      ModelConfig config = fast_config();
      config.layers = {GatedConvConfig{256, 3, true}, layer};
      const auto cuda = Model::random(config, 11, on(kCuda, dtype)), cpu = Model::random(config, 11);
      Session a(cuda, 6), b(cpu, 6);
      const auto feed = [&](const std::vector<int>& sequences, const std::vector<std::size_t>& lengths) {
        Prompts prompts;
        for (std::size_t i = 0; i < lengths.size(); ++i)
          prompts.push_back(random_tokens(lengths[i], static_cast<std::uint32_t>(i + 10 * lengths[i]), 500));
        EXPECT_LE(
            relative_error(host_floats(a.prefill(prompts, sequences)), host_floats(b.prefill(prompts, sequences))),
            tolerance(dtype));
      };
      const auto step = [&](const std::vector<int>& sequences) {
        const auto next = random_tokens(sequences.size(), 7, 500);
        EXPECT_LE(relative_error(host_floats(a.step(next, sequences)), host_floats(b.step(next, sequences))),
                  tolerance(dtype));
      };
      feed({0, 1}, {5000, 30});
      step({0, 1});
      step({0, 1});
      step({0, 2});  // as many rows as were recorded, and a sequence that begins
      step({0, 3});
      feed({0, 4, 5}, {20, 1, 170});  // the others are inside their prefix: only steps may follow
      for (int t = 0; t < 10; ++t) step({0, 1, 2, 3, 4, 5});
    }
  }
}

TEST_F(CudaTest, StatesMoveBetweenDevices) {
  const auto cpu = Model::random(fast_config(), 11), cuda = Model::random(fast_config(), 11, on(kCuda));
  const auto prompt = random_tokens(200, 1, 500);
  const std::int32_t next[] = {3};
  const TemporaryFolder dir;
  Session a(cpu, 1), b(cuda, 1);
  a.prefill(Prompts{prompt});
  a.save_state(dir.path() / "state");
  b.load_state(dir.path() / "state");
  b.save_state(dir.path() / "back");
  EXPECT_EQ(read_bytes(dir.path() / "state"), read_bytes(dir.path() / "back"));
  EXPECT_LE(relative_error(host_floats(b.step(next)), host_floats(a.step(next))), 2e-5);
}

TEST_F(CudaTest, PendingTokensMoveBetweenDevices) {
  const auto cpu = Model::random(fast_config(), 11), cuda = Model::random(fast_config(), 11, on(kCuda));
  const TemporaryFolder dir;
  for (std::uint32_t pending = 0; pending < 8; ++pending) {
    SCOPED_TRACE(pending);
    Session a(cuda, 1), b(cpu, 1), c(cuda, 1);
    a.prefill(Prompts{random_tokens(40, 1, 500)});
    for (std::uint32_t t = 0; t < pending; ++t) a.step(random_tokens(1, 20 + t, 500));
    a.save_state(dir.path() / "cuda");
    b.load_state(dir.path() / "cuda");
    b.save_state(dir.path() / "cpu");
    c.load_state(dir.path() / "cpu");
    c.save_state(dir.path() / "back");
    EXPECT_EQ(read_bytes(dir.path() / "back"), read_bytes(dir.path() / "cpu"));
    for (std::uint32_t t = 0; t < 10; ++t) {
      const auto next = random_tokens(1, 50 + t, 500);
      const auto want = host_floats(a.step(next));
      EXPECT_LE(relative_error(host_floats(b.step(next)), want), 2e-5);
      EXPECT_LE(relative_error(host_floats(c.step(next)), want), 2e-5);
    }
  }
}

TEST_F(CudaTest, SessionsOfManyThreadsAndModelsAreIndependent) {
  const auto model = Model::random(fast_config(), 11, on(kCuda, DType::bfloat16));
  const auto second = Model::random(test::gpu_config(), 12, on(kCuda));
  const auto tokens = random_tokens(400, 1, 61);
  const auto want = host_floats(model->forward(tokens)), want_second = host_floats(second->forward(tokens));
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < 5; ++round) {
        const auto& mine = i % 2 == 0 ? model : second;
        EXPECT_EQ(host_floats(mine->forward(tokens)), i % 2 == 0 ? want : want_second);
      }
    });
  for (auto& thread : threads) thread.join();
}

TEST_F(CudaTest, RunningOutOfMemoryChangesNothing) {
  const auto model = Model::random(fast_config(), 11, on(kCuda));
  Session session(model, 1);
  const auto prompt = random_tokens(20, 1, 500);
  session.prefill(Prompts{prompt});
  try {
    const Session huge(model, 1 << 20);
    FAIL() << "no exception";
  } catch (const OutOfMemory& e) {
    EXPECT_NE(std::string(e.what()).find("bytes are needed"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("are free"), std::string::npos) << e.what();
  }
  EXPECT_EQ(session.num_tokens()[0], 20);
  const std::int32_t next[] = {3};
  session.step(next);
  const Session small(model, 8);
}

TEST_F(CudaTest, RefusesADeviceThatIsNotThere) {
  EXPECT_THROW(Model::random(fast_config(), 1, on({Device::Type::cuda, 99})), UnsupportedError);
}

// A fault ends the use of the device in its process, so the test has one of its own.
TEST_F(CudaTest, AFaultInAKernelSurfacesWithTheOperationsName) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto plant = [] {
    const auto backend = backend::make_backend(kCuda, 0);
    const backend::Buffer out = backend->allocate(1024, backend::MemoryKind::workspace);
    auto* nowhere = reinterpret_cast<float*>(std::uintptr_t{1} << 46);
    const backend::Matrix r{nowhere, DType::float32, 1, 256}, y{out.data.get(), DType::float32, 1, 256};
    try {
      backend->norm(NormKind::rms_norm, 1e-5, nowhere, nullptr, r, {}, y);
      backend->synchronize();
    } catch (const DeviceError& e) {
      std::fprintf(stderr, "%s\n", e.what());
      std::_Exit(7);
    }
    std::_Exit(0);
  };
  EXPECT_EXIT(plant(), ::testing::ExitedWithCode(7), "illegal memory access.*norm");
}

// Random operations on sessions of a model of its own.
void use_memory(std::uint32_t seed) {
  const auto model = Model::random(fast_config(), 1, on(kCuda));
  EXPECT_EQ(model->memory().weights, model->weight_nbytes());
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<Session>> sessions;
  for (int i = 0; i < 300; ++i) {
    const auto pick = sessions.empty() ? 0 : random() % sessions.size();
    const auto next = [&] {
      return random_tokens(static_cast<std::size_t>(sessions[pick]->batch_size()), random(), 500);
    };
    switch (sessions.empty() ? 0 : random() % 7) {
      case 0:
        sessions.push_back(std::make_unique<Session>(model, 1 + static_cast<int>(random() % 4)));
        break;
      case 1: {
        Prompts prompts;
        for (int b = 0; b < sessions[pick]->batch_size(); ++b)
          prompts.push_back(random_tokens(1 + random() % 150, random(), 500));
        sessions[pick]->prefill(prompts);
        break;
      }
      case 2:
        sessions[pick]->step(next());
        break;
      case 3:
        sessions.push_back(sessions[pick]->fork());
        break;
      case 4: {
        const auto checkpoint = sessions[pick]->checkpoint();
        sessions[pick]->step(next());
        sessions[pick]->rollback(*checkpoint);
        break;
      }
      default:
        sessions.erase(sessions.begin() + static_cast<std::ptrdiff_t>(pick));
    }
    std::size_t slots = 0;
    for (const auto& session : sessions) slots += static_cast<std::size_t>(session->batch_size());
    EXPECT_EQ(model->memory().states, slots * model->state_nbytes());
  }
}

using MakeConfig = ModelConfig (*)();

class CudaGrowing : public CudaTest, public ::testing::WithParamInterface<std::pair<const char*, MakeConfig>> {};

INSTANTIATE_TEST_SUITE_P(States, CudaGrowing,
                         ::testing::Values(std::pair("LongWindows", MakeConfig{long_config}),
                                           std::pair("Contexts", MakeConfig{context_config})),
                         [](const auto& param) { return std::string(param.param.first); });

// What is held is what state_nbytes() says, and a reset gives it back.
TEST_P(CudaGrowing, TakeMemoryAsTheyFill) {
  const auto model = Model::random(GetParam().second(), 5, on(kCuda, DType::bfloat16));
  const auto states = [&] { return static_cast<std::size_t>(model->memory().states); };
  const std::size_t full = model->state_nbytes();
  Session session(model, 3);
  const std::size_t fresh = states();
  EXPECT_EQ(fresh, session.state_nbytes());
  EXPECT_LT(fresh, full / 10);
  std::size_t held = fresh;
  for (std::uint32_t round = 0; round < 12; ++round) {  // 1 to 1,500 tokens: the rings of 600 are full after five
    SCOPED_TRACE(round);
    session.prefill(
        Prompts{random_tokens(1, round, 500), random_tokens(127, round, 500), random_tokens(20, round, 500)});
    EXPECT_EQ(states(), session.state_nbytes());
    EXPECT_GE(states(), held);
    held = states();
  }
  EXPECT_GT(held, fresh);
  EXPECT_LT(session.state_nbytes(), 3 * full);

  const auto fork = session.fork();
  EXPECT_EQ(states(), 2 * held);
  const auto state = session.snapshot(1);
  EXPECT_GT(state->nbytes(), session.snapshot(0)->nbytes());
  const TemporaryFolder folder;
  session.save_state(folder / "state");
  session.reset();
  EXPECT_EQ(session.state_nbytes(), fresh);
  EXPECT_EQ(states(), fresh + held + model->impl().state_nbytes_of(state->num_tokens()));
  session.load_state(folder / "state");
  session.restore(0, *state);
  for (std::uint32_t t = 0; t < 300; ++t) {  // recorded steps across the ends of mapped memory
    const auto next = random_tokens(3, 70 + t, 500);
    const auto a = host_floats(session.step(next)), b = host_floats(fork->step(next));
    const auto row = static_cast<std::ptrdiff_t>(a.size() / 3);
    ASSERT_TRUE(std::equal(a.begin() + row, a.end(), b.begin() + row)) << t;
  }
}

TEST_P(CudaGrowing, WhatDoesNotFitChangesNothing) {
  ModelConfig config = GetParam().second();  // 550 GB for 2²³ tokens
  LoadOptions options = on(kCuda, DType::bfloat16);
  for (MixerConfig& mixer : config.layers) {
    if (auto* window = std::get_if<SlidingWindowConfig>(&mixer); window != nullptr && window->window > 1000) {
      window->num_heads = window->num_kv_heads = 64;
      window->head_dim = 256;
      window->window = 1 << 23;
    } else if (auto* full = std::get_if<FullAttentionConfig>(&mixer)) {
      full->num_heads = full->num_kv_heads = 24;
      full->head_dim = 256;
      options.max_context = 1 << 23;
    }
  }
  const auto model = Model::random(config, 5, options);
  Session session(model, 2);
  session.prefill(Prompts{random_tokens(300, 1, 500), random_tokens(5, 2, 500)});
  const std::size_t held = model->memory().states;
  EXPECT_LT(held, std::size_t{1} << 30);
  const auto before = session.checkpoint();
  EXPECT_THROW(session.prefill(Prompts{random_tokens(4'000'000, 3, 500)}, std::vector<int>{0}), OutOfMemory);
  EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{300, 5}));
  EXPECT_EQ(session.snapshot(0), before->states()[0]);
  const auto fork = session.fork();
  const auto next = random_tokens(2, 9, 500);
  EXPECT_EQ(host_floats(session.step(next)), host_floats(fork->step(next)));
}

// The driver keeps memory for kernels and recorded steps when it first meets them; what leaks is lost in every round.
TEST_F(CudaTest, MemoryIsCountedAndComesBack) {
  std::vector<std::size_t> free;
  for (std::uint32_t round = 0; round < 8; ++round) {
    use_memory(round % 2);
    free.push_back(devices().at(1).free_nbytes);
  }
  EXPECT_EQ(free[5], free.back()) << ::testing::PrintToString(free);
  EXPECT_EQ(free[6], free.back());
}

}  // namespace
}  // namespace based
