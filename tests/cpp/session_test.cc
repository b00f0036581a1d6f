#include "based/session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <thread>

#include "based/error.h"
#include "io/state_file.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::floats;
using test::random_tokens;
using test::read_bytes;
using test::TemporaryFolder;
using test::tiny_config;

using Prompts = std::vector<std::vector<std::int32_t>>;

// The saved form of the states, as bytes.
std::string bytes(const Session& session) {
  const TemporaryFolder dir;
  session.save_state(dir.path() / "state");
  return read_bytes(dir.path() / "state");
}

class SessionTest : public ::testing::TestWithParam<DType> {
 protected:
  std::shared_ptr<const Model> model_ = [this] {
    LoadOptions options;
    options.dtype = GetParam();
    return Model::random(tiny_config(), 11, options);
  }();
  double tolerance_ = GetParam() == DType::float32 ? 2e-5 : 3e-2;

  void expect_close(const std::vector<float>& a, const std::vector<float>& b) const {
    ASSERT_EQ(a.size(), b.size());
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
      norm += std::pow(static_cast<double>(b[i]), 2);
    }
    EXPECT_LE(std::sqrt(difference / norm), tolerance_);
  }
};

INSTANTIATE_TEST_SUITE_P(Dtypes, SessionTest, ::testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

TEST_P(SessionTest, DecodeEqualsPrefill) {
  const auto tokens = random_tokens(330, 1);
  const auto logits = floats(model_->forward(tokens));
  for (const std::size_t cut : {1u, 2u, 3u, 5u, 63u, 64u, 65u, 255u, 256u, 257u, 320u}) {
    Session session(model_, 1);
    Prompts prompt{{tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(cut)}};
    Tensor last = session.prefill(prompt);
    for (std::size_t t = cut; t < std::min(cut + 10, tokens.size()); ++t) last = session.step({&tokens[t], 1});
    const std::size_t seen = std::min(cut + 10, tokens.size());
    EXPECT_EQ(session.num_tokens()[0], static_cast<std::int64_t>(seen));
    expect_close(floats(last), {logits.begin() + static_cast<std::ptrdiff_t>((seen - 1) * 64),
                                logits.begin() + static_cast<std::ptrdiff_t>(seen * 64)});
  }
}

TEST_P(SessionTest, NeighboursDoNotMatter) {
  const Prompts prompts{random_tokens(300, 1), random_tokens(1, 2), random_tokens(700, 3), random_tokens(17, 4)};
  Session together(model_, 4);
  const auto all = floats(together.prefill(prompts));
  const std::vector<std::int32_t> next{1, 2, 3, 4};
  const auto stepped = floats(together.step(next));
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    Session alone(model_, 1);
    const auto row = static_cast<std::ptrdiff_t>(i * 64);
    EXPECT_EQ(floats(alone.prefill({&prompts[i], 1})), std::vector<float>(all.begin() + row, all.begin() + row + 64));
    EXPECT_EQ(floats(alone.step({&next[i], 1})), std::vector<float>(stepped.begin() + row, stepped.begin() + row + 64));
  }
}

TEST_P(SessionTest, SubsetsAdvanceOnlyTheirSequences) {
  Session session(model_, 3);
  session.prefill(Prompts{random_tokens(9, 1), random_tokens(4, 2), random_tokens(6, 3)});
  const std::vector<int> some{2, 0};
  const std::vector<std::int32_t> tokens{5, 7};
  const auto logits = floats(session.step(tokens, some));
  EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{10, 4, 7}));
  Session alone(model_, 1);
  alone.prefill(Prompts{random_tokens(6, 3)});
  EXPECT_EQ(floats(alone.step({tokens.data(), 1})), std::vector<float>(logits.begin(), logits.begin() + 64));
}

