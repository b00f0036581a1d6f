#pragma once

// Small random models, and directories that hold them.

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "based/model.h"
#include "based/sampling.h"
#include "io/safetensors.h"
#include "model/model_impl.h"
#include "model/weights.h"
#include "temporary_folder.h"

namespace based::test {

inline const SelectiveScanConfig kSelectiveScan{37, 5, 4, 3, true, true};

/// Mixers whose state has a fixed size and that a GPU has kernels for, grouped heads, partial rotary; small and
/// odd-sized. A prefix of one token lets prompts be cut anywhere. Norms of heads that hardly differ from 0 would make
/// much of the rounding before them, hence the eps of the last ones.
inline ModelConfig gpu_config() {
  ModelConfig config;
  config.vocab_size = 61;
  config.padded_vocab_size = 64;
  config.hidden_size = 24;
  config.norm_eps = 1e-5;
  config.mlp = {true, Activation::silu, 40, false, true};
  SlidingWindowConfig window;
  window.num_heads = 4;
  window.num_kv_heads = 2;
  window.head_dim = 6;
  window.window = 5;
  window.scale = 0.4;
  window.qkv_bias = true;
  window.rotary_dim = 4;
  config.layers = {GatedConvConfig{48, 3, true}, LinearAttentionConfig{3, 4, 8, 1e-12}, window,
                   GatedConvConfig{30, 4, false}, LinearAttentionConfig{2, 5, 7, 1e-12}};
  config.layers.push_back(PrefixLinearAttentionConfig{2, 3, 5, 1, 1e-12});
  config.layers.push_back(kSelectiveScan);
  config.layers.push_back(GatedDeltaNetConfig{2, 5, 7, 3, 1e-2, true, true});
  config.eos_token_id = 60;
  return config;
}

inline const FullAttentionConfig kFullAttention{4, 2, 6, 0.4, true, false, 3};

/// All mixers.
inline ModelConfig tiny_config() {
  ModelConfig config = gpu_config();
  config.layers.insert(config.layers.end() - 2, kFullAttention);
  config.layers.push_back(Rwkv4Config{24, 37});
  config.layers.push_back(H3Config{3, 2, 4, 5});
  config.layers.push_back(HyenaConfig{7, 3, 4096, 6});
  config.layers.push_back(Mamba2Config{4, 5, 3, 2, 4, 0.1, true});
  config.layers.push_back(GatedLinearAttentionConfig{2, 5, 7, 3, 16, 0.1});
  config.layers.push_back(Rwkv7Config{24, 2, 7, 3, 2, 5, 0.1});
  return config;
}

/// The same without the layers that limit how many tokens a sequence may have.
inline ModelConfig unlimited_config() {
  ModelConfig config = tiny_config();
  std::erase_if(config.layers, [](const MixerConfig& layer) { return std::holds_alternative<HyenaConfig>(layer); });
  return config;
}

inline std::vector<std::int32_t> random_tokens(std::size_t count, std::uint32_t seed, std::int64_t vocab_size = 61) {
  std::vector<std::int32_t> tokens(count);
  std::uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
  for (auto& token : tokens) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    token = static_cast<std::int32_t>((x >> 33) % static_cast<std::uint64_t>(vocab_size));
  }
  return tokens;
}

/// Writes the weights of Model::random(config, seed) as a model directory.
inline void write_model(const std::filesystem::path& directory, const ModelConfig& config, std::uint64_t seed) {
  struct Recorder final : WeightSource {
    explicit Recorder(std::uint64_t s) : random(s) {}
    TensorView take(const std::string& name, const std::vector<std::int64_t>& shape) override {
      const TensorView view = random.take(name, shape);
      const auto nbytes = view.nbytes();
      kept.push_back(Tensor::empty(view.dtype, shape));
      std::copy(view.data, view.data + nbytes, kept.back().data_as<std::byte>());
      tensors.push_back({name, kept.back().view()});
      return view;
    }
    void release() override { random.release(); }
    RandomWeights random;
    std::vector<Tensor> kept;
    std::vector<io::TensorToWrite> tensors;
  } recorder(seed);
  const Model::Impl impl(config, backend::make_backend({}, 1), recorder, DType::float32);
  io::write_safetensors(directory / "model.safetensors", recorder.tensors, {});
  std::ofstream(directory / "config.json") << config.to_json();
}

inline SamplingParams greedy(std::int64_t max_tokens) {
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = max_tokens;
  params.ignore_eos = true;
  return params;
}

inline std::vector<float> floats(const Tensor& tensor) {
  return {tensor.data_as<float>(), tensor.data_as<float>() + tensor.size()};
}

}  // namespace based::test
