// Which results depend on the rest of the batch: of the mixers none, to the bit, and of a deterministic model none.

#include <cstring>
#include <map>
#include <numeric>
#include <thread>

#include "based/error.h"
#include "based/session.h"
#include "io/state_file.h"
#include "mixed_step.h"

namespace based {
namespace {

using test::CudaTest;
using test::host_floats;
using test::kCuda;
using test::random_floats;
using test::random_tokens;
using test::saved_bytes;
using test::upload;
using Prompts = std::vector<std::vector<std::int32_t>>;

// ---- mixers --------------------------------------------------------------------------------------------------------

struct MixerCase {
  const char* name;
  DType dtype;
  MixerConfig config;
};

SlidingWindowConfig window_config() {
  SlidingWindowConfig window;
  window.num_heads = window.num_kv_heads = 4;
  window.head_dim = 32;
  window.window = 65;
  window.scale = 0.177;
  window.rotary_dim = 32;
  return window;
}

// Taps, their biases, A and D of a scan.
class ScanWeights {
 public:
  ScanWeights(backend::Backend& device, const SelectiveScanConfig& config) {
    const std::int64_t e = config.inner_size;
    for (const std::int64_t size : {e * config.kernel_size, e, e * config.state_size, e}) {
      std::vector<float> values = random_floats(static_cast<std::size_t>(size), 3);
      if (memory_.size() == 2)
        for (float& a : values) a = -std::exp(2 * a);
      memory_.push_back(upload(device, values, DType::float32));
    }
  }
  const float* at(std::size_t i) const { return static_cast<const float*>(memory_[i].data.get()); }