TEST_P(SessionTest, GoingOnAfterForkRollbackSaveAndLoadIsBitwiseTheSame) {
  const TemporaryFolder dir;
  const Prompts prompts{random_tokens(40, 1), random_tokens(3, 2)};
  const std::vector<std::int32_t> next{3, 4}, other{9, 8};
  Session session(model_, 2);
  session.prefill(prompts);

  const auto fork = session.fork();
  const auto checkpoint = session.checkpoint();
  session.save_state(dir.path() / "state");
  const auto want = floats(session.step(next));
  const auto state = bytes(session);

  fork->step(other);
  fork->rollback(*checkpoint);
  EXPECT_EQ(fork->num_tokens(), (std::vector<std::int64_t>{40, 3}));
  EXPECT_EQ(floats(fork->step(next)), want);
  EXPECT_EQ(bytes(*fork), state);

  session.rollback(*checkpoint);
  EXPECT_EQ(floats(session.step(next)), want);

  Session loaded(model_, 2);
  loaded.prefill(Prompts{random_tokens(5, 5), random_tokens(200, 6)});
  loaded.load_state(dir.path() / "state");
  EXPECT_EQ(floats(loaded.step(next)), want);
  EXPECT_EQ(bytes(loaded), state);

  loaded.reset();
  EXPECT_EQ(loaded.num_tokens(), (std::vector<std::int64_t>{0, 0}));
  Session fresh(model_, 2);
  EXPECT_EQ(floats(loaded.prefill(prompts)), floats(fresh.prefill(prompts)));
}

TEST_P(SessionTest, CopyAndResetOfOneSequence) {
  Session session(model_, 2);
  session.prefill(Prompts{random_tokens(40, 1), random_tokens(3, 2)});
  session.copy(0, 1);
  const std::vector<std::int32_t> same{3, 3};
  const auto logits = floats(session.step(same));
  EXPECT_EQ(std::vector<float>(logits.begin(), logits.begin() + 64),
            std::vector<float>(logits.begin() + 64, logits.end()));
  session.reset(0);
  EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{0, 41}));
}

TEST_P(SessionTest, AnInterruptedPrefillChangesNothing) {
  Session session(model_, 2);
  const std::vector<int> first{0};
  session.prefill(Prompts{random_tokens(20, 1)}, first);  // one used sequence, one fresh
  const auto before = bytes(session);
  for (const int stop_at : {0, 1, 4, 7}) {
    int calls = 0;
    const auto interrupt = [&] {
      if (calls++ == stop_at) throw std::runtime_error("stop here");
    };
    EXPECT_THROW(session.prefill(Prompts{random_tokens(300, 2), random_tokens(400, 3)}, {}, interrupt),
                 std::runtime_error);
    EXPECT_EQ(bytes(session), before);
  }
}

// Of full attention alone: what a prompt wrote behind the sequence counts for nothing, and no state is copied.
TEST_P(SessionTest, AnInterruptedPrefillOfAStateThatOnlyGrowsChangesNothing) {
  ModelConfig config = tiny_config();
  config.layers = {test::kFullAttention, test::kFullAttention};
  LoadOptions options;
  options.dtype = GetParam();
  const auto model = Model::random(config, 11, options);
  Session session(model, 2);
  const std::vector<int> first{0};
  session.prefill(Prompts{random_tokens(200, 1)}, first);
  const auto before = bytes(session);
  const auto untouched = session.fork();
  const Prompts prompts{random_tokens(100, 2), random_tokens(400, 3)};
  for (const int stop_at : {0, 1, 3}) {
    int calls = 0;
    std::size_t most = 0;
    const std::size_t held = model->memory().states;
    const auto interrupt = [&] {
      most = std::max(most, static_cast<std::size_t>(model->memory().states));
      if (calls++ == stop_at) throw std::runtime_error("stop here");
    };
    EXPECT_THROW(session.prefill(prompts, {}, interrupt), std::runtime_error);
    EXPECT_EQ(bytes(session), before);
    EXPECT_LE(most, held + 3 * (model->state_nbytes(256) - model->state_nbytes(0)));  // its own pieces
  }
  const auto stop = [] { throw std::runtime_error("stop here"); };
  const std::size_t held = model->memory().states;
  const std::vector<std::int32_t> tokens{1, 2};
  EXPECT_THROW(session.step(tokens, {}, stop), std::runtime_error);
  EXPECT_EQ(bytes(session), before);
  EXPECT_EQ(model->memory().states, held);
  session.step(tokens, {}, [] {});
  session.undo_last();
  EXPECT_EQ(bytes(session), before);
  EXPECT_THROW(session.reset(stop), std::runtime_error);  // which overwrites, and so copies
  EXPECT_EQ(bytes(session), before);
  EXPECT_EQ(floats(session.prefill(prompts)), floats(untouched->prefill(prompts)));
  EXPECT_EQ(bytes(session), bytes(*untouched));
}

// A model whose sequences may have 10 tokens.
class MaxContext : public ::testing::Test {
 protected:
  static std::shared_ptr<const Model> load(std::int64_t max_context) {
    LoadOptions options;
    options.max_context = max_context;
    return Model::random(test::unlimited_config(), 11, options);
  }
  std::shared_ptr<const Model> model_ = load(10);
};

