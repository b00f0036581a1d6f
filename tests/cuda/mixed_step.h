#pragma once

// One decode step on the device seam alone: embed, one layer of each kind on fixed inputs, and sampling.

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "cuda_test.h"

namespace based::test {

/// `values` as `dtype` (float32, or bfloat16 by cutting off), in device memory.
inline backend::Buffer upload(backend::Backend& device, const std::vector<float>& values, DType dtype) {
  const backend::Buffer buffer = device.allocate(values.size() * size_of(dtype), backend::MemoryKind::workspace);
  if (dtype == DType::float32) {
    device.copy_from_host(buffer.data.get(), values.data(), buffer.nbytes);
    return buffer;
  }
  std::vector<std::uint16_t> halves(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &values[i], sizeof(bits));
    halves[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  device.copy_from_host(buffer.data.get(), halves.data(), buffer.nbytes);
  return buffer;
}

inline std::vector<float> random_floats(std::size_t count, std::uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

/// Bytes of a slot's saved form, one tensor after the other.
inline std::vector<std::byte> saved_bytes(backend::Backend& device, const backend::StatePool& states, int slot,
                                          std::int64_t num_tokens) {
  std::vector<std::byte> bytes;
  for (const auto& [name, tensor] : device.export_state(states, slot, num_tokens)) {
    const auto* data = tensor.data_as<std::byte>();
    bytes.insert(bytes.end(), data, data + tensor.nbytes());
  }
  return bytes;
}

class MixedStep {
 public:
  static constexpr std::int64_t kVocab = 100, kHidden = 64, kRows = 4;

  MixedStep(backend::Backend& device, DType dtype)
      : device_(device),
        dtype_(dtype),
        states(device.make_states(config(), dtype, kRows)),
        sampler(device.make_sampler(kVocab, kRows)) {
    const std::vector<float> table = random_floats(kVocab * kHidden, 1);
    table_ = device.pack_linear(
        {{{DType::float32, {kVocab, kHidden}, reinterpret_cast<const std::byte*>(table.data())}}, {}}, dtype);
    r_ = upload(device, std::vector<float>(kRows * kHidden), DType::float32);
    u_ = upload(device, random_floats(kRows * 2 * 64, 2), dtype);
    taps_ = upload(device, random_floats(64 * 3, 3), DType::float32);
    linear_qkv_ = upload(device, random_floats(kRows * 4 * (16 + 16 + 32), 4), dtype);
    window_qkv_ = upload(device, random_floats(kRows * 4 * 3 * 32, 5), dtype);
    out_ = upload(device, std::vector<float>(kRows * 4 * 32), dtype);
    for (float sign : {-1.0f, 1.0f}) {
      std::vector<float> weights = random_floats(64 * 16, 7);
      for (float& w : weights) w = sign * std::abs(w);
      scan_weights_.push_back(upload(device, weights, DType::float32));
    }
    for (const std::int64_t cols : {2 * 64, 64, 2 * 16, 64})
      scan_inputs_.push_back(upload(device, random_floats(static_cast<std::size_t>(kRows * cols), 8), dtype));
    prefix_qkv_ = upload(device, random_floats(kRows * 4 * (8 + 8 + 32), 9), dtype);
    prefix_encoder_ = upload(device, random_floats(kRows * 4 * (8 + 32), 10), dtype);
    delta_u_ = upload(device, random_floats(kRows * 4 * (16 + 16 + 32 + 2 + 32), 11), dtype);
    delta_weights_ = upload(device, random_floats(4 * (16 + 16 + 32) * 4, 12), DType::float32);
    logits_ = upload(device, random_floats(kRows * kVocab, 6), DType::float32);
  }

  static ModelConfig config() {
    ModelConfig config = gpu_config();
    SlidingWindowConfig window;
    window.num_heads = window.num_kv_heads = 4;
    window.head_dim = 32;
    window.window = 9;
    window.scale = 0.177;
    window.rotary_dim = 32;
    config.layers = {GatedConvConfig{64, 3, true},
                     LinearAttentionConfig{4, 16, 32, 1e-12},
                     window,
                     SelectiveScanConfig{64, 16, 4, 1, true, false},
                     PrefixLinearAttentionConfig{4, 8, 32, 1, 1e-12},
                     GatedDeltaNetConfig{4, 16, 32, 4, 1e-5, true, true}};
    return config;
  }

  backend::Matrix logits() const { return {logits_.data.get(), DType::float32, kRows, kVocab}; }
  void set_logits(const std::vector<float>& values) {
    device_.copy_from_host(logits_.data.get(), values.data(), values.size() * sizeof(float));
  }
  /// The residual stream after the last step's embed, (kRows, kHidden).
  std::vector<float> residual() {
    std::vector<float> values(kRows * kHidden);
    device_.copy_to_host(values.data(), r_.data.get(), r_.nbytes);
    return values;
  }

  /// Samples slots[b] from row b of the logits, as after a prompt.
  void sample(const std::vector<std::int32_t>& slots, std::int64_t position) {
    const Batch batch(slots, position);
    const backend::RaggedBatch view{{}, batch.offsets, batch.slots, batch.positions};
    device_.begin(view);
    sampler->sample(logits(), view);
  }

  /// Feeds the sequences kRows tokens in all, some of which the sampler chose, to the convolution alone.
  void feed(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& offsets,
            const std::vector<std::int32_t>& slots, std::int64_t position) {
    const std::vector<std::int64_t> positions(slots.size(), position);
    const backend::RaggedBatch view{tokens, offsets, slots, positions, sampler.get()};
    device_.begin(view);
    device_.embed(*table_, view, {r_.data.get(), DType::float32, kRows, kHidden});
    device_.gated_conv(std::get<GatedConvConfig>(config().layers[0]), static_cast<const float*>(taps_.data.get()), view,
                       {u_.data.get(), dtype_, kRows, 128}, *states, 0, {out_.data.get(), dtype_, kRows, 64});
  }

  /// Feeds slots[b] what the sampler chose for it, at `position`, and samples its next token.
  void step(const std::vector<std::int32_t>& slots, std::int64_t position) {
    const Batch batch(slots, position);
    const backend::RaggedBatch view{{}, batch.offsets, batch.slots, batch.positions, sampler.get()};
    device_.begin(view);
    device_.replay({kRows, {states->id(), sampler->id(), 0, 0}}, [&] {
      const auto matrix = [&](const backend::Buffer& memory, std::int64_t cols) {
        return backend::Matrix{memory.data.get(), dtype_, kRows, cols};
      };
      const ModelConfig model = config();
      device_.embed(*table_, view, {r_.data.get(), DType::float32, kRows, kHidden});
      device_.gated_conv(std::get<GatedConvConfig>(model.layers[0]), static_cast<const float*>(taps_.data.get()), view,
                         matrix(u_, 128), *states, 0, matrix(out_, 64));
      device_.linear_attention(std::get<LinearAttentionConfig>(model.layers[1]), view, matrix(linear_qkv_, 256),
                               *states, 1, matrix(out_, 128));
      device_.sliding_window(std::get<SlidingWindowConfig>(model.layers[2]), view, matrix(window_qkv_, 384), *states, 2,
                             matrix(out_, 128));
      const auto& scan = std::get<SelectiveScanConfig>(model.layers[3]);
      const auto* weights = static_cast<const float*>(scan_weights_[1].data.get());  // taps, biases and D
      const auto xz = matrix(scan_inputs_[0], 128), x = matrix(scan_inputs_[1], 64);
      device_.scan_conv(scan, weights, weights, view, xz, *states, 3, x);
      device_.selective_scan(scan,
                             {static_cast<const float*>(scan_weights_[0].data.get()), weights, xz, x,
                              matrix(scan_inputs_[2], 32), matrix(scan_inputs_[3], 64)},
                             view, *states, 3, matrix(out_, 64));
      device_.prefix_linear_attention(std::get<PrefixLinearAttentionConfig>(model.layers[4]), view,
                                      matrix(prefix_qkv_, 192), matrix(prefix_encoder_, 160), *states, 4,
                                      matrix(out_, 128));
      const auto* delta = static_cast<const float*>(delta_weights_.data.get());  // all of them
      device_.gated_delta_net(std::get<GatedDeltaNetConfig>(model.layers[5]), {delta, delta, delta, delta}, view,
                              matrix(delta_u_, 392), *states, 5, matrix(out_, 128));
      sampler->sample(logits(), view);
    });
  }

 private:
  struct Batch {
    Batch(std::vector<std::int32_t> rows, std::int64_t position) : slots(std::move(rows)) {
      for (std::size_t b = 0; b < slots.size(); ++b) {
        positions.push_back(position);
        offsets.push_back(static_cast<std::int32_t>(b) + 1);
      }
    }
    std::vector<std::int32_t> slots, offsets{0};
    std::vector<std::int64_t> positions;
  };

  backend::Backend& device_;
  const DType dtype_;
  std::shared_ptr<const backend::LinearWeight> table_;
  backend::Buffer r_, u_, taps_, linear_qkv_, window_qkv_, out_, logits_;
  backend::Buffer prefix_qkv_, prefix_encoder_, delta_u_, delta_weights_;
  std::vector<backend::Buffer> scan_weights_;  // A, and what stands for all others
  std::vector<backend::Buffer> scan_inputs_;   // [x|z], x, [B|C], Δ

 public:
  const std::unique_ptr<backend::StatePool> states;
  const std::unique_ptr<backend::Sampler> sampler;
};

}  // namespace based::test
