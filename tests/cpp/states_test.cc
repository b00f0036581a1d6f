// Slots of the CPU's state pool: saved form, copies, limits.

#include <gtest/gtest.h>
#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_memory.h"
#include "backend/cpu/cpu_states.h"
#include "based/error.h"
#include "based/session.h"
#include "tiny_model.h"

namespace based::cpu {
namespace {

using backend::NamedTensor;
using backend::NamedView;
using backend::StatePool;

CpuBackend make_cpu() { return {std::make_shared<ThreadPool>(2), choose_isa()}; }

constexpr GatedConvConfig kConv{21, 4, true};
constexpr LinearAttentionConfig kLinear{3, 5, 18, 1e-12};
constexpr SlidingWindowConfig kWindow{4, 2, 10, 19, 0.3, false, false, 10, 10000.0, false};

ModelConfig model() {
  ModelConfig config;
  config.layers = {kConv, kLinear, kWindow, kConv};
  return config;
}

std::vector<float> random_floats(std::int64_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(size));
  for (float& xi : x) xi = normal(random);
  return x;
}

// Feeds tokens [begin, end) of a fixed random sequence to every layer of a slot; all outputs, one after another.
std::vector<float> advance(CpuBackend& cpu, StatePool& states, int slot, std::int64_t begin, std::int64_t end,
                           std::uint64_t seed = 0) {
  const std::int64_t n = end - begin;
  const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n)), offsets{0, static_cast<std::int32_t>(n)},
      slots{slot};
  const std::vector<std::int64_t> positions{begin};
  const backend::RaggedBatch batch{tokens, offsets, slots, positions};
  std::vector<float> outputs;
  const auto layer = [&](std::int64_t in_width, std::int64_t out_width, auto&& run) {
    std::vector<float> in, out(static_cast<std::size_t>(n * out_width));
    for (std::int64_t t = begin; t < end; ++t) {
      const auto row = random_floats(in_width, seed * 1000 + static_cast<std::uint64_t>(t));
      in.insert(in.end(), row.begin(), row.end());
    }
    run({in.data(), DType::float32, n, in_width}, {out.data(), DType::float32, n, out_width});
    outputs.insert(outputs.end(), out.begin(), out.end());
  };
  const auto taps = random_floats(kConv.inner_size * kConv.kernel_size, 99);
  for (int i : {0, 3}) {
    layer(2 * kConv.inner_size, kConv.inner_size, [&](const backend::Matrix& in, const backend::Matrix& out) {
      cpu.gated_conv(kConv, taps.data(), batch, in, states, i, out);
    });
  }
  layer(kLinear.num_heads * (2 * kLinear.feature_dim + kLinear.head_dim), kLinear.num_heads * kLinear.head_dim,
        [&](const backend::Matrix& in, const backend::Matrix& out) {
          cpu.linear_attention(kLinear, batch, in, states, 1, out);
        });
  layer((kWindow.num_heads + 2 * kWindow.num_kv_heads) * kWindow.head_dim, kWindow.num_heads * kWindow.head_dim,
        [&](const backend::Matrix& in, const backend::Matrix& out) {
          cpu.sliding_window(kWindow, batch, in, states, 2, out);
        });
  return outputs;
}

std::vector<NamedView> views(const std::vector<NamedTensor>& tensors) {
  std::vector<NamedView> out;
  for (const NamedTensor& t : tensors) out.push_back({t.name, t.tensor.view()});
  return out;
}

void expect_equal(const std::vector<NamedTensor>& a, const std::vector<NamedTensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].name, b[i].name);
    EXPECT_EQ(a[i].tensor.dtype(), b[i].tensor.dtype());
    ASSERT_EQ(a[i].tensor.shape(), b[i].tensor.shape());
    EXPECT_EQ(std::memcmp(a[i].tensor.data(), b[i].tensor.data(), a[i].tensor.nbytes()), 0) << a[i].name;
  }
}

// φ(k) of 5 dimensions, packed (docs/state-format.md).
std::vector<double> features(const float* k) {
  std::vector<double> phi{1};
  for (int i = 0; i < 5; ++i) phi.push_back(k[i] / std::pow(5, 0.25));
  for (int i = 0; i < 5; ++i)
    for (int j = i; j < 5; ++j) phi.push_back(k[i] * k[j] / std::sqrt(i == j ? 10.0 : 5.0));
  return phi;
}