TEST_F(MaxContext, IsOfTheLoadedModel) {
  EXPECT_EQ(model_->max_context(), 10);
  const auto other = Model::random(test::unlimited_config(), 11);
  EXPECT_GT(other->max_context(), 10'000);
  EXPECT_EQ(other->fingerprint(), model_->fingerprint());
  EXPECT_GT(other->state_nbytes(), model_->state_nbytes());
  EXPECT_EQ(other->state_nbytes(10), model_->state_nbytes());
  EXPECT_THROW_WITH(model_->state_nbytes(11), InvalidArgument, "max_context");
  EXPECT_EQ(Model::random(test::gpu_config(), 11)->max_context(), std::nullopt);
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{0}, limits::kSize + 1})
    EXPECT_THROW_WITH(load(bad), InvalidArgument, "expected 1 to 16777216");
  LoadOptions options;
  options.max_context = 10;
  EXPECT_THROW_WITH(Model::random(test::gpu_config(), 11, options), InvalidArgument, "no full_attention layer");
}

TEST_F(MaxContext, IsRefusedBeforeAnythingChanges) {
  const auto tokens = random_tokens(12, 1);
  const auto first = [&](std::size_t n) { return std::vector<std::int32_t>(tokens.begin(), tokens.begin() + n); };
  EXPECT_EQ(model_->forward(first(10)).shape()[0], 10);
  EXPECT_THROW_WITH(model_->forward(first(11)), InvalidArgument,
                    "forward: 11 tokens are more than the model's max_context, 10 tokens");
  EXPECT_EQ(model_->score(first(11)).size(), 10u);  // the last is not fed
  EXPECT_THROW_WITH(model_->score(first(12)), InvalidArgument, "score: 11 tokens");
  EXPECT_THROW_WITH(model_->trace(first(11)), InvalidArgument, "trace: 11 tokens");

  Session session(model_, 2);
  session.prefill(Prompts{first(9), first(3)});
  const auto before = bytes(session);
  EXPECT_THROW_WITH(session.prefill(Prompts{first(2), first(2)}), InvalidArgument,
                    "prefill: sequence 0: 2 tokens behind 9 are more than the model's max_context, 10 tokens");
  EXPECT_EQ(bytes(session), before);
  session.step(std::vector<std::int32_t>{1, 2});
  const auto full = bytes(session);
  EXPECT_THROW_WITH(session.step(std::vector<std::int32_t>{1, 2}), InvalidArgument, "step: sequence 0: 1 tokens");
  EXPECT_EQ(bytes(session), full);
  const std::vector<int> second{1};
  session.step(std::vector<std::int32_t>{3}, second);  // the neighbour goes on
  EXPECT_EQ(session.num_tokens(), (std::vector<std::int64_t>{10, 5}));
  session.fork()->reset();
}

TEST_F(MaxContext, AStateGoesToAnotherOneIfItsTokensFit) {
  Session session(model_, 1);
  session.prefill(Prompts{random_tokens(8, 1)});
  const test::TemporaryFolder folder;
  session.save_state(folder / "state");
  const auto large = load(100), small = load(7);
  Session other(large, 1);
  other.load_state(folder / "state");
  const std::vector<std::int32_t> next{5};
  EXPECT_EQ(floats(other.step(next)), floats(session.step(next)));
  Session narrow(small, 1);
  narrow.prefill(Prompts{random_tokens(3, 2)});
  const auto before = bytes(narrow);
  EXPECT_THROW_WITH(narrow.load_state(folder / "state"), InvalidArgument, "max_context, 7 tokens");
  EXPECT_THROW_WITH(State::load(folder / "state", small), InvalidArgument, "max_context, 7 tokens");
  EXPECT_EQ(bytes(narrow), before);
}

TEST_P(SessionTest, StatesThatDidNotChangeAreCopiedOnce) {
  Session session(model_, 4);
  session.prefill(Prompts{random_tokens(20, 1), random_tokens(3, 2), random_tokens(4, 3), random_tokens(5, 4)});
  const std::size_t held = model_->memory().states;
  const auto checkpoint = session.checkpoint();
  const std::size_t with_checkpoint = model_->memory().states;
  EXPECT_GE(with_checkpoint, held + 4 * model_->state_nbytes(5));
  // A prompt can be undone from the checkpoint's states: it takes no copy of its own.
  std::size_t most = 0;
  session.prefill(Prompts{{1}, {2}, {3}, {4}}, {},
                  [&] { most = std::max(most, static_cast<std::size_t>(model_->memory().states)); });
  EXPECT_LT(most, with_checkpoint + model_->state_nbytes(5));
  session.rollback(*checkpoint);
  EXPECT_EQ(session.snapshot(2), checkpoint->states()[2]);  // the same object
  session.step(std::vector<std::int32_t>{1, 2, 3, 4});
  EXPECT_NE(session.snapshot(2), checkpoint->states()[2]);
}