 private:
  std::vector<backend::Buffer> memory_;
};

class CudaMixerNeighbours : public CudaTest, public ::testing::WithParamInterface<MixerCase> {
 protected:
  // Bytes of one sequence's output and of its state after: tokens that depend on `seed` alone, in slot 1 of a batch
  // with sequences of `before` tokens before it and of `after` behind it.
  std::vector<std::byte> run(backend::Backend& device, const std::vector<std::int64_t>& calls,
                             const std::vector<std::int64_t>& before, const std::vector<std::int64_t>& after) {
    const MixerCase& c = GetParam();
    std::vector<std::int64_t> cols;  // of each of the mixer's inputs
    std::int64_t out_cols = 0;
    if (const auto* conv = std::get_if<GatedConvConfig>(&c.config)) {
      cols = {2 * conv->inner_size};
      out_cols = conv->inner_size;
    } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&c.config)) {
      cols = {linear->num_heads * (2 * linear->feature_dim + linear->head_dim)};
      out_cols = linear->num_heads * linear->head_dim;
    } else if (const auto* prefix = std::get_if<PrefixLinearAttentionConfig>(&c.config)) {
      cols = {prefix->num_heads * (2 * prefix->feature_dim + prefix->head_dim),
              prefix->num_heads * (prefix->feature_dim + prefix->head_dim)};
      out_cols = prefix->num_heads * prefix->head_dim;
    } else if (const auto* delta = std::get_if<GatedDeltaNetConfig>(&c.config)) {
      const std::int64_t heads = delta->num_heads;
      cols = {delta->channels() + heads * (1 + (delta->decay ? 1 : 0) + (delta->output_gate ? delta->head_dim : 0))};
      out_cols = heads * delta->head_dim;
    } else if (const auto* scan = std::get_if<SelectiveScanConfig>(&c.config)) {
      cols = {2 * scan->inner_size, 2 * scan->state_size, scan->inner_size, scan->inner_size};  // the last: for x
      out_cols = scan->inner_size;
    } else if (const auto* window = std::get_if<SlidingWindowConfig>(&c.config)) {
      cols = {(window->num_heads + 2 * window->num_kv_heads) * window->head_dim};
      out_cols = window->num_heads * window->head_dim;
    } else {
      const auto& full = std::get<FullAttentionConfig>(c.config);
      cols = {(full.num_heads + 2 * full.num_kv_heads) * full.head_dim};
      out_cols = full.num_heads * full.head_dim;
    }
    ModelConfig model = test::gpu_config();
    model.layers = {c.config};
    const auto neighbours = static_cast<int>(before.size() + after.size());
    const auto states = device.make_states(model, c.dtype, neighbours + 1);
    std::vector<std::byte> bytes;
    std::int64_t position = 0;
    for (std::size_t call = 0; call < calls.size(); ++call) {
      std::vector<std::int64_t> lengths = before;
      lengths.push_back(calls[call]);
      lengths.insert(lengths.end(), after.begin(), after.end());
      std::vector<std::int32_t> offsets{0}, slots;
      std::vector<std::int64_t> positions, after_call;
      std::vector<std::vector<float>> values(cols.size());
      for (std::size_t b = 0; b < lengths.size(); ++b) {
        const bool own = b == before.size();
        offsets.push_back(offsets.back() + static_cast<std::int32_t>(lengths[b]));
        slots.push_back(own ? 0 : static_cast<std::int32_t>(b) + (b < before.size() ? 1 : 0));
        positions.push_back(own ? position : 0);
        after_call.push_back(positions.back() + lengths[b]);
        for (std::size_t i = 0; i < cols.size(); ++i) {
          const auto mine = random_floats(static_cast<std::size_t>(lengths[b] * cols[i]),
                                          static_cast<std::uint32_t>(10'000 * i + (own ? call : 1000 + b)));
          values[i].insert(values[i].end(), mine.begin(), mine.end());
        }
      }
      const std::int64_t n = offsets.back();
      std::vector<backend::Buffer> in;
      for (const auto& matrix : values) in.push_back(upload(device, matrix, c.dtype));
      const auto input = [&](std::size_t i) { return backend::Matrix{in[i].data.get(), c.dtype, n, cols[i]}; };
      const backend::Buffer out = upload(device, std::vector<float>(static_cast<std::size_t>(n * out_cols)), c.dtype);
      const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
      const backend::RaggedBatch batch{tokens, offsets, slots, positions};
      const backend::Matrix x = input(0), y{out.data.get(), c.dtype, n, out_cols};
      device.reserve_states(*states, slots, after_call);
      device.begin(batch);
      if (const auto* conv = std::get_if<GatedConvConfig>(&c.config)) {
        const backend::Buffer taps = upload(
            device, random_floats(static_cast<std::size_t>(conv->inner_size * conv->kernel_size), 3), DType::float32);
        device.gated_conv(*conv, static_cast<const float*>(taps.data.get()), batch, x, *states, 0, y);
      } else if (const auto* linear = std::get_if<LinearAttentionConfig>(&c.config)) {
        device.linear_attention(*linear, batch, x, *states, 0, y);
      } else if (const auto* prefix = std::get_if<PrefixLinearAttentionConfig>(&c.config)) {
        device.prefix_linear_attention(*prefix, batch, x, input(1), *states, 0, y);
      } else if (const auto* delta = std::get_if<GatedDeltaNetConfig>(&c.config)) {
        std::vector<backend::Buffer> weights;
        for (const std::int64_t size :
             {delta->channels() * delta->kernel_size, delta->head_dim, delta->num_heads, delta->num_heads})
          weights.push_back(upload(device, random_floats(static_cast<std::size_t>(size), 3, 0.5f), DType::float32));
        const auto weight = [&](std::size_t i) { return static_cast<const float*>(weights[i].data.get()); };
        device.gated_delta_net(*delta, {weight(0), weight(1), weight(2), weight(3)}, batch, x, *states, 0, y);
      } else if (const auto* scan = std::get_if<SelectiveScanConfig>(&c.config)) {
        const ScanWeights weights(device, *scan);
        device.scan_conv(*scan, weights.at(0), weights.at(1), batch, x, *states, 0, input(3));
        device.selective_scan(*scan, {weights.at(2), weights.at(3), x, input(3), input(1), input(2)}, batch, *states, 0,
                              y);
      } else if (const auto* window = std::get_if<SlidingWindowConfig>(&c.config)) {
        device.sliding_window(*window, batch, x, *states, 0, y);
      } else {
        device.full_attention(std::get<FullAttentionConfig>(c.config), batch, x, *states, 0, y);
      }
      const std::size_t row = static_cast<std::size_t>(out_cols) * size_of(c.dtype), at = bytes.size();
      bytes.resize(at + static_cast<std::size_t>(calls[call]) * row);
      device.copy_to_host(
          bytes.data() + at,
          static_cast<const std::byte*>(out.data.get()) + static_cast<std::size_t>(offsets[before.size()]) * row,
          bytes.size() - at);
      position += calls[call];
    }
    const auto state = saved_bytes(device, *states, 0, position);
    bytes.insert(bytes.end(), state.begin(), state.end());
    return bytes;
  }
};

INSTANTIATE_TEST_SUITE_P(
    Mixers, CudaMixerNeighbours,
    ::testing::Values(
        MixerCase{"Taylor16Bfloat16", DType::bfloat16, LinearAttentionConfig{4, 16, 64, 1e-12}},
        MixerCase{"Taylor16Float32", DType::float32, LinearAttentionConfig{4, 16, 64, 1e-12}},
        MixerCase{"Taylor16Float16", DType::float16, LinearAttentionConfig{4, 16, 48, 1e-12}},
        MixerCase{"Taylor24Bfloat16", DType::bfloat16, LinearAttentionConfig{2, 24, 112, 1e-12}},
        MixerCase{"Taylor32Bfloat16", DType::bfloat16, LinearAttentionConfig{2, 32, 64, 1e-12}},
        MixerCase{"Taylor5Bfloat16", DType::bfloat16, LinearAttentionConfig{3, 5, 7, 1e-12}},
        MixerCase{"Prefix16Bfloat16", DType::bfloat16, PrefixLinearAttentionConfig{4, 16, 64, 1024, 1e-12}},
        MixerCase{"Prefix24Bfloat16", DType::bfloat16, PrefixLinearAttentionConfig{2, 24, 112, 1024, 1e-12}},
        MixerCase{"Prefix16Float32", DType::float32, PrefixLinearAttentionConfig{4, 16, 64, 1024, 1e-12}},
        // Few sequences have blocks of 16 columns, many have blocks of 32.
        MixerCase{"DeltaBfloat16", DType::bfloat16, GatedDeltaNetConfig{4, 64, 128, 4, 1e-5, true, true}},
        MixerCase{"DeltaFloat16", DType::float16, GatedDeltaNetConfig{2, 19, 33, 2, 1e-5, true, false}},
        MixerCase{"DeltaFloat32", DType::float32, GatedDeltaNetConfig{4, 128, 64, 4, 1e-5, false, true}},
        MixerCase{"WindowBfloat16", DType::bfloat16, window_config()},
        MixerCase{"WindowFloat32", DType::float32, window_config()},
        MixerCase{"FullBfloat16", DType::bfloat16, FullAttentionConfig{4, 2, 64, 0.125, false, false, 64}},
        MixerCase{"FullFloat32", DType::float32, FullAttentionConfig{4, 2, 32, 0.177, false, false, 32}},
        MixerCase{"FullOddBfloat16", DType::bfloat16, FullAttentionConfig{2, 1, 35, 0.17, false, false, 9}},
        MixerCase{"ConvBfloat16", DType::bfloat16, GatedConvConfig{64, 3, true}},
        MixerCase{"ConvFloat32", DType::float32, GatedConvConfig{30, 4, false}},
        // A few blocks alone, many beside others: each has a kernel of its own.
        MixerCase{"ScanBfloat16", DType::bfloat16, SelectiveScanConfig{512, 16, 4, 1, true, false}},
        MixerCase{"ScanFloat16", DType::float16, SelectiveScanConfig{130, 30, 3, 1, false, false}},
        MixerCase{"ScanFloat32", DType::float32, SelectiveScanConfig{37, 5, 7, 1, true, false}}),
    [](const auto& param) { return std::string(param.param.name); });

TEST_P(CudaMixerNeighbours, DoNotChangeABit) {
  const auto device = backend::make_backend(kCuda, 0);
  const std::vector<std::int64_t> many(300, 1), longs{700, 1, 2, 5000, 64}, uneven(40, 130);
  // A prompt that is cut into segments by itself, one that is not, and steps over more than a round of pending tokens.
  for (const std::vector<std::int64_t>& calls :
       {std::vector<std::int64_t>{5000, 1}, std::vector<std::int64_t>{2000, 37, 1, 1, 200},
        std::vector<std::int64_t>{3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2}}) {
    const auto alone = run(*device, calls, {}, {});
    EXPECT_EQ(run(*device, calls, {}, {1}), alone);
    EXPECT_EQ(run(*device, calls, longs, many), alone);
    EXPECT_EQ(run(*device, calls, uneven, {}), alone);
    EXPECT_EQ(run(*device, calls, many, longs), alone);
  }
}

// A scan walks from token to token: a step, and every cut of a prompt, gives the bits of the whole.
TEST_F(CudaTest, CutsOfAScanChangeNoBit) {
  const auto device = backend::make_backend(kCuda, 0);
  for (const auto& [dtype, config] : {std::pair{DType::bfloat16, SelectiveScanConfig{512, 16, 4, 1, true, false}},
                                      {DType::float32, SelectiveScanConfig{512, 16, 4, 1, true, false}},
                                      {DType::float16, SelectiveScanConfig{33, 9, 2, 1, false, false}},
                                      {DType::float32, SelectiveScanConfig{20, 200, 1, 1, true, false}}}) {
    SCOPED_TRACE(config.summary());
    const std::int64_t e = config.inner_size;
    constexpr std::int64_t kTokens = 150;
    const ScanWeights weights(*device, config);
    const backend::Buffer xz = upload(*device, random_floats(static_cast<std::size_t>(kTokens * 2 * e), 1), dtype),
                          x = upload(*device, random_floats(static_cast<std::size_t>(kTokens * e), 2), dtype),
                          dt = upload(*device, random_floats(static_cast<std::size_t>(kTokens * e), 3), dtype),
                          bc = upload(*device,
                                      random_floats(static_cast<std::size_t>(kTokens * 2 * config.state_size), 4),
                                      dtype),
                          out = upload(*device, std::vector<float>(static_cast<std::size_t>(kTokens * e)), dtype);
    const auto run = [&](const std::vector<std::int64_t>& cuts) {
      ModelConfig model = test::gpu_config();
      model.layers = {config};
      const auto states = device->make_states(model, dtype, 1);
      std::int64_t begin = 0;
      for (const std::int64_t end : cuts) {
        const auto n = end - begin;
        const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n)), slots{0};
        const std::vector<std::int32_t> offsets{0, static_cast<std::int32_t>(n)};
        const std::vector<std::int64_t> positions{begin};
        const backend::RaggedBatch batch{tokens, offsets, slots, positions};
        const auto rows = [&](const backend::Buffer& memory, std::int64_t cols) {
          auto* data = static_cast<std::byte*>(memory.data.get());
          return backend::Matrix{data + static_cast<std::size_t>(begin * cols) * size_of(dtype), dtype, n, cols};
        };
        device->begin(batch);
        device->scan_conv(config, weights.at(0), weights.at(1), batch, rows(xz, 2 * e), *states, 0, rows(x, e));
        device->selective_scan(
            config,
            {weights.at(2), weights.at(3), rows(xz, 2 * e), rows(x, e), rows(bc, 2 * config.state_size), rows(dt, e)},
            batch, *states, 0, rows(out, e));
        begin = end;
      }
      std::vector<std::byte> bytes(out.nbytes);
      device->copy_to_host(bytes.data(), out.data.get(), out.nbytes);
      const auto state = saved_bytes(*device, *states, 0, kTokens);
      bytes.insert(bytes.end(), state.begin(), state.end());
      return bytes;
    };
    const auto whole = run({kTokens});
    std::vector<std::int64_t> singles(kTokens);
    std::iota(singles.begin(), singles.end(), 1);
    EXPECT_EQ(run({1, kTokens}), whole);
    EXPECT_EQ(run({31, 32, 33, 97, kTokens}), whole);
    EXPECT_EQ(run(singles), whole);
  }
}