TEST(States, SavedFormHasNamesShapesAndDtypes) {
  CpuBackend cpu = make_cpu();
  for (DType ring : {DType::float32, DType::bfloat16}) {
    const auto states = cpu.make_states(model(), ring, 2);
    for (std::int64_t tokens : {0, 7, 40}) {
      if (tokens > 0) {
        cpu.reset_state(*states, 1);
        advance(cpu, *states, 1, 0, tokens);
      }
      const auto saved = cpu.export_state(*states, 1, tokens);
      const std::vector<std::string> names{"layers.0.conv", "layers.1.taylor", "layers.2.keys", "layers.2.values",
                                           "layers.3.conv"};
      const std::int64_t kept = std::min<std::int64_t>(tokens, 19);
      const std::vector<std::vector<std::int64_t>> shapes{{3, 21}, {3, 21, 19}, {kept, 2, 10}, {kept, 2, 10}, {3, 21}};
      ASSERT_EQ(saved.size(), names.size());
      for (std::size_t i = 0; i < names.size(); ++i) {
        EXPECT_EQ(saved[i].name, names[i]);
        EXPECT_EQ(saved[i].tensor.shape(), shapes[i]);
        EXPECT_EQ(saved[i].tensor.dtype(), i == 2 || i == 3 ? ring : DType::float32);
      }
    }
  }
}

TEST(States, SavedFormHoldsWhatItSays) {
  CpuBackend cpu = make_cpu();
  const auto states = cpu.make_states(model(), DType::float32, 1);
  advance(cpu, *states, 0, 0, 2);
  advance(cpu, *states, 0, 2, 25);
  const auto saved = cpu.export_state(*states, 0, 25);

  const auto* conv = saved[0].tensor.data_as<float>();  // the last u₁, oldest first
  for (std::int64_t i = 0; i < 3; ++i) {
    const auto u = random_floats(2 * 21, static_cast<std::uint64_t>(22 + i));
    for (std::size_t c = 0; c < 21; ++c) EXPECT_EQ(conv[static_cast<std::size_t>(i) * 21 + c], u[c]);
  }

  const std::int64_t H = 3, f = 5, dv = 18;  // Σ φ(k) [v | 1]ᵀ
  std::vector<double> expected(static_cast<std::size_t>(H * 21 * (dv + 1)));
  for (std::int64_t t = 0; t < 25; ++t) {
    const auto qkv = random_floats(H * (2 * f + dv), static_cast<std::uint64_t>(t));
    for (std::int64_t h = 0; h < H; ++h) {
      const std::vector<double> phi = features(qkv.data() + (H + h) * f);
      for (std::int64_t p = 0; p < 21; ++p)
        for (std::int64_t c = 0; c <= dv; ++c)
          expected[static_cast<std::size_t>((h * 21 + p) * (dv + 1) + c)] +=
              phi[static_cast<std::size_t>(p)] * (c < dv ? qkv[static_cast<std::size_t>(2 * H * f + h * dv + c)] : 1);
    }
  }
  for (std::size_t i = 0; i < expected.size(); ++i)
    EXPECT_NEAR(saved[1].tensor.data_as<float>()[i], expected[i], 2e-5) << i;

  const std::int64_t Hkv = 2, hd = 10, n = 5;  // tokens 6 … 24, keys rotated
  for (std::int64_t t = 6; t < 25; ++t) {
    const auto qkv = random_floats((4 + 2 * Hkv) * hd, static_cast<std::uint64_t>(t));
    for (std::int64_t h = 0; h < Hkv; ++h) {
      const float* k = qkv.data() + (4 + h) * hd;
      const float* v = k + Hkv * hd;
      const std::int64_t at = ((t - 6) * Hkv + h) * hd;
      for (std::int64_t i = 0; i < n; ++i) {
        const double angle = static_cast<double>(t) * std::pow(10000.0, -2.0 * static_cast<double>(i) / 10);
        EXPECT_NEAR(saved[2].tensor.data_as<float>()[at + i], k[i] * std::cos(angle) - k[i + n] * std::sin(angle),
                    1e-6);
        EXPECT_NEAR(saved[2].tensor.data_as<float>()[at + i + n], k[i] * std::sin(angle) + k[i + n] * std::cos(angle),
                    1e-6);
      }
      for (std::int64_t i = 0; i < hd; ++i) EXPECT_EQ(saved[3].tensor.data_as<float>()[at + i], v[i]);
    }
  }
}