TEST_P(SessionTest, AStateStartsAnySequence) {
  const TemporaryFolder dir;
  Session session(model_, 2);
  session.prefill(Prompts{random_tokens(40, 1), random_tokens(3, 2)});
  const auto state = session.snapshot(0);
  const std::vector<std::int32_t> next{3, 4};
  const auto logits = floats(session.step(next));
  const std::vector<float> want(logits.begin(), logits.begin() + 64);
  state->save(dir.path() / "state");
  for (const auto& one : {state, State::load(dir.path() / "state", model_)}) {
    EXPECT_EQ(one->num_tokens(), 40);
    const std::vector<std::shared_ptr<const State>> states(3, one);
    Session batch(model_, states);
    const auto rows = floats(batch.step(std::vector<std::int32_t>{3, 3, 3}));
    for (std::ptrdiff_t b = 0; b < 3; ++b)
      EXPECT_EQ(std::vector<float>(rows.begin() + 64 * b, rows.begin() + 64 * (b + 1)), want);
  }
  LoadOptions options;
  options.dtype = GetParam();
  const auto foreign = Model::random(tiny_config(), 12, options);
  Session other(foreign, 1);
  EXPECT_THROW(other.restore(0, *state), StateError);
  EXPECT_THROW(Session(foreign, {&state, 1}), StateError);
  EXPECT_THROW(State::load(dir.path() / "state", foreign), StateError);
  EXPECT_THROW(session.restore(2, *state), InvalidArgument);
  EXPECT_THROW(session.snapshot(-1), InvalidArgument);
}

TEST_P(SessionTest, RefusesWhatGoingOnCannotNeed) {
  const TemporaryFolder dir;
  const auto path = dir.path() / "state";
  Session session(model_, 1);
  session.prefill(Prompts{random_tokens(8, 1)});
  session.save_state(path);
  const auto before = bytes(session);
  const auto file = io::SafetensorsFile::open(path);
  const std::vector<std::byte> zeros(4096), ones(4096, std::byte{1});
  const auto write = [&](const std::string& name, const TensorView& view, std::int64_t num_tokens) {
    io::SavedState state{num_tokens, {}};
    for (const auto& [full_name, tensor] : file->tensors()) {
      const std::string own = full_name.substr(std::string("sequences.0.").size());
      if (own != name) state.tensors.push_back({own, tensor});
    }
    if (view.data != nullptr) state.tensors.push_back({name, view});
    io::write_state_file(path, model_->fingerprint(), {state});
  };
  struct Case {
    std::string name;
    TensorView view;
    std::string fragment;
  };
  const auto tensor = [](DType dtype, std::vector<std::int64_t> shape, const std::vector<std::byte>& data) {
    return TensorView{dtype, std::move(shape), data.data()};
  };
  for (const auto& [name, view, fragment] : std::vector<Case>{
           {"last_hidden", tensor(DType::float32, {23}, zeros), "last_hidden has shape (23), expected (24)"},
           {"last_hidden", tensor(DType::int32, {24}, zeros), "last_hidden has dtype int32, expected float32"},
           {"seen_outputs", {}, "tensor seen_outputs is missing"},
           {"seen_in_prompt", {}, "tensor seen_in_prompt is missing"},
           {"seen_outputs", tensor(DType::int32, {60}, zeros), "seen_outputs has shape (60), expected (61)"},
           {"seen_outputs", tensor(DType::float32, {61}, zeros), "seen_outputs has dtype float32, expected int32"},
           {"seen_outputs", tensor(DType::int32, {61}, ones), "seen_outputs has 16843009 for token 0, expected 0 to"},
           {"seen_in_prompt", tensor(DType::uint8, {61}, zeros), "seen_in_prompt has dtype uint8, expected bool"},
           {"other", tensor(DType::uint8, {1}, zeros), "tensor other has no place in this model"},
       }) {
    write(name, view, 8);
    EXPECT_NE(test::message_of<FormatError>([&] { session.load_state(path); }).find(fragment), std::string::npos)
        << fragment << "\n"
        << test::message_of<FormatError>([&] { session.load_state(path); });
    EXPECT_EQ(bytes(session), before);
  }
}

