// Every kind of mixer, found by its place in the variant: that its description, its loading, its operations, its state
// and its saved form agree, and that a device without its operation says so when a model is loaded.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "based/error.h"
#include "based/session.h"
#include "model/mixer.h"
#include "model/model_impl.h"
#include "tiny_model.h"

namespace based {
namespace {

// ---- examples, made from the descriptions ---------------------------------------------------------------------------

void set(std::int64_t& value, const domain::Integer& range) {
  value = std::clamp<std::int64_t>(2, range.low, range.high);
}
void set(std::int64_t& value, const domain::Divisor& divisor) { value = divisor.of; }
void set(std::int64_t& value, domain::HiddenSize) { value = test::tiny_config().hidden_size; }
void set(double& value, domain::Positive) { value = 0.5; }
void set(double& value, domain::NonNegative) { value = 0.5; }

// A config of the kind: every integer 2, or as near as its domain allows; every flag as given.
template <class Config>
Config example(bool flags) {
  Config config;
  config.fields([&](std::string_view, auto member, const auto& domain, std::string_view) {
    if constexpr (std::is_same_v<decltype(config.*member), bool&>)
      config.*member = flags;
    else
      set(config.*member, domain);
  });
  if constexpr (requires { config.max_length; }) config.max_length = 16;  // the tests feed 6 tokens
  return config;
}

ModelConfig model_of(const MixerConfig& mixer) {
  ModelConfig config = test::tiny_config();
  config.layers = {mixer, mixer};
  return config;
}

template <class Config>
class MixerKind : public testing::Test {};

template <class Variant>
struct AsTypes;
template <class... Configs>
struct AsTypes<std::variant<Configs...>> {
  using Types = testing::Types<Configs...>;
};
TYPED_TEST_SUITE(MixerKind, AsTypes<MixerConfig>::Types);

// Converts to anything: Config{Anything{}, …} compiles with as many of them as Config has fields.
struct Anything {
  template <class T>
  operator T() const;
};

template <class Config, class... Fields>
constexpr std::size_t count_members() {
  if constexpr (requires { Config{Fields{}..., Anything{}}; })
    return count_members<Config, Fields..., Anything>();
  else
    return sizeof...(Fields);
}

TYPED_TEST(MixerKind, DescribesEachOfItsFieldsOnce) {
  std::set<std::string_view> keys;
  std::size_t count = 0;
  TypeParam{}.fields([&](std::string_view key, auto, const auto&, std::string_view meaning) {
    keys.insert(key);
    ++count;
    EXPECT_FALSE(meaning.empty()) << key;
  });
  EXPECT_EQ(count, count_members<TypeParam>()) << "fields() of " << TypeParam::kName << " leaves out a member";
  EXPECT_EQ(keys.size(), count);
}

TYPED_TEST(MixerKind, IsReadAndWritten) {
  for (const bool flags : {false, true}) {
    const ModelConfig config = model_of(example<TypeParam>(flags));
    const std::string text = config.to_json();
    EXPECT_NE(text.find("\"mixer\": \"" + std::string(TypeParam::kName) + "\""), std::string::npos) << text;
    EXPECT_EQ(ModelConfig::from_json(text, "text"), config);
    EXPECT_EQ(ModelConfig::from_json(text, "text").to_json(), text);
  }
}

TYPED_TEST(MixerKind, RefusesEveryFieldOutsideItsDomain) {
  const auto refuse = [](const TypeParam& mixer, std::string_view key) {
    try {
      model_of(mixer).validate("x");
      ADD_FAILURE() << key << " was accepted";
    } catch (const FormatError& e) {
      EXPECT_NE(std::string(e.what()).find("layers[0]." + std::string(key) + ": found"), std::string::npos) << e.what();
    }
  };
  example<TypeParam>(false).fields([&](std::string_view key, auto member, const auto& domain, std::string_view) {
    TypeParam mixer = example<TypeParam>(false);
    if constexpr (requires { domain.high; }) {
      for (const std::int64_t bad : {domain.low - 1, domain.high + 1}) {
        mixer.*member = bad;
        refuse(mixer, key);
      }
    } else if constexpr (requires { domain.of; }) {
      for (const std::int64_t bad : {std::int64_t{0}, domain.of + 1}) {
        mixer.*member = bad;
        refuse(mixer, key);
      }
    } else if constexpr (std::is_same_v<std::decay_t<decltype(domain)>, domain::HiddenSize>) {
      for (const std::int64_t difference : {-1, 1}) {
        mixer.*member += difference;
        refuse(mixer, key);
        mixer.*member -= difference;
      }
    } else if constexpr (std::is_same_v<decltype(mixer.*member), double&>) {
      mixer.*member = -1;
      refuse(mixer, key);
    }
  });
}

// What a model takes from its weights.
struct Counter final : WeightSource {
  TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) override {
    shapes[name] = shape;
    elements += num_elements(shape);
    return random.take(name, shape);
  }
  void release() override { random.release(); }
  RandomWeights random{1};
  std::map<std::string, std::vector<std::int64_t>> shapes;
  std::int64_t elements = 0;
};

TYPED_TEST(MixerKind, LoadsTheWeightsThatItDescribes) {
  for (const bool flags : {false, true}) {
    const ModelConfig config = model_of(example<TypeParam>(flags));
    Counter counter;
    const Model::Impl impl(config, backend::make_backend({}, 1), counter, DType::float32);
    EXPECT_EQ(counter.elements, config.num_parameters());
    for (const Projection& p : mixer_projections(config.layers[0], config.hidden_size)) {
      const std::string name = "layers.1.mixer." + std::string(p.name);
      EXPECT_EQ(counter.shapes.at(name + ".weight"), (std::vector<std::int64_t>{p.rows, p.cols})) << name;
      EXPECT_EQ(counter.shapes.contains(name + ".bias"), p.bias) << name;
      if (p.bias) {
        EXPECT_EQ(counter.shapes.at(name + ".bias"), std::vector<std::int64_t>{p.rows}) << name;
      }
    }
    for (const Parameter& p : mixer_parameters(config.layers[0]))
      EXPECT_EQ(counter.shapes.at("layers.1.mixer." + std::string(p.name)), p.shape);
  }
}

TYPED_TEST(MixerKind, RunsAndItsStateIsAsDescribed) {
  const ModelConfig config = model_of(example<TypeParam>(true));
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    LoadOptions options;
    options.num_threads = 2;
    options.dtype = dtype;
    const auto model = Model::random(config, 7, options);
    const auto backend = backend::make_backend({}, 2);
    const std::size_t slot = backend->make_states(config, dtype, 1)->nbytes_per_slot();
    EXPECT_EQ(model->max_context().has_value(), config.max_tokens() || model->state_nbytes(1) > slot);
    if (model->state_nbytes(1) > slot) {
      EXPECT_EQ(model->state_nbytes(0), slot);
      EXPECT_GT(model->state_nbytes(1), slot);
      EXPECT_GE(model->state_nbytes(), model->state_nbytes(1));
    } else {
      EXPECT_EQ(model->state_nbytes(), slot);
    }

    Session session(model, 1);
    const std::vector<std::vector<std::int32_t>> prompts{test::random_tokens(5, 3)};
    const std::vector<std::int32_t> token{4};
    session.prefill(prompts);
    session.step(token);
    const test::TemporaryFolder folder;
    session.save_state(folder / "state");

    // The saved tensors are those of the description.
    const auto file = io::SafetensorsFile::open(folder / "state");
    std::size_t count = 0;
    for (std::size_t i = 0; i < config.layers.size(); ++i)
      for (const StateTensor& tensor : state_tensors(mixer_state(config.layers[i]))) {
        const auto it =
            file->tensors().find("sequences.0.layers." + std::to_string(i) + "." + std::string(tensor.name));
        if (tensor.kind == StateKind::pending) {  // the CPU leaves none
          EXPECT_EQ(it, file->tensors().end()) << tensor.name;
          continue;
        }
        ASSERT_NE(it, file->tensors().end()) << tensor.name;
        std::vector<std::int64_t> shape = tensor.shape;
        if (tensor.kind == StateKind::ring) shape[0] = std::min<std::int64_t>(6, shape[0]);
        if (tensor.kind == StateKind::context) shape[0] = 6;
        EXPECT_EQ(it->second.shape, shape) << tensor.name;
        EXPECT_EQ(it->second.dtype, tensor.dtype == StateDType::model ? dtype : DType::float32) << tensor.name;
        ++count;
      }
    EXPECT_EQ(std::ranges::count_if(file->tensors(),
                                    [](const auto& entry) { return entry.first.starts_with("sequences.0.layers."); }),
              count);

    // A session that loads it goes on with the same bits.
    Session other(model, 1);
    other.load_state(folder / "state");
    EXPECT_EQ(test::floats(other.step(token)), test::floats(session.step(token)));
    other.save_state(folder / "again");
    session.save_state(folder / "state");
    EXPECT_EQ(test::read_bytes(folder / "again"), test::read_bytes(folder / "state"));
  }
}