// ---- the count of tokens -------------------------------------------------------------------------------------------

class CudaCounts : public CudaTest, public ::testing::WithParamInterface<MixerCase> {};

INSTANTIATE_TEST_SUITE_P(Mixers, CudaCounts,
                         ::testing::Values(MixerCase{"Bulk", DType::bfloat16, LinearAttentionConfig{4, 16, 64, 1e-12}},
                                           MixerCase{"Large", DType::bfloat16,
                                                     LinearAttentionConfig{2, 32, 112, 1e-12}},
                                           MixerCase{"General", DType::float32, LinearAttentionConfig{3, 5, 7, 1e-12}}),
                         [](const auto& param) { return std::string(param.param.name); });

// Σ φ₀ in float32 stays at 2²⁴. A state that was saved so goes on with the right number.
TEST_P(CudaCounts, GoOnBeyondFloat32) {
  const auto& config = std::get<LinearAttentionConfig>(GetParam().config);
  const auto device = backend::make_backend(kCuda, 0);
  ModelConfig model = test::gpu_config();
  model.layers = {config};
  const std::int64_t heads = config.num_heads, features = config.num_features(), width = config.head_dim + 1;
  const std::int64_t cols = heads * (2 * config.feature_dim + config.head_dim);
  constexpr std::int64_t kStuck = std::int64_t{1} << 24, kSeen = 3 * (std::int64_t{1} << 23);

  const auto states = device->make_states(model, GetParam().dtype, 1);
  Tensor taylor = Tensor::empty(DType::float32, {heads, features, width});
  std::fill_n(taylor.data_as<float>(), taylor.size(), 0.0f);
  for (std::int64_t head = 0; head < heads; ++head) {
    float* first = taylor.data_as<float>() + head * features * width;  // [Σ v | Σ 1]
    std::fill_n(first, config.head_dim, 3 * static_cast<float>(kSeen));
    first[config.head_dim] = static_cast<float>(kStuck);
  }
  const std::string name = "layers.0.taylor";
  const std::vector<backend::NamedView> saved{{name, taylor.view()}};
  device->import_state(*states, 0, kSeen, saved);

  // q = k = 0: every feature but the first is 0, and y = Σ v / (count + eps) with v = 0 from here on.
  std::int64_t position = kSeen;
  const auto feed = [&](std::int64_t n) {
    const backend::Buffer in =
        upload(*device, std::vector<float>(static_cast<std::size_t>(n * cols)), GetParam().dtype);
    const backend::Buffer out =
        upload(*device, std::vector<float>(static_cast<std::size_t>(n * heads * config.head_dim)), GetParam().dtype);
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n)), slots{0};
    const std::vector<std::int32_t> offsets{0, static_cast<std::int32_t>(n)};
    const std::vector<std::int64_t> positions{position};
    const backend::RaggedBatch batch{tokens, offsets, slots, positions};
    device->begin(batch);
    device->linear_attention(config, batch, {in.data.get(), GetParam().dtype, n, cols}, *states, 0,
                             {out.data.get(), GetParam().dtype, n, heads * config.head_dim});
    position += n;
    std::vector<std::byte> bytes(out.nbytes);
    device->copy_to_host(bytes.data(), out.data.get(), out.nbytes);
    float y = 0;
    if (GetParam().dtype == DType::float32) {
      std::memcpy(&y, bytes.data(), sizeof(y));
    } else {
      std::uint32_t bits = 0;
      std::memcpy(reinterpret_cast<std::byte*>(&bits) + 2, bytes.data(), 2);
      std::memcpy(&y, &bits, sizeof(y));
    }
    EXPECT_NEAR(y, 3.0f, 0.02f);  // 4.5 with the count that was saved
  };
  const auto check = [&] {
    std::map<std::string, Tensor> tensors;
    for (const auto& [key, tensor] : device->export_state(*states, 0, position)) tensors.emplace(key, tensor);
    const std::int64_t pending =
        tensors.contains("layers.0.pending_keys") ? tensors.at("layers.0.pending_keys").shape()[0] : 0;
    if (pending == position - kSeen) return;  // nothing was added to the sums yet
    for (std::int64_t head = 0; head < heads; ++head)
      EXPECT_NEAR(tensors.at(name).data_as<float>()[head * features * width + config.head_dim],
                  static_cast<double>(position - pending), 2.0)
          << position;
  };
  for (int step = 0; step < 20; ++step) {
    feed(1);
    check();
  }
  for (const std::int64_t n : {300, 1, 2, 5000, 3}) {
    feed(n);
    check();
  }
}