TEST(States, ImportContinuesBitForBit) {
  CpuBackend cpu = make_cpu();
  for (DType ring : {DType::float32, DType::bfloat16}) {
    for (std::int64_t tokens : {1, 2, 18, 19, 20, 33, 100}) {
      const auto states = cpu.make_states(model(), ring, 1), other = cpu.make_states(model(), ring, 3);
      advance(cpu, *states, 0, 0, tokens);
      const auto saved = cpu.export_state(*states, 0, tokens);
      advance(cpu, *other, 2, 0, 64, 7);  // to be forgotten
      cpu.import_state(*other, 2, tokens, views(saved));
      expect_equal(cpu.export_state(*other, 2, tokens), saved);
      EXPECT_EQ(advance(cpu, *other, 2, tokens, tokens + 1), advance(cpu, *states, 0, tokens, tokens + 1));
      EXPECT_EQ(advance(cpu, *other, 2, tokens + 1, tokens + 50), advance(cpu, *states, 0, tokens + 1, tokens + 50));
      expect_equal(cpu.export_state(*other, 2, tokens + 50), cpu.export_state(*states, 0, tokens + 50));
    }
  }
}

TEST(States, ImportTakesMisalignedDataAndConvertsRings) {
  CpuBackend cpu = make_cpu();
  const auto narrow = cpu.make_states(model(), DType::bfloat16, 1), wide = cpu.make_states(model(), DType::float32, 1);
  advance(cpu, *narrow, 0, 0, 30);
  const auto saved = cpu.export_state(*narrow, 0, 30);
  std::vector<std::vector<std::byte>> shifted;
  std::vector<NamedView> tensors = views(saved);
  for (auto& [name, view] : tensors) {
    shifted.emplace_back(view.nbytes() + 1);
    std::memcpy(shifted.back().data() + 1, view.data, view.nbytes());
    view.data = shifted.back().data() + 1;
  }
  cpu.import_state(*wide, 0, 30, tensors);
  const auto widened = cpu.export_state(*wide, 0, 30);
  for (std::size_t i : {2, 3})
    for (std::int64_t j = 0; j < saved[i].tensor.size(); ++j)
      ASSERT_EQ(widened[i].tensor.data_as<float>()[j], float_from_bf16(saved[i].tensor.data_as<std::uint16_t>()[j]));
  const auto back = cpu.make_states(model(), DType::bfloat16, 1);
  cpu.import_state(*back, 0, 30, views(widened));
  expect_equal(cpu.export_state(*back, 0, 30), saved);
}