TEST_P(SessionTest, ASecondCallAtOnceIsRefused) {
  Session session(model_, 1);
  bool refused = false;
  session.prefill(Prompts{random_tokens(10, 1)}, {}, [&] {
    std::thread([&] {
      try {
        const std::int32_t token = 1;
        session.step({&token, 1});
      } catch (const SessionBusyError&) {
        refused = true;
      }
    }).join();
  });
  EXPECT_TRUE(refused);
  EXPECT_EQ(session.num_tokens()[0], 10);
}

TEST_P(SessionTest, RefusesWrongArgumentsAndChangesNothing) {
  Session session(model_, 2);
  session.prefill(Prompts{random_tokens(5, 1), random_tokens(6, 2)});
  const auto before = bytes(session);
  const std::vector<std::int32_t> one{1}, two{1, 2}, negative{1, -1}, beyond{61, 1};
  const std::vector<int> twice{1, 1}, outside{0, 2};
  EXPECT_THROW(session.step(one), InvalidArgument);
  EXPECT_THROW(session.step(negative), InvalidArgument);
  EXPECT_THROW(session.step(beyond), InvalidArgument);
  EXPECT_THROW(session.step(two, twice), InvalidArgument);
  EXPECT_THROW(session.step(two, outside), InvalidArgument);
  EXPECT_THROW(session.prefill(Prompts{{1, 2}, {}}), InvalidArgument);
  EXPECT_THROW(session.prefill(Prompts{{1, 2}}), InvalidArgument);
  EXPECT_THROW(session.reset(2), InvalidArgument);
  EXPECT_THROW(session.copy(0, -1), InvalidArgument);
  EXPECT_THROW(Session(model_, 0), InvalidArgument);
  EXPECT_EQ(bytes(session), before);
}

TEST_P(SessionTest, RefusesForeignAndDamagedStates) {
  const TemporaryFolder dir;
  const auto path = dir.path() / "state";
  Session session(model_, 1);
  session.prefill(Prompts{random_tokens(8, 1)});
  session.save_state(path);
  const auto before = bytes(session);

  LoadOptions options;
  options.dtype = GetParam();
  const auto foreign = Model::random(tiny_config(), 12, options);
  Session other(foreign, 1);
  EXPECT_THROW(other.load_state(path), StateError);
  EXPECT_THROW(other.rollback(*session.checkpoint()), StateError);
  Session wider(model_, 2);
  EXPECT_THROW(wider.load_state(path), StateError);
  EXPECT_THROW(wider.rollback(*session.checkpoint()), StateError);
  EXPECT_THROW(session.load_state(dir.path() / "absent"), IoError);
  EXPECT_THROW(session.save_state(dir.path() / "absent" / "state"), IoError);

  const std::string whole = read_bytes(path);
  for (std::size_t i = 0; i < whole.size(); i += 97) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x11);
    std::ofstream(path, std::ios::binary) << damaged;
    EXPECT_THROW(session.load_state(path), Error) << "byte " << i;
    std::ofstream(path, std::ios::binary) << whole.substr(0, i);
    EXPECT_THROW(session.load_state(path), Error) << "cut at " << i;
  }
  EXPECT_EQ(bytes(session), before);
}