// ---- devices --------------------------------------------------------------------------------------------------------

TYPED_TEST(MixerKind, IsImplementedOnTheCpu) { EXPECT_TRUE(cpu::CpuBackend::implements(TypeParam{})); }

// The CPU, without an operation for sliding windows.
class WithoutWindows final : public backend::DeviceBackend<WithoutWindows> {
 public:
  std::unique_ptr<backend::Backend> sibling() const override { return std::make_unique<WithoutWindows>(); }
  void trim() noexcept override {}
  Device device() const override { return cpu_.device(); }
  const backend::MemoryCounters& memory() const override { return cpu_.memory(); }
  int num_threads() const override { return 1; }
  std::string kernel_isa() const override { return cpu_.kernel_isa(); }
  bool deterministic() const override { return cpu_.deterministic(); }
  std::shared_ptr<void> allocate_host(std::size_t nbytes) const override { return cpu_.allocate_host(nbytes); }
  bool shares_host_memory() const override { return cpu_.shares_host_memory(); }
  DType activation_dtype(DType weights) const override { return cpu_.activation_dtype(weights); }
  DType projection_dtype(DType weights) const override { return cpu_.projection_dtype(weights); }
  std::int64_t chunk_tokens() const override { return cpu_.chunk_tokens(); }
  backend::Buffer allocate(std::size_t nbytes, backend::MemoryKind kind) override {
    return cpu_.allocate(nbytes, kind);
  }
  void zero(void* data, std::size_t nbytes) override { cpu_.zero(data, nbytes); }
  void copy(void* to, const void* from, std::size_t nbytes) override { cpu_.copy(to, from, nbytes); }
  void copy_from_host(void* to, const void* from, std::size_t nbytes) override {
    cpu_.copy_from_host(to, from, nbytes);
  }
  void copy_to_host(void* to, const void* from, std::size_t nbytes) override { cpu_.copy_to_host(to, from, nbytes); }
  void synchronize() override {}
  std::shared_ptr<const backend::Point> point() override { return nullptr; }
  void begin(const backend::RaggedBatch&) override {}
  std::int64_t step_rows(std::int64_t num_sequences) const override { return num_sequences; }
  void replay(const backend::StepKey&, const std::function<void()>& operations) override { operations(); }
  bool asynchronous() const override { return false; }
  std::shared_ptr<const backend::LinearWeight> pack_linear(const backend::LinearSource& source, DType dtype) override {
    return cpu_.pack_linear(source, dtype);
  }
  backend::Buffer pack_float32(const TensorView& tensor) override { return cpu_.pack_float32(tensor); }
  void embed(const backend::LinearWeight& table, const backend::RaggedBatch& batch, const backend::Matrix& r) override {
    cpu_.embed(table, batch, r);
  }
  void norm(NormKind kind, double eps, const float* weight, const float* bias, const backend::Matrix& r,
            std::span<const std::int32_t> rows, const backend::Matrix& out) override {
    cpu_.norm(kind, eps, weight, bias, r, rows, out);
  }
  void linear(const backend::LinearWeight& weight, const backend::Matrix& x, const backend::Matrix& y,
              bool accumulate) override {
    cpu_.linear(weight, x, y, accumulate);
  }
  void gated_conv(const GatedConvConfig& config, const float* taps, const backend::RaggedBatch& batch,
                  const backend::Matrix& u, backend::StatePool& states, int layer,
                  const backend::Matrix& out) override {
    cpu_.gated_conv(config, taps, batch, u, states, layer, out);
  }
  void linear_attention(const LinearAttentionConfig& config, const backend::RaggedBatch& batch,
                        const backend::Matrix& qkv, backend::StatePool& states, int layer,
                        const backend::Matrix& out) override {
    cpu_.linear_attention(config, batch, qkv, states, layer, out);
  }
  void full_attention(const FullAttentionConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.full_attention(config, batch, qkv, states, layer, out);
  }
  void scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                 const backend::RaggedBatch& batch, const backend::Matrix& xz, backend::StatePool& states, int layer,
                 const backend::Matrix& x) override {
    cpu_.scan_conv(config, taps, bias, batch, xz, states, layer, x);
  }
  void selective_scan(const SelectiveScanConfig& config, const backend::ScanOperands& operands,
                      const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
                      const backend::Matrix& out) override {
    cpu_.selective_scan(config, operands, batch, states, layer, out);
  }
  void prefix_linear_attention(const PrefixLinearAttentionConfig& config, const backend::RaggedBatch& batch,
                               const backend::Matrix& qkv, const backend::Matrix& encoder, backend::StatePool& states,
                               int layer, const backend::Matrix& out) override {
    cpu_.prefix_linear_attention(config, batch, qkv, encoder, states, layer, out);
  }
  void gated_delta_net(const GatedDeltaNetConfig& config, const backend::DeltaOperands& operands,
                       const backend::RaggedBatch& batch, const backend::Matrix& u, backend::StatePool& states,
                       int layer, const backend::Matrix& out) override {
    cpu_.gated_delta_net(config, operands, batch, u, states, layer, out);
  }
  void rwkv4_shift(const Rwkv4Config& config, const std::array<const float*, 3>& mix, const backend::RaggedBatch& batch,
                   const backend::Matrix& x, backend::StatePool& states, int layer,
                   const std::array<backend::Matrix, 3>& mixed) override {
    cpu_.rwkv4_shift(config, mix, batch, x, states, layer, mixed);
  }
  void rwkv4(const Rwkv4Config& config, const backend::Rwkv4Operands& operands, const backend::RaggedBatch& batch,
             backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.rwkv4(config, operands, batch, states, layer, out);
  }
  void h3(const H3Config& config, const backend::H3Operands& operands, const backend::RaggedBatch& batch,
          const backend::Matrix& qkv, backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.h3(config, operands, batch, qkv, states, layer, out);
  }
  void hyena(const HyenaConfig& config, const backend::HyenaOperands& operands, const backend::RaggedBatch& batch,
             const backend::Matrix& u, backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.hyena(config, operands, batch, u, states, layer, out);
  }
  void mamba2(const Mamba2Config& config, const backend::Mamba2Operands& operands, const backend::RaggedBatch& batch,
              backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.mamba2(config, operands, batch, states, layer, out);
  }
  void gated_linear_attention(const GatedLinearAttentionConfig& config, const float* norm,
                              const backend::RaggedBatch& batch, const backend::Matrix& u, const backend::Matrix& a,
                              backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.gated_linear_attention(config, norm, batch, u, a, states, layer, out);
  }
  void rwkv7_shift(const Rwkv7Config& config, const std::array<const float*, 6>& mix, const backend::RaggedBatch& batch,
                   const backend::Matrix& x, backend::StatePool& states, int layer,
                   const std::array<backend::Matrix, 6>& mixed) override {
    cpu_.rwkv7_shift(config, mix, batch, x, states, layer, mixed);
  }
  void rwkv7_low_rank(const Rwkv7Config& config, const backend::Matrix& w, const backend::Matrix& g) override {
    cpu_.rwkv7_low_rank(config, w, g);
  }
  void rwkv7(const Rwkv7Config& config, const backend::Rwkv7Operands& operands, const backend::RaggedBatch& batch,
             backend::StatePool& states, int layer, const backend::Matrix& out) override {
    cpu_.rwkv7(config, operands, batch, states, layer, out);
  }
  void token_log_probs(const backend::Matrix& logits, std::int64_t vocab_size, std::span<const std::int32_t> targets,
                       std::span<float> out) override {
    cpu_.token_log_probs(logits, vocab_size, targets, out);
  }
  std::unique_ptr<backend::Sampler> make_sampler(std::int64_t vocab_size, int num_rows) override {
    return cpu_.make_sampler(vocab_size, num_rows);
  }
  std::size_t state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens) const override {
    return cpu_.state_nbytes(config, dtype, num_tokens);
  }
  std::unique_ptr<backend::StatePool> make_states(const ModelConfig& config, DType dtype, int capacity) override {
    return cpu_.make_states(config, dtype, capacity);
  }
  void reserve_states(backend::StatePool& states, std::span<const std::int32_t> slots,
                      std::span<const std::int64_t> num_tokens) override {
    cpu_.reserve_states(states, slots, num_tokens);
  }
  void copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot,
                  std::int64_t num_tokens) override {
    cpu_.copy_state(from, from_slot, to, to_slot, num_tokens);
  }
  std::vector<backend::MemoryPiece> state_pieces(const backend::StatePool& states, int slot,
                                                 std::int64_t num_tokens) const override {
    return cpu_.state_pieces(states, slot, num_tokens);
  }
  void reset_state(backend::StatePool& states, int slot) override { cpu_.reset_state(states, slot); }
  std::vector<backend::NamedTensor> export_state(const backend::StatePool& states, int slot,
                                                 std::int64_t num_tokens) override {
    return cpu_.export_state(states, slot, num_tokens);
  }
  void import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                    std::span<const backend::NamedView> tensors) override {
    cpu_.import_state(states, slot, num_tokens, tensors);
  }

 private:
  cpu::CpuBackend cpu_{std::make_shared<cpu::ThreadPool>(1), cpu::choose_isa()};
};