// ---- whole models --------------------------------------------------------------------------------------------------

ModelConfig model_config(bool odd) {
  ModelConfig config = test::gpu_config();
  if (odd) return config;
  config.vocab_size = 500;
  config.padded_vocab_size = 504;
  config.hidden_size = 256;
  config.mlp = {true, Activation::silu, 512, false, false};
  config.layers = {GatedConvConfig{512, 3, true}, LinearAttentionConfig{4, 16, 64, 1e-12}, window_config()};
  config.eos_token_id.reset();
  return config;
}

struct ModelCase {
  const char* name;
  bool odd;
  DType dtype;
};

class CudaDeterministic : public CudaTest, public ::testing::WithParamInterface<ModelCase> {
 protected:
  std::shared_ptr<const Model> model() const {
    LoadOptions options = test::on(kCuda, GetParam().dtype);
    options.deterministic = true;
    return Model::random(model_config(GetParam().odd), 11, options);
  }
};

INSTANTIATE_TEST_SUITE_P(Models, CudaDeterministic,
                         ::testing::Values(ModelCase{"Bfloat16", false, DType::bfloat16},
                                           ModelCase{"Float16", false, DType::float16},
                                           ModelCase{"Float32", false, DType::float32},
                                           ModelCase{"OddSizesBfloat16", true, DType::bfloat16},
                                           ModelCase{"OddSizesFloat32", true, DType::float32}),
                         [](const auto& param) { return std::string(param.param.name); });