// A device that leaves tokens out of its sums: Σ over the first 25, and k, v of the rest beside it.
TEST(States, ImportAddsPendingTokens) {
  CpuBackend cpu = make_cpu();
  const std::int64_t H = kLinear.num_heads, f = kLinear.feature_dim, dv = kLinear.head_dim;
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (const std::int64_t n : {1, 2, 7, 12}) {
      SCOPED_TRACE(std::string(name_of(dtype)) + ", " + std::to_string(n));
      const auto states = cpu.make_states(model(), DType::float32, 1),
                 other = cpu.make_states(model(), DType::float32, 1);
      advance(cpu, *states, 0, 0, 25);
      auto saved = cpu.export_state(*states, 0, 25);
      std::vector<std::vector<float>> parts;  // k, v
      for (const std::int64_t width : {f, dv}) {
        std::vector<float>& x = parts.emplace_back();
        for (std::int64_t t = 25; t < 25 + n; ++t) {
          const auto qkv = random_floats(H * (2 * f + dv), static_cast<std::uint64_t>(t));
          const auto from = qkv.begin() + (width == f ? H * f : 2 * H * f);
          x.insert(x.end(), from, from + H * width);
        }
        // As `dtype` has them: 0.375 · {−2 … 2} is exact in all.
        if (dtype != DType::float32)
          for (float& e : x) e = 0.375f * std::clamp(std::round(e), -2.0f, 2.0f);
      }
      std::vector<double> expected(saved[1].tensor.data_as<float>(),
                                   saved[1].tensor.data_as<float>() + saved[1].tensor.size());
      for (std::int64_t row = 0; row < n * H; ++row) {
        const float* v = parts[1].data() + row * dv;
        const std::vector<double> phi = features(parts[0].data() + row * f);
        for (std::int64_t p = 0; p < 21; ++p)
          for (std::int64_t c = 0; c <= dv; ++c)
            expected[static_cast<std::size_t>((row % H * 21 + p) * (dv + 1) + c)] +=
                phi[static_cast<std::size_t>(p)] * (c < dv ? v[c] : 1);
      }
      auto tensors = views(saved);
      std::vector<Tensor> pending;
      for (std::size_t part = 0; part < 2; ++part) {
        const std::vector<std::int64_t> shape{n, H, part == 0 ? f : dv};
        pending.push_back(Tensor::empty(dtype, shape));
        for (std::size_t i = 0; i < parts[part].size(); ++i) {
          const float x = parts[part][i];
          if (dtype == DType::float32) {
            pending[part].data_as<float>()[i] = x;
          } else if (dtype == DType::bfloat16) {
            pending[part].data_as<std::uint16_t>()[i] = bf16_from_float(x);
          } else {  // of 0, 0.375, 0.75
            const std::uint16_t magnitude = x == 0 ? 0 : std::abs(x) == 0.375f ? 0x3600 : 0x3a00;
            pending[part].data_as<std::uint16_t>()[i] = static_cast<std::uint16_t>(magnitude | (x < 0 ? 0x8000 : 0));
          }
        }
        tensors.insert(tensors.begin() + 2 + static_cast<std::ptrdiff_t>(part),
                       {std::string("layers.1.pending_") + (part == 0 ? "keys" : "values"), pending[part].view()});
      }
      cpu.import_state(*other, 0, 25 + n, tensors);
      const auto moved = cpu.export_state(*other, 0, 25);
      ASSERT_EQ(moved.size(), saved.size());  // nothing is pending here
      for (std::size_t i = 0; i < expected.size(); ++i)
        ASSERT_NEAR(moved[1].tensor.data_as<float>()[i], expected[i], 4e-5) << i;
      EXPECT_EQ(std::memcmp(moved[0].tensor.data(), saved[0].tensor.data(), saved[0].tensor.nbytes()), 0);
      EXPECT_EQ(std::memcmp(moved[4].tensor.data(), saved[4].tensor.data(), saved[4].tensor.nbytes()), 0);
    }
  }
}

TEST(States, CopyAndReset) {
  CpuBackend cpu = make_cpu();
  const auto states = cpu.make_states(model(), DType::bfloat16, 3),
             fresh = cpu.make_states(model(), DType::bfloat16, 1);
  advance(cpu, *states, 0, 0, 30);
  advance(cpu, *states, 1, 0, 12, 3);
  const auto first = cpu.export_state(*states, 0, 30);
  cpu.copy_state(*states, 0, *states, 2, 30);
  cpu.copy_state(*states, 0, *fresh, 0, 30);
  cpu.copy_state(*states, 0, *states, 0, 30);
  expect_equal(cpu.export_state(*states, 2, 30), first);
  expect_equal(cpu.export_state(*fresh, 0, 30), first);
  EXPECT_EQ(advance(cpu, *states, 2, 30, 45), advance(cpu, *fresh, 0, 30, 45));
  expect_equal(cpu.export_state(*states, 0, 30), first);

  const auto expected = advance(cpu, *cpu.make_states(model(), DType::bfloat16, 1), 0, 0, 9);
  cpu.reset_state(*states, 0);
  EXPECT_EQ(advance(cpu, *states, 0, 0, 9), expected);
}

TEST(States, SizesAreThoseOfTheirParts) {
  CpuBackend cpu = make_cpu();
  ModelConfig config;
  config.layers = {SlidingWindowConfig{16, 16, 64, 128, 0.125, false, false, 64, 10000.0, false}};
  EXPECT_EQ(cpu.make_states(config, DType::bfloat16, 1)->nbytes_per_slot(), 2u * 128 * 16 * 64 * 2);
  config.layers = {LinearAttentionConfig{16, 16, 64, 1e-12}};
  EXPECT_EQ(cpu.make_states(config, DType::bfloat16, 1)->nbytes_per_slot(), 16u * (156 * 64 + 160) * 4);
  config.layers = {GatedConvConfig{2048, 3, true}};
  const auto states = cpu.make_states(config, DType::bfloat16, 5);
  EXPECT_EQ(states->nbytes_per_slot(), 2u * 2048 * 4);
  EXPECT_EQ(states->capacity(), 5);
}