TEST(Devices, SupportTheMixersWhoseOperationsTheyImplement) {
  const WithoutWindows device;
  EXPECT_TRUE(device.supports(GatedConvConfig{}));
  EXPECT_TRUE(device.supports(LinearAttentionConfig{}));
  EXPECT_FALSE(device.supports(SlidingWindowConfig{}));
}

TEST(Devices, RefuseAModelWithAMixerThatTheyLack) {
  const auto load = [](const ModelConfig& config) {
    RandomWeights weights(1);
    const Model::Impl impl(config, std::make_unique<WithoutWindows>(), weights, DType::float32);
  };
  ModelConfig config = test::tiny_config();
  EXPECT_THROW_WITH(load(config), UnsupportedError,
                    "layers[2]: the mixer sliding_window is not implemented on cpu: run the model on another device");
  config.layers.erase(config.layers.begin() + 2);
  EXPECT_NO_THROW(load(config));
}

TEST(Devices, AnOperationThatTheyLackThrows) {
  WithoutWindows device;
  const ModelConfig config = test::tiny_config();
  const auto states = device.make_states(config, DType::float32, 1);
  EXPECT_THROW_WITH(device.sliding_window(SlidingWindowConfig{}, {}, {}, *states, 2, {}), UnsupportedError,
                    "the mixer sliding_window is not implemented on cpu");
}