TEST_P(CudaDeterministic, NeighboursDoNotChangeABit) {
  const auto model = this->model();
  const auto row_of = [&](const Tensor& logits, int row) {
    const auto all = host_floats(logits);
    const auto cols = all.size() / static_cast<std::size_t>(logits.shape()[0]);
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(row) * cols);
    return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(cols));
  };
  const test::TemporaryFolder dir;
  constexpr int kSteps = 12;
  // The logits after a prompt, each step, and a second prompt, of a sequence with `neighbours` others.
  const auto run = [&](int neighbours) {
    const int batch = neighbours + 1, own = neighbours / 2;
    std::vector<std::vector<float>> rows;
    auto session = std::make_unique<Session>(model, batch);
    const auto prompts = [&](std::size_t length, std::uint32_t seed) {
      Prompts all;
      for (int b = 0; b < batch; ++b)
        all.push_back(
            b == own ? random_tokens(length, seed)
                     : random_tokens(1 + static_cast<std::size_t>(b * 37 % 190), 500u + static_cast<std::uint32_t>(b)));
      return all;
    };
    rows.push_back(row_of(session->prefill(prompts(150, 1)), own));
    for (std::uint32_t t = 0; t < kSteps; ++t) {
      auto tokens = random_tokens(static_cast<std::size_t>(batch), 900 + t);
      tokens[static_cast<std::size_t>(own)] = random_tokens(1, 40 + t)[0];
      rows.push_back(row_of(session->step(tokens), own));
      if (t == 5) session = session->fork();
      if (t == 8) {
        session->save_state(dir.path() / "state");
        session = std::make_unique<Session>(model, batch);
        session->load_state(dir.path() / "state");
      }
    }
    rows.push_back(row_of(session->prefill(prompts(77, 2)), own));
    return rows;
  };
  const auto alone = run(0);
  for (const int neighbours : {1, 7, 40, 300}) {
    const auto found = run(neighbours);
    for (std::size_t i = 0; i < alone.size(); ++i)
      EXPECT_EQ(std::memcmp(found[i].data(), alone[i].data(), alone[i].size() * sizeof(float)), 0)
          << neighbours << " neighbours, call " << i;
  }
}