TEST(States, RefusesWhatCannotBe) {
  CpuBackend cpu = make_cpu();
  EXPECT_THROW(cpu.make_states(model(), DType::float32, 0), InvalidArgument);
  EXPECT_THROW(cpu.make_states(model(), DType::float16, 1), InvalidArgument);
  ModelConfig huge;
  const std::int64_t big = std::int64_t{1} << 62;
  const std::int64_t large = std::int64_t{1} << 28;  // a product of two is beyond any address space
  const std::vector<MixerConfig> layers{GatedConvConfig{big, big, false},
                                        GatedConvConfig{large, large, false},
                                        LinearAttentionConfig{big, 16, 64, 0},
                                        LinearAttentionConfig{1, big, 1, 0},
                                        LinearAttentionConfig{1, large, 64, 0},
                                        LinearAttentionConfig{large, 1 << 10, 1 << 20, 0},
                                        SlidingWindowConfig{1, 1, 64, big, 1, false, false, 0, 10000.0, false},
                                        SlidingWindowConfig{1, 1, large, large, 1, false, false, 0, 10000.0, false}};
  for (const MixerConfig& layer : layers) {
    huge.layers = {layer};
    EXPECT_THROW(cpu.make_states(huge, DType::float32, 1), std::bad_alloc);
  }
  huge.layers = {GatedConvConfig{1 << 20, 1 << 14, false}};
  EXPECT_THROW(cpu.make_states(huge, DType::float32, std::numeric_limits<int>::max()), std::bad_alloc);
}

// From 2²⁴ tokens on a float32 that counts them by ones stands still.
TEST(States, CountsMoreThan2To24Tokens) {
  constexpr std::int64_t kStart = std::int64_t{1} << 24, kSteps = 4096, kPrompt = 100;
  const std::int64_t heads = kLinear.num_heads, f = kLinear.feature_dim, dv = kLinear.head_dim;
  const std::int64_t features_size = kLinear.num_features(), width = heads * (2 * f + dv);
  ModelConfig config;
  config.layers = {kLinear};
  CpuBackend cpu = make_cpu();
  const auto states = cpu.make_states(config, DType::float32, 1);

  // Some sums with that count.
  Tensor taylor = Tensor::empty(DType::float32, {heads, features_size, dv + 1});
  const auto start = random_floats(taylor.size(), 5);
  std::vector<double> expected(start.begin(), start.end());  // the reference's state
  for (std::int64_t h = 0; h < heads; ++h)
    expected[static_cast<std::size_t>(h * features_size * (dv + 1) + dv)] = static_cast<double>(kStart);
  std::copy(expected.begin(), expected.end(), taylor.data_as<float>());
  const NamedView saved[] = {{"layers.0.taylor", taylor.view()}};
  cpu.import_state(*states, 0, kStart, saved);
  const auto count = [&](std::int64_t num_tokens) {
    return cpu.export_state(*states, 0, num_tokens)[0].tensor.data_as<float>()[dv];
  };
  EXPECT_EQ(count(kStart), static_cast<float>(kStart));

  double error = 0, norm = 0;
  std::int64_t position = kStart;
  const auto feed = [&](std::int64_t n) {
    const auto in = random_floats(n * width, static_cast<std::uint64_t>(position));
    std::vector<float> out(static_cast<std::size_t>(n * heads * dv));
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(n)), offsets{0, static_cast<std::int32_t>(n)};
    const std::int32_t slots[] = {0};
    const std::int64_t positions[] = {position};
    cpu.linear_attention(kLinear, {tokens, offsets, slots, positions},
                         {const_cast<float*>(in.data()), DType::float32, n, width}, *states, 0,
                         {out.data(), DType::float32, n, heads * dv});
    for (std::int64_t t = 0; t < n; ++t)
      for (std::int64_t h = 0; h < heads; ++h) {
        const float* x = in.data() + t * width;
        const auto q = features(x + h * f), k = features(x + (heads + h) * f);
        std::vector<double> y(static_cast<std::size_t>(dv + 1));
        for (std::int64_t p = 0; p < features_size; ++p)
          for (std::int64_t c = 0; c <= dv; ++c) {
            double& s = expected[static_cast<std::size_t>((h * features_size + p) * (dv + 1) + c)];
            s += k[static_cast<std::size_t>(p)] * (c < dv ? x[2 * heads * f + h * dv + c] : 1.0);
            y[static_cast<std::size_t>(c)] += q[static_cast<std::size_t>(p)] * s;
          }
        for (std::int64_t c = 0; c < dv; ++c) {
          const double wanted = y[static_cast<std::size_t>(c)] / (y[static_cast<std::size_t>(dv)] + kLinear.eps);
          const double difference = out[static_cast<std::size_t>((t * heads + h) * dv + c)] - wanted;
          error += difference * difference;
          norm += wanted * wanted;
        }
      }
    position += n;
  };
  for (std::int64_t i = 0; i < kSteps; ++i) feed(1);
  EXPECT_EQ(count(position), static_cast<float>(kStart + kSteps));
  feed(kPrompt);
  EXPECT_EQ(count(position), static_cast<float>(kStart + kSteps + kPrompt));
  EXPECT_LT(std::sqrt(error / norm), 3e-6);
}