// A layer of 2²⁴ keys and values of 4,096 numbers: half a terabyte.
TEST(Models, AreLoadedWithoutMemoryForAState) {
  ModelConfig config = test::tiny_config();
  SlidingWindowConfig window = example<SlidingWindowConfig>(false);
  window.num_heads = window.num_kv_heads = 64;
  window.head_dim = 64;
  window.window = limits::kSize;
  config.layers = {window};
  const auto model = Model::random(config, 1, {});
  EXPECT_EQ(model->state_nbytes(), std::size_t{2} * 64 * 64 * limits::kSize * sizeof(float));
  EXPECT_EQ(model->memory().states, 0u);
}

// ---- what a mixer is held to ----------------------------------------------------------------------------------------

struct OneLayer {
  cpu::CpuBackend cpu{std::make_shared<cpu::ThreadPool>(1), cpu::choose_isa()};
  RandomWeights source{1};
  WeightLoader loader{.backend = cpu, .source = source, .dtype = DType::float32};
};

TEST(MixerWeights, HoldAMixerToItsDescription) {
  OneLayer layer;
  MixerWeights weights(LinearAttentionConfig{2, 4, 8, 0}, 24, layer.loader, "layers.3.mixer.");
  EXPECT_THROW_WITH(weights.linear("in_proj"), std::logic_error, "in_proj is not in the mixer's description");
  EXPECT_THROW_WITH(weights.parameter("conv.weight"), std::logic_error,
                    "conv.weight is not in the mixer's description");
  EXPECT_EQ(weights.linear("proj_q")->out_features(), 2 * (4 + 4 + 8));  // proj_k and proj_v are stacked on it
  EXPECT_THROW_WITH(weights.check_all_loaded(), std::logic_error,
                    "layers.3.mixer.out_proj is in the mixer's description");
  weights.linear("out_proj");
  EXPECT_NO_THROW(weights.check_all_loaded());
}