TEST_P(CudaDeterministic, IsTheSameModel) {
  const auto plain = Model::random(model_config(GetParam().odd), 11, test::on(kCuda, GetParam().dtype));
  const auto tokens = random_tokens(300, 3);
  EXPECT_LE(test::relative_error(host_floats(model()->forward(tokens)), host_floats(plain->forward(tokens))),
            GetParam().dtype == DType::float32 ? 2e-5 : 3e-2);
}

TEST_F(CudaTest, RowsOfEqualPromptsAreEqual) {
  LoadOptions options = test::on(kCuda, DType::bfloat16);
  options.deterministic = true;
  const auto model = Model::random(model_config(false), 5, options);
  Session one(model, 1), many(model, 9);
  const std::vector<std::int32_t> prompt = random_tokens(5, 1);
  const auto want = host_floats(one.prefill(Prompts{prompt}));
  const auto found = host_floats(many.prefill(Prompts(9, prompt)));  // nine of the same
  for (std::size_t b = 0; b < 9; ++b)
    EXPECT_EQ(std::memcmp(found.data() + b * want.size(), want.data(), want.size() * sizeof(float)), 0) << b;
}

// ---- memory that others free ---------------------------------------------------------------------------------------

// Another thread lets go of logits while this one records steps on their stream.
TEST_F(CudaTest, TensorsMayBeFreedWhileAStepIsRecorded) {
  const auto model = Model::random(model_config(false), 5, test::on(kCuda, DType::bfloat16));
  const std::size_t workspace = model->memory().workspace;
  {
    Session session(model, 32);
    std::mutex mutex;
    std::vector<Tensor> handed;
    std::atomic<bool> done = false;
    std::thread other([&] {
      while (!done) {
        std::vector<Tensor> mine;
        {
          const std::lock_guard lock(mutex);
          mine.swap(handed);
        }
        std::this_thread::yield();
      }
    });
    for (int round = 0; round < 60; ++round) {
      const int count = 1 + round % 30;  // each number of rows is met several times, and recorded at the second
      std::vector<int> sequences(static_cast<std::size_t>(count));
      std::iota(sequences.begin(), sequences.end(), 0);
      Tensor logits =
          session.step(random_tokens(static_cast<std::size_t>(count), static_cast<std::uint32_t>(round)), sequences);
      const std::lock_guard lock(mutex);
      handed.push_back(std::move(logits));
    }
    done = true;
    other.join();
    for (const float x : host_floats(session.step(random_tokens(32, 99)))) EXPECT_TRUE(std::isfinite(x));
  }
  EXPECT_EQ(model->memory().workspace, workspace);
}

}  // namespace
}  // namespace based