// ---- keys and values of all tokens ---------------------------------------------------------------------------------

constexpr FullAttentionConfig kFull{4, 2, 10, 0.3, false, false, 10};

ModelConfig full_model() {
  ModelConfig config;
  config.layers = {kFull, kConv, kFull};
  return config;
}

// A saved state of this many tokens with random keys and values.
std::vector<NamedTensor> random_full_state(std::int64_t tokens, std::uint64_t seed) {
  std::vector<NamedTensor> saved;
  for (const char* name : {"layers.0.keys", "layers.0.values", "layers.1.conv", "layers.2.keys", "layers.2.values"}) {
    const bool conv = std::string(name) == "layers.1.conv";
    saved.push_back({name, conv ? Tensor::empty(DType::float32, {kConv.kernel_size - 1, kConv.inner_size})
                                : Tensor::empty(DType::float32, {tokens, kFull.num_kv_heads, kFull.head_dim})});
    const auto values = random_floats(saved.back().tensor.size(), ++seed);
    std::ranges::copy(values, saved.back().tensor.data_as<float>());
  }
  return saved;
}

TEST(States, AllKeysAreSavedAndCopiedWithoutAnEnd) {
  CpuBackend cpu = make_cpu();
  const auto states = cpu.make_states(full_model(), DType::float32, 3);
  const std::int64_t lengths[] = {0, 1, 15, 255, 256, 257, 1300, 40, 0, 600};  // up and down in one slot
  for (const std::int64_t tokens : lengths) {
    const auto saved = random_full_state(tokens, static_cast<std::uint64_t>(tokens));
    cpu.import_state(*states, 1, tokens, views(saved));
    expect_equal(cpu.export_state(*states, 1, tokens), saved);
    cpu.copy_state(*states, 1, *states, 2, tokens);
    cpu.reset_state(*states, 1);
    expect_equal(cpu.export_state(*states, 2, tokens), saved);
  }
}

TEST(States, AllKeysTakeMemoryByPiecesAndGiveItBack) {
  CpuBackend cpu = make_cpu();
  const auto held = [&] { return cpu.memory().nbytes[static_cast<std::size_t>(backend::MemoryKind::states)].load(); };
  const auto states = cpu.make_states(full_model(), DType::float32, 1024);
  const std::size_t fresh = held();
  const std::size_t piece = 2 * kPieceTokens * 2 * (10 + 16) * sizeof(float);  // layers, tokens, heads, sizes
  const auto reserve = [&](std::int32_t slot, std::int64_t tokens) {
    cpu.reserve_states(*states, {&slot, 1}, {&tokens, 1});
  };
  reserve(3, 1);
  EXPECT_EQ(held(), fresh + piece);
  reserve(3, kPieceTokens);
  EXPECT_EQ(held(), fresh + piece);
  reserve(3, kPieceTokens + 1);
  reserve(3, 5);  // keeps what it has
  EXPECT_EQ(held(), fresh + 2 * piece);
  cpu.copy_state(*states, 3, *states, 4, 5);
  EXPECT_EQ(held(), fresh + 3 * piece);
  cpu.copy_state(*states, 4, *states, 3, 5);
  EXPECT_EQ(held(), fresh + 2 * piece);
  for (const int slot : {3, 4}) cpu.reset_state(*states, slot);
  EXPECT_EQ(held(), fresh);
  EXPECT_EQ(cpu.state_nbytes(full_model(), DType::float32, 17) - cpu.state_nbytes(full_model(), DType::float32, 16),
            piece / (kPieceTokens / kStateLanes));
}