TEST(MixerWeights, CutOnlyWhatStandsAlone) {
  OneLayer layer;
  MixerWeights weights(SelectiveScanConfig{6, 2, 3, 5, true, false}, 24, layer.loader, "layers.3.mixer.");
  const auto parts = weights.rows_of("x_proj", {5, 4});
  ASSERT_EQ(parts.size(), 2u);
  EXPECT_EQ(parts[0]->out_features(), 5);
  EXPECT_EQ(parts[1]->out_features(), 4);
  EXPECT_THROW_WITH(weights.rows_of("x_proj", {5, 3}), std::logic_error, "x_proj cannot be cut into these rows");
  EXPECT_THROW_WITH(weights.rows_of("dt_proj", {6}), std::logic_error, "dt_proj cannot be cut into these rows");
  const auto longer = [](const std::vector<float>& values) { return std::vector<float>(values.size() + 1); };
  EXPECT_THROW_WITH(weights.parameter("D", longer), std::logic_error, "D was changed to another size");
}

TEST(Activations, GiveNoMoreScratchThanWasAnnounced) {
  cpu::CpuBackend cpu{std::make_shared<cpu::ThreadPool>(1), cpu::choose_isa()};
  const std::vector<backend::Buffer> buffers{cpu.allocate(3 * 10 * 4, backend::MemoryKind::workspace)};
  Activations a;
  a.r.rows = 3;
  a.buffers = buffers;
  EXPECT_EQ(a.scratch(0, 10, DType::float32).data, buffers[0].data.get());
  EXPECT_EQ(a.scratch(0, 20, DType::bfloat16).cols, 20);
  EXPECT_THROW_WITH(a.scratch(0, 11, DType::float32), std::logic_error, "scratch 0 of 11 columns was not announced");
  EXPECT_THROW_WITH(a.scratch(1, 1, DType::float32), std::logic_error, "scratch 1 of 1 columns was not announced");
}

TEST(TinyConfig, HasEveryKindOfMixer) {
  std::set<std::size_t> kinds;
  for (const MixerConfig& layer : test::tiny_config().layers) kinds.insert(layer.index());
  EXPECT_EQ(kinds.size(), std::variant_size_v<MixerConfig>);
}

}  // namespace
}  // namespace based