// A state as a device writes it that leaves tokens out of the sums for a while.
TEST_P(SessionTest, RefusesPendingTokensThatCannotBe) {
  const TemporaryFolder dir;
  const auto path = dir.path() / "state";
  Session session(model_, 1);
  session.prefill(Prompts{random_tokens(8, 1)});
  session.save_state(path);
  const auto before = bytes(session);
  const auto file = io::SafetensorsFile::open(path);

  struct Pending {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;
  };
  const std::vector<float> zeros(1000);
  const auto write = [&](const std::vector<Pending>& pending) {
    io::SavedState state{8, {}};
    for (const auto& [name, tensor] : file->tensors())
      state.tensors.push_back({name.substr(std::string("sequences.0.").size()), tensor});
    for (const auto& [name, dtype, shape] : pending)
      state.tensors.push_back({name, {dtype, shape, reinterpret_cast<const std::byte*>(zeros.data())}});
    io::write_state_file(path, model_->fingerprint(), {state});
  };
  const DType f32 = DType::float32, b16 = DType::bfloat16;
  // Linear layers: 1 with 3 heads, f 4, head_dim 8; 4 with 2 heads, f 5, head_dim 7; 5 with 2 heads, f 3, head_dim 5.
  const std::vector<Pending> good{
      {"layers.1.pending_keys", b16, {3, 3, 4}}, {"layers.1.pending_values", b16, {3, 3, 8}},
      {"layers.4.pending_keys", b16, {3, 2, 5}}, {"layers.4.pending_values", b16, {3, 2, 7}},
      {"layers.5.pending_keys", b16, {3, 2, 3}}, {"layers.5.pending_values", b16, {3, 2, 5}}};
  const auto changed = [&](std::size_t i, DType dtype, std::vector<std::int64_t> shape) {
    auto all = good;
    all[i].dtype = dtype;
    all[i].shape = std::move(shape);
    return all;
  };
  const auto without = [&](std::vector<std::size_t> which) {
    std::vector<Pending> rest;
    for (std::size_t i = 0; i < good.size(); ++i)
      if (std::find(which.begin(), which.end(), i) == which.end()) rest.push_back(good[i]);
    return rest;
  };
  const auto of_length = [&](std::int64_t n, std::int64_t m) {
    auto all = good;
    for (std::size_t i = 0; i < all.size(); ++i) all[i].shape[0] = i < 2 ? n : m;
    return all;
  };
  for (const auto& [pending, fragment] : std::vector<std::pair<std::vector<Pending>, std::string>>{
           {without({0}), "tensor layers.1.pending_keys is missing"},
           {without({1}), "tensor layers.1.pending_values is missing"},
           {without({3}), "tensor layers.4.pending_values is missing"},
           {without({2, 3}), "tensor layers.4.pending_keys is missing"},
           {without({0, 1}), "layers.4.pending_keys has 3 tokens, expected 0 as the linear layers before"},
           {of_length(3, 2), "layers.4.pending_keys has 2 tokens, expected 3 as the linear layers before"},
           {of_length(3, 0), "layers.4.pending_keys has 0 tokens, expected 3 as the linear layers before"},
           {of_length(9, 9), "layers.1.pending_keys has 9 tokens, expected at most 8, the number seen"},
           {changed(0, b16, {3, 3, 5}), "layers.1.pending_keys has shape (3, 3, 5), expected (3, 3, 4)"},
           {changed(0, b16, {3, 12}), "layers.1.pending_keys has shape (3, 12), expected (3, 3, 4)"},
           {changed(0, b16, {}), "layers.1.pending_keys has shape (), expected (0, 3, 4)"},
           {changed(1, b16, {2, 3, 8}), "layers.1.pending_values has shape (2, 3, 8), expected (3, 3, 8)"},
           {changed(3, b16, {3, 7, 2}), "layers.4.pending_values has shape (3, 7, 2), expected (3, 2, 7)"},
           {changed(1, f32, {3, 3, 8}), "layers.1.pending_values has dtype float32, expected bfloat16 as its keys"},
           {changed(2, DType::int32, {3, 2, 5}),
            "layers.4.pending_keys has dtype int32, expected float32, bfloat16 or"},
           {{{"layers.0.pending_keys", f32, {1, 3, 4}}}, "tensor layers.0.pending_keys has no place in this model"},
       }) {
    write(pending);
    EXPECT_NE(test::message_of<FormatError>([&] { session.load_state(path); }).find(fragment), std::string::npos)
        << fragment << "\n"
        << test::message_of<FormatError>([&] { session.load_state(path); });
    EXPECT_EQ(bytes(session), before);
  }
  for (const auto& pending : {good, of_length(8, 8), of_length(1, 1), of_length(0, 0), without({0, 1, 2, 3, 4, 5})}) {
    write(pending);
    session.load_state(path);
    EXPECT_EQ(session.num_tokens()[0], 8);
  }
  EXPECT_EQ(bytes(session), before);  // none at last
}

TEST_P(SessionTest, StateMovesBetweenDtypes) {
  const TemporaryFolder dir;
  test::write_model(dir.path(), tiny_config(), 5);
  LoadOptions from, to;
  from.dtype = GetParam();
  to.dtype = GetParam() == DType::float32 ? DType::bfloat16 : DType::float32;
  Session source(Model::load(dir.path(), from), 1), target(Model::load(dir.path(), to), 1);
  source.prefill(Prompts{random_tokens(30, 1)});
  source.save_state(dir.path() / "state");
  target.load_state(dir.path() / "state");
  const std::int32_t token = 3;
  tolerance_ = 5e-2;
  expect_close(floats(target.step({&token, 1})), floats(source.step({&token, 1})));
}

}  // namespace
}  // namespace based