TEST(States, MemoryThatTheMachineLacksIsRefusedBeforeAnythingChanges) {
  CpuBackend cpu = make_cpu();
  ModelConfig config = full_model();
  config.layers.push_back(FullAttentionConfig{64, 64, 128, 0.1});
  const auto states = cpu.make_states(config, DType::float32, 2);
  const auto held = [&] { return cpu.memory().nbytes[static_cast<std::size_t>(backend::MemoryKind::states)].load(); };
  const std::int32_t slots[] = {0, 1};
  const std::int64_t few[] = {20, 30}, many[] = {25, limits::kSize};  // 1.1 TB
  cpu.reserve_states(*states, slots, few);
  const std::size_t before = held();
  EXPECT_THROW_WITH(cpu.reserve_states(*states, slots, many), OutOfMemory, "bytes of states are needed");
  EXPECT_EQ(held(), before);
  cpu.reserve_states(*states, slots, few);
  ASSERT_GT(cpu.available_nbytes(), std::size_t{1} << 20);
}

TEST(States, AvailableMemoryIsTheLeastOfTheMachinesAndTheGroups) {
  const test::TemporaryFolder folder;
  const std::filesystem::path root = folder / "root";
  const auto write = [&](const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  };
  write("proc/meminfo", "MemTotal: 16000 kB\nMemFree: 100 kB\nMemAvailable:    8000 kB\n");
  EXPECT_EQ(available_memory(root), 8000u * 1024);
  write("proc/self/cgroup", "0::/user/job\n");
  write("sys/fs/cgroup/user/job/memory.max", "max\n");
  write("sys/fs/cgroup/user/job/memory.current", "1000\n");
  EXPECT_EQ(available_memory(root), 8000u * 1024);
  write("sys/fs/cgroup/user/memory.max", "5000000\n");
  write("sys/fs/cgroup/user/memory.current", "3000000\n");
  EXPECT_EQ(available_memory(root), 2000000u);
  write("sys/fs/cgroup/user/memory.stat", "anon 5\ninactive_file 1000000\n");
  EXPECT_EQ(available_memory(root), 3000000u);
  write("sys/fs/cgroup/user/memory.current", "9000000\n");
  EXPECT_EQ(available_memory(root), 0u);
  write("proc/self/cgroup", "7:cpu,memory:/box\n3:pids:/\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "700000\n");
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "600000\n");
  EXPECT_EQ(available_memory(root), 100000u);
}

#if defined(__linux__)
// Pages of this process in memory.
std::size_t resident_nbytes() {
  std::size_t all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  return resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

TEST(States, ALargeWindowTakesMemoryWhenItIsUsed) {
  constexpr std::size_t kMegabyte = std::size_t{1} << 20;
  ModelConfig config;
  config.layers = {kLinear, SlidingWindowConfig{16, 16, 64, 131072, 1, false, false, 0, 10000.0, false}, kConv};
  CpuBackend cpu = make_cpu();
  const std::size_t before = resident_nbytes();
  const auto start = std::chrono::steady_clock::now();
  const auto states = cpu.make_states(config, DType::float32, 64);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(500));  // zeroing 69 GB takes longer
  EXPECT_LT(resident_nbytes(), before + 10 * kMegabyte);
  EXPECT_GT(states->nbytes_per_slot(), 1024 * kMegabyte);
  EXPECT_EQ(cpu.memory().nbytes[static_cast<std::size_t>(backend::MemoryKind::states)], 64 * states->nbytes_per_slot());

  const auto& pool = static_cast<const CpuStatePool&>(*states);
  constexpr std::size_t kUsed = 200 * kMegabyte;
  const auto is_zero = [](const std::byte* data, std::size_t nbytes) {
    return std::all_of(data, data + nbytes, [](std::byte byte) { return byte == std::byte{0}; });
  };
  for (const int slot : {0, 63}) {
    std::byte* const begin = pool.slot(slot);
    std::byte* const end = begin + states->nbytes_per_slot();
    EXPECT_TRUE(is_zero(begin, kMegabyte));
    std::memset(begin, 0x55, kUsed);
    std::memset(end - kMegabyte, 0x55, kMegabyte);
    EXPECT_GT(resident_nbytes(), before + kUsed / 2);
    cpu.reset_state(*states, slot);
    EXPECT_LT(resident_nbytes(), before + 10 * kMegabyte);
    EXPECT_TRUE(is_zero(begin, 2 * kMegabyte));
    EXPECT_TRUE(is_zero(end - 2 * kMegabyte, 2 * kMegabyte));
  }
}

