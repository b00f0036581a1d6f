#include "based/model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <variant>

#include "based/error.h"
#include "tiny_model.h"

namespace based {
namespace {

using test::floats;
using test::random_tokens;
using test::TemporaryFolder;
using test::tiny_config;
using test::write_model;

TEST(Model, LoadGivesWhatWasWritten) {
  const TemporaryFolder dir;
  write_model(dir.path(), tiny_config(), 7);
  const auto loaded = Model::load(dir.path());
  const auto random = Model::random(tiny_config(), 7);
  const auto tokens = random_tokens(300, 1);
  EXPECT_EQ(floats(loaded->forward(tokens)), floats(random->forward(tokens)));
  EXPECT_EQ(loaded->config(), tiny_config());
  EXPECT_EQ(loaded->dtype(), DType::float32);
  EXPECT_EQ(loaded->fingerprint(), Model::load(dir.path())->fingerprint());
  EXPECT_NE(loaded->fingerprint(), random->fingerprint());
}

// Every byte counts, wherever it is.
TEST(Model, FingerprintsSeeEveryByteOfTheWeights) {
  const TemporaryFolder dir;
  write_model(dir.path(), tiny_config(), 7);
  const auto path = dir.path() / "model.safetensors";
  const std::string fingerprint = Model::load(dir.path())->fingerprint(), bytes = test::read_bytes(path);
  std::map<std::string, std::pair<std::size_t, std::size_t>> places;  // of each tensor: first byte, number of bytes
  {
    const auto file = io::SafetensorsFile::open(path);
    std::size_t end = bytes.size();
    std::map<const std::byte*, std::string> order;
    for (const auto& [name, tensor] : file->tensors()) order.emplace(tensor.data, name);
    for (auto it = order.rbegin(); it != order.rend(); ++it) {  // without holes, up to the end of the file
      const std::size_t nbytes = file->tensors().at(it->second).nbytes();
      places[it->second] = {end -= nbytes, nbytes};
    }
  }
  for (const auto& [name, place] : places) {
    for (const std::size_t at : {std::size_t{0}, place.second / 12 * 4, place.second - 4}) {  // a number's lowest bits
      std::string changed = bytes;
      changed[place.first + at] = static_cast<char>(changed[place.first + at] ^ 1);
      test::write_bytes(path, changed);
      EXPECT_NE(Model::load(dir.path())->fingerprint(), fingerprint) << name << " " << at;
    }
  }
  test::write_bytes(path, bytes);
  EXPECT_EQ(Model::load(dir.path())->fingerprint(), fingerprint);
}

TEST(Model, CountsParametersAsTheWeightFileDoes) {
  const TemporaryFolder dir;
  write_model(dir.path(), tiny_config(), 7);
  std::int64_t total = 0;
  const auto files = io::WeightFiles::open(dir.path());
  for (const auto& [name, tensor] : files.tensors()) total += tensor.size();
  EXPECT_EQ(Model::load(dir.path())->num_parameters(), total);
}

TEST(Model, LayersMayHaveNoMlp) {
  ModelConfig config = tiny_config();
  config.mlp.reset();
  const TemporaryFolder dir;
  write_model(dir.path(), config, 7);
  std::int64_t total = 0;
  const auto files = io::WeightFiles::open(dir.path());
  for (const auto& [name, tensor] : files.tensors()) {
    total += tensor.size();
    EXPECT_TRUE(name.find("norm2") == std::string::npos && name.find("mlp") == std::string::npos) << name;
  }
  const auto model = Model::load(dir.path());
  EXPECT_EQ(model->config(), config);
  EXPECT_EQ(model->num_parameters(), total);
  // Then a block adds what its mixer gives, and nothing else.
  const LayerTrace trace = model->trace(random_tokens(20, 1));
  auto r = floats(trace.embed);
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    const auto added = floats(trace.mixer_out[i]);
    for (std::size_t j = 0; j < r.size(); ++j) r[j] += added[j];
    EXPECT_EQ(floats(trace.block_out[i]), r) << "layer " << i;
  }
}

TEST(Model, UntiedHeadIsUsed) {
  ModelConfig config = tiny_config();
  config.tie_embeddings = false;
  const auto untied = Model::random(config, 7), tied = Model::random(tiny_config(), 7);
  const auto tokens = random_tokens(5, 1);
  EXPECT_NE(floats(untied->forward(tokens)), floats(tied->forward(tokens)));
  EXPECT_EQ(untied->num_parameters(), tied->num_parameters() + 64 * 24);
}

TEST(Model, TraceEndsInForward) {
  const auto model = Model::random(tiny_config(), 7);
  const auto tokens = random_tokens(20, 1);
  const LayerTrace trace = model->trace(tokens);
  ASSERT_EQ(trace.mixer_out.size(), tiny_config().layers.size());
  ASSERT_EQ(trace.block_out.size(), tiny_config().layers.size());
  EXPECT_EQ(floats(trace.logits), floats(model->forward(tokens)));
}

TEST(Model, ScoreIsLogSoftmaxOfForward) {
  ModelConfig causal = tiny_config(), with_prefix = test::gpu_config();
  std::erase_if(causal.layers,
                [](const auto& layer) { return std::holds_alternative<PrefixLinearAttentionConfig>(layer); });
  // score() and forward() cut a prompt with a prefix in other places.
  for (const auto& [config, tolerance] : {std::pair(causal, 1e-6), {with_prefix, 1e-5}}) {
    const auto model = Model::random(config, 7);
    const auto tokens = random_tokens(600, 2);
    const auto logits = floats(model->forward(tokens));
    const auto score = model->score(tokens);
    ASSERT_EQ(score.size(), tokens.size() - 1);
    for (std::size_t t = 0; t < score.size(); ++t) {
      double sum = 0;
      for (int v = 0; v < 61; ++v) sum += std::exp(static_cast<double>(logits[t * 64 + static_cast<std::size_t>(v)]));
      const double want = logits[t * 64 + static_cast<std::size_t>(tokens[t + 1])] - std::log(sum);
      ASSERT_NEAR(score[t], want, tolerance) << t;
    }
    EXPECT_TRUE(model->score(random_tokens(1, 1)).empty());
  }
}

TEST(Model, RefusesTokensOutsideTheVocabulary) {
  const auto model = Model::random(tiny_config(), 7);
  for (const std::int32_t bad : {-1, 61, 63, 1 << 30}) {
    const std::vector<std::int32_t> tokens{1, bad};
    const auto text = test::message_of<InvalidArgument>([&] { model->forward(tokens); });
    EXPECT_NE(text.find(std::to_string(bad) + " at index 1"), std::string::npos) << text;
  }
  EXPECT_THROW(model->forward({}), InvalidArgument);
  EXPECT_THROW(model->score({}), InvalidArgument);
}

TEST(Model, NamesMissingExtraAndMisshapenTensors) {
  const TemporaryFolder dir;
  write_model(dir.path(), tiny_config(), 7);
  const auto files = io::WeightFiles::open(dir.path());
  std::vector<io::TensorToWrite> tensors;
  for (const auto& [name, tensor] : files.tensors()) tensors.push_back({name, tensor});
  const auto reload = [&](const std::vector<io::TensorToWrite>& list) {
    const TemporaryFolder changed;
    std::filesystem::copy(dir.path() / "config.json", changed.path() / "config.json");
    io::write_safetensors(changed.path() / "model.safetensors", list, {});
    return test::message_of<FormatError>([&] { Model::load(changed.path()); });
  };

  auto missing = tensors;
  std::erase_if(missing, [](const auto& t) { return t.name == "layers.2.mixer.qkv_proj.bias"; });
  EXPECT_NE(reload(missing).find("layers.2.mixer.qkv_proj.bias (48) is missing"), std::string::npos);

  auto extra = tensors;
  extra.push_back({"layers.9.mixer.extra", tensors[0].tensor});
  EXPECT_NE(reload(extra).find("layers.9.mixer.extra"), std::string::npos);

  auto misshapen = tensors;
  for (auto& t : misshapen)
    if (t.name == "final_norm.weight") t.tensor.shape = {12, 2};
  const auto shape_text = reload(misshapen);
  EXPECT_NE(shape_text.find("final_norm.weight has shape (12, 2)"), std::string::npos) << shape_text;

  auto mistyped = tensors;
  for (auto& t : mistyped)
    if (t.name == "final_norm.weight") t.tensor.dtype = DType::int32;
  const auto dtype_text = reload(mistyped);
  EXPECT_NE(dtype_text.find("int32, expected float32, bfloat16 or float16"), std::string::npos) << dtype_text;
}

TEST(Model, RefusesDevicesThreadsAndDtypesItCannotUse) {
  LoadOptions options;
  options.dtype = DType::int16;
  EXPECT_THROW(Model::random(tiny_config(), 7, options), InvalidArgument);
  options.dtype = DType::float16;
  EXPECT_THROW(Model::random(tiny_config(), 7, options), UnsupportedError);
  options = {};
  options.num_threads = -1;
  EXPECT_THROW(Model::random(tiny_config(), 7, options), InvalidArgument);
  EXPECT_THROW(Model::load("/nonexistent/model"), IoError);
}

TEST(Model, ResultsDoNotDependOnThreads) {
  LoadOptions one, three;
  one.num_threads = 1;
  three.num_threads = 3;
  const auto tokens = random_tokens(400, 3);
  EXPECT_EQ(floats(Model::random(tiny_config(), 7, one)->forward(tokens)),
            floats(Model::random(tiny_config(), 7, three)->forward(tokens)));
}

}  // namespace
}  // namespace based