// What a session does with a long state costs what the sequence has seen of it.
// A session of 1,024 sequences that may each have all of the memory, its forks and checkpoints.
TEST(States, ManySequencesOfAnyLengthTakeWhatTheyHold) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the sanitizer keeps memory of its own beside every page";
#endif
  constexpr std::size_t kMegabyte = std::size_t{1} << 20;
  ModelConfig config = test::tiny_config();
  config.layers = {FullAttentionConfig{16, 16, 64, 0.1, false, false, 64}};
  const auto model = Model::random(config, 3);
  const std::size_t before = resident_nbytes();
  Session session(model, 1024);
  const std::vector<std::vector<std::int32_t>> prompts{test::random_tokens(300, 2)};
  const std::vector<int> one{7};
  session.prefill(prompts, one);
  std::vector<std::unique_ptr<Session>> forks;
  std::vector<std::unique_ptr<Checkpoint>> checkpoints;
  for (int i = 0; i < 4; ++i) {
    forks.push_back(session.fork());
    forks.back()->step(std::vector<std::int32_t>{1}, one);
    checkpoints.push_back(forks.back()->checkpoint());
  }
  EXPECT_LT(resident_nbytes(), before + 60 * kMegabyte);  // 9 times 2.5 MB, and what each session has of its own
  EXPECT_LT(session.state_nbytes(), 3 * kMegabyte);
  EXPECT_LT(checkpoints[0]->state_nbytes(), 3 * kMegabyte);
}

TEST(States, ForksAndCheckpointsOfLongWindowsTakeWhatTheyHold) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the sanitizer keeps memory of its own beside every page";
#endif
  constexpr std::size_t kMegabyte = std::size_t{1} << 20;
  ModelConfig config = test::unlimited_config();
  SlidingWindowConfig window = std::get<SlidingWindowConfig>(config.layers[2]);
  window.num_heads = window.num_kv_heads = 4;
  window.head_dim = 64;
  window.window = 131'072;
  config.layers[2] = window;
  const auto model = Model::random(config, 3);
  EXPECT_GT(model->state_nbytes(), 256 * kMegabyte);
  Session session(model, 2);
  const std::vector<std::vector<std::int32_t>> prompts{test::random_tokens(40, 1), test::random_tokens(300, 2)};
  session.prefill(prompts);
  const std::vector<std::int32_t> next{3, 4};
  const std::size_t before = resident_nbytes();
  std::vector<std::unique_ptr<Session>> forks;
  std::vector<std::unique_ptr<Checkpoint>> checkpoints;
  for (int i = 0; i < 6; ++i) {
    forks.push_back(session.fork());
    forks.back()->step(next);
    checkpoints.push_back(forks.back()->checkpoint());
  }
  EXPECT_LT(resident_nbytes(), before + 100 * kMegabyte);  // 7 GB would be all of them
  EXPECT_LT(session.state_nbytes(), 2 * kMegabyte);
  EXPECT_LT(session.snapshot(0)->nbytes(), session.snapshot(1)->nbytes());
  forks[0]->prefill(prompts);
  forks[0]->rollback(*checkpoints[0]);
  forks[1]->copy(0, 1);
  forks[1]->copy(1, 0);
  session.step(next);
  const Tensor again = forks[0]->step(next), twice = session.step(next);
  EXPECT_EQ(std::memcmp(again.data(), twice.data(), again.nbytes()), 0);
  EXPECT_LT(resident_nbytes(), before + 100 * kMegabyte);
}
#endif

}  // namespace
}  // namespace based::cpu
