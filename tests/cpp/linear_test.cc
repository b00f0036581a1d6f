#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "based/error.h"

namespace based::cpu {
namespace {

using backend::LinearSource;
using backend::Matrix;

std::uint16_t bf16_bits(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

float from_bf16_bits(std::uint16_t h) {
  const std::uint32_t u = static_cast<std::uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

double from_f16_bits(std::uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31)
    return mantissa != 0 ? std::nan("") : (h & 0x8000 ? -1 : 1) * std::numeric_limits<double>::infinity();
  const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000 ? -size : size;
}

// A tensor of random numbers, stored one byte off any alignment.
struct Numbers {
  Numbers(DType dtype, std::vector<std::int64_t> shape, float size, std::uint32_t seed) : view_{dtype, shape, nullptr} {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(-size, size);
    const auto n = static_cast<std::size_t>(num_elements(shape));
    bytes_.resize(n * size_of(dtype) + 1);
    for (std::size_t i = 0; i < n; ++i) {
      float value = uniform(random);
      std::byte* p = bytes_.data() + 1 + i * size_of(dtype);
      if (dtype == DType::float32) {
        std::memcpy(p, &value, 4);
      } else {
        // Random float16 of exponent 10 to 13: ± 2⁻⁵ … 2⁻¹.
        const auto half = static_cast<std::uint16_t>((random() & 0x83ffu) | (10 + random() % 4) << 10);
        const std::uint16_t bits = dtype == DType::bfloat16 ? bf16_bits(value) : half;
        value = dtype == DType::bfloat16 ? from_bf16_bits(bits) : static_cast<float>(from_f16_bits(half));
        std::memcpy(p, &bits, 2);
      }
      values.push_back(value);
    }
    view_.data = bytes_.data() + 1;
  }
  const TensorView& view() const { return view_; }
  std::vector<float> values;

 private:
  std::vector<std::byte> bytes_;
  TensorView view_;
};

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::relu_squared:
      return x > 0 ? x * x : 0;
    case Activation::identity:
      break;
  }
  return x;
}

struct Case {
  std::vector<std::int64_t> stacked;  // rows of each weight
  std::int64_t k = 0;
  DType source = DType::float32;
  DType dtype = DType::float32;
  bool bias = false;
  Activation activation = Activation::identity;
  bool gated = false;
};

std::string str(const Case& c) {
  return std::to_string(c.stacked.size()) + " weights of " + std::to_string(c.stacked[0]) + " x " +
         std::to_string(c.k) + " from " + std::string(name_of(c.source)) + " to " + std::string(name_of(c.dtype)) +
         (c.bias ? ", bias" : "") + ", activation " + std::to_string(static_cast<int>(c.activation)) +
         (c.gated ? ", gated" : "");
}

const std::vector<Case>& cases() {
  using enum DType;
  using enum Activation;
  static const std::vector<Case> all = {
      {{1}, 1, float32, float32},
      {{1}, 1, float32, bfloat16},
      {{32}, 64, float32, float32},
      {{32}, 64, bfloat16, bfloat16},
      {{33}, 65, bfloat16, bfloat16, true},
      {{33}, 65, float32, float32, true, silu},
      {{100}, 37, float16, float32, true, gelu},
      {{100}, 37, float16, bfloat16, true, gelu_tanh},
      {{7, 5, 50}, 129, bfloat16, bfloat16, true, sigmoid},
      {{300, 1}, 31, bfloat16, float32, false, relu},
      {{17, 47}, 1030, float32, bfloat16, true, relu_squared},
      {{34}, 65, bfloat16, bfloat16, true, silu, true},
      {{14, 16}, 40, float32, float32, true, gelu, true},
      {{2}, 3, float32, bfloat16, false, identity, true},
      {{600}, 200, bfloat16, bfloat16, false, sigmoid, true},
      {{1100}, 1500, bfloat16, bfloat16, false, identity},  // several blocks of K, several tasks
      {{520}, 2049, float32, float32, true, identity},
  };
  return all;
}

// A packed layer and what it was made of.
struct Layer {
  Layer(CpuBackend& backend, const Case& c) : k(c.k), gated(c.gated), activation(c.activation) {
    LinearSource source;
    source.activation = c.activation;
    source.gated = c.gated;
    const float size = 2.0f / std::sqrt(static_cast<float>(c.k));
    std::uint32_t seed = 1;
    std::vector<Numbers> parts, bias_parts;
    for (const std::int64_t rows : c.stacked) {
      parts.emplace_back(c.source, std::vector<std::int64_t>{rows, c.k}, size, seed++);
      if (c.bias) bias_parts.emplace_back(c.source, std::vector<std::int64_t>{rows}, 1.0f, seed++);
    }
    for (const Numbers& part : parts) {
      source.weights.push_back(part.view());
      weights.insert(weights.end(), part.values.begin(), part.values.end());
    }
    for (const Numbers& part : bias_parts) {
      source.biases.push_back(part.view());
      bias.insert(bias.end(), part.values.begin(), part.values.end());
    }
    if (c.dtype == DType::bfloat16)
      for (float& w : weights) w = from_bf16_bits(bf16_bits(w));
    packed = backend.pack_linear(source, c.dtype);
  }

  // One row of y, and the sum of the products' magnitudes of each column as a measure of rounding.
  void expect(const float* x, std::vector<double>& y, std::vector<double>& magnitude) const {
    const auto rows = static_cast<std::int64_t>(weights.size()) / k;
    std::vector<double> h, size;
    for (std::int64_t n = 0; n < rows; ++n) {
      double sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(n)], norm = std::abs(sum);
      for (std::int64_t i = 0; i < k; ++i) {
        const double product = static_cast<double>(x[i]) * weights[static_cast<std::size_t>(n * k + i)];
        sum += product;
        norm += std::abs(product);
      }
      h.push_back(sum);
      size.push_back(norm);
    }
    const std::size_t m = gated ? h.size() / 2 : h.size();
    y.resize(m);
    magnitude.resize(m);
    for (std::size_t n = 0; n < m; ++n) {
      // relu_squared has slope 2h; the others at most 1.13.
      const double slope = activation == Activation::relu_squared ? 2 * std::abs(h[n]) + 1 : 1.2;
      y[n] = gated ? h[n] * activate(activation, h[m + n]) : activate(activation, h[n]);
      magnitude[n] =
          gated ? size[n] * (1 + std::abs(h[m + n])) + size[m + n] * slope * (1 + std::abs(h[n])) : slope * size[n];
    }
  }

  std::int64_t k;
  bool gated;
  Activation activation;
  std::vector<float> weights, bias;
  std::shared_ptr<const backend::LinearWeight> packed;
};

class LinearOfIsa : public testing::TestWithParam<Isa> {
 protected:
  CpuBackend backend_{std::make_shared<ThreadPool>(3), GetParam()};

  // x W: rows of x as `dtype`, y as `y_dtype`, every buffer fenced by sentinels.
  std::vector<float> apply(const backend::LinearWeight& weight, const std::vector<float>& x, DType dtype,
                           DType y_dtype = DType::float32, const std::vector<float>* onto = nullptr) {
    const std::int64_t k = weight.in_features(), n = weight.out_features();
    const std::int64_t rows = static_cast<std::int64_t>(x.size()) / k;
    std::vector<std::uint16_t> x16;
    for (const float v : x) x16.push_back(bf16_bits(v));
    std::vector<float> x32 = x;
    const auto size = static_cast<std::size_t>(rows * n);
    constexpr float kFence = 12345.0f;
    std::vector<float> y(size + 16, kFence);
    std::vector<std::uint16_t> y16(size + 16, 0x4567);
    if (onto != nullptr) std::copy(onto->begin(), onto->end(), y.begin());
    const bool half = y_dtype == DType::bfloat16;
    backend_.linear(weight, {dtype == DType::bfloat16 ? static_cast<void*>(x16.data()) : x32.data(), dtype, rows, k},
                    {half ? static_cast<void*>(y16.data()) : y.data(), y_dtype, rows, n}, onto != nullptr);
    for (std::size_t i = 0; i < 16; ++i) {
      EXPECT_EQ(y[size + i], kFence);
      EXPECT_EQ(y16[size + i], 0x4567);
    }
    y.resize(size);
    if (half)
      for (std::size_t i = 0; i < size; ++i) y[i] = from_bf16_bits(y16[i]);
    return y;
  }

  // Numbers that are bfloat16 already, so that every dtype of x says the same.
  static std::vector<float> rows_of_x(std::int64_t rows, std::int64_t k) {
    return Numbers(DType::bfloat16, {rows, k}, 1.0f, 77).values;
  }
};

TEST_P(LinearOfIsa, MatchesDoublePrecision) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(str(c));
    const Layer layer(backend_, c);
    ASSERT_EQ(layer.packed->in_features(), c.k);
    for (const std::int64_t rows : {1, 2, 3, 5, 8, 13, 29}) {
      SCOPED_TRACE(std::to_string(rows) + " rows");
      const std::vector<float> x = rows_of_x(rows, c.k);
      const DType activation = backend_.activation_dtype(c.dtype);
      const std::vector<float> y = apply(*layer.packed, x, activation);
      const std::vector<float> base(y.size(), 0.5f);
      const std::vector<float> added = apply(*layer.packed, x, DType::float32, DType::float32, &base);
      const std::vector<float> stored = apply(*layer.packed, x, activation, activation);
      std::vector<double> expected, magnitude;
      const std::size_t n = y.size() / static_cast<std::size_t>(rows);
      for (std::size_t i = 0; i < y.size(); ++i) {
        if (i % n == 0) layer.expect(x.data() + static_cast<std::int64_t>(i / n) * c.k, expected, magnitude);
        // Sequential sums: the error grows like √K, and never beyond K, roundings.
        const double tolerance = 6e-8 * magnitude[i % n] * (4 + std::sqrt(static_cast<double>(c.k)));
        ASSERT_NEAR(y[i], expected[i % n], tolerance) << "row " << i / n << " column " << i % n;
        ASSERT_EQ(added[i], base[i] + y[i]) << "row " << i / n << " column " << i % n;
        ASSERT_EQ(stored[i], activation == DType::bfloat16 ? from_bf16_bits(bf16_bits(y[i])) : y[i]);
      }
    }
  }
}

TEST_P(LinearOfIsa, RowsDoNotDependOnTheBatch) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(str(c));
    const Layer layer(backend_, c);
    const DType activation = backend_.activation_dtype(c.dtype);
    const std::int64_t n = layer.packed->out_features();
    const std::vector<float> x = rows_of_x(40, c.k);
    const std::vector<float> all = apply(*layer.packed, x, activation);
    for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 23, 25}) {
      const std::int64_t first = 40 - rows;
      const std::vector<float> some = apply(*layer.packed, {x.begin() + first * c.k, x.end()}, activation);
      ASSERT_EQ(std::memcmp(some.data(), all.data() + first * n, some.size() * sizeof(float)), 0)
          << rows << " rows differ from the same rows of 40";
    }
  }
}

TEST_P(LinearOfIsa, ThreadsChangeNothing) {
  const Case c{{1100}, 1500, DType::bfloat16, DType::bfloat16};
  const Layer layer(backend_, c);
  const std::vector<float> x = rows_of_x(29, c.k);
  const std::vector<float> y = apply(*layer.packed, x, DType::float32);
  for (const int threads : {1, 2, 16}) {
    backend_ = CpuBackend(std::make_shared<ThreadPool>(threads), GetParam());
    EXPECT_EQ(apply(*layer.packed, x, DType::float32), y);
  }
}

TEST_P(LinearOfIsa, EmbedReadsThePackedRows) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    const std::int64_t vocabulary = 70, d = 33;
    const Layer layer(backend_, {{vocabulary}, d, DType::float32, dtype});
    const std::vector<std::int32_t> tokens = {0, 69, 31, 32, 33, 0};
    std::vector<float> r(tokens.size() * static_cast<std::size_t>(d));
    backend::RaggedBatch batch;
    batch.tokens = tokens;
    const std::vector<std::int32_t> offsets = {0, 6};
    batch.offsets = offsets;
    const Matrix out{r.data(), DType::float32, 6, d};
    backend_.embed(*layer.packed, batch, out);
    for (std::size_t i = 0; i < r.size(); ++i)
      ASSERT_EQ(r[i], layer.weights[static_cast<std::size_t>(tokens[i / 33]) * 33 + i % 33]);
    for (const std::int32_t wrong : {-1, 70}) {
      const std::vector<std::int32_t> bad(6, wrong);
      batch.tokens = bad;
      EXPECT_THROW(backend_.embed(*layer.packed, batch, out), InvalidArgument);
    }
    // Tokens of a prompt beside one that was chosen, and one for which none was.
    const auto sampler = backend_.make_sampler(vocabulary, 2);
    SamplingParams params;
    params.temperature = 0;
    sampler->assign(1, params, 0, 0, tokens, {});
    std::vector<float> logits(static_cast<std::size_t>(vocabulary));
    logits[33] = 1;
    const std::vector<std::int32_t> one{0, 1}, row{1}, mixed{backend::kChosenToken, 69, 31, 32, 33, 0};
    const std::vector<std::int64_t> at{0, 0};
    sampler->sample({logits.data(), DType::float32, 1, vocabulary}, {{}, one, row, at});
    sampler->take();
    const std::vector<std::int32_t> two{0, 1, 6}, chosen{1, 0}, none{0, 1};
    std::vector<float> again(r.size());
    const Matrix fed{again.data(), DType::float32, 6, d};
    backend_.embed(*layer.packed, {mixed, two, chosen, at, sampler.get()}, fed);
    for (std::size_t i = 0; i < r.size(); ++i) ASSERT_EQ(again[i], i < 33 ? layer.weights[33 * 33 + i] : r[i]);
    EXPECT_THROW(backend_.embed(*layer.packed, {mixed, two, none, at, sampler.get()}, fed), InvalidArgument);
  }
}

TEST_P(LinearOfIsa, ActivationsAreAccurateFarOut) {
  // y = act(x): a 1 × 1 layer of weight 1.
  const float one = 1;
  for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::sigmoid,
                                      Activation::relu, Activation::relu_squared}) {
    LinearSource source;
    source.weights = {{DType::float32, {1, 1}, reinterpret_cast<const std::byte*>(&one)}};
    source.activation = activation;
    const auto weight = backend_.pack_linear(source, DType::float32);
    std::vector<float> x;
    for (float v = -12; v <= 12; v += 0.037f) x.push_back(v);
    for (const float v : {-200.0f, -30.0f, 30.0f, 200.0f}) x.push_back(v);
    const std::vector<float> y = apply(*weight, x, DType::float32);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double expected = activate(activation, x[i]);
      ASSERT_NEAR(y[i], expected, 4e-6 * std::abs(expected) + 1e-7 * (1 + std::abs(x[i])))
          << "activation " << static_cast<int>(activation) << " of " << x[i];
    }
    EXPECT_TRUE(std::isnan(apply(*weight, {std::nanf("")}, DType::float32)[0]) || activation == Activation::sigmoid ||
                activation == Activation::relu || activation == Activation::relu_squared);
  }
}

TEST_P(LinearOfIsa, Float16IsReadExactly) {
  std::vector<std::uint16_t> bits;
  for (std::uint32_t h = 0; h < 65536; ++h) bits.push_back(static_cast<std::uint16_t>(h));
  const auto copy = backend_.pack_float32({DType::float16, {65536}, reinterpret_cast<const std::byte*>(bits.data())});
  const auto* values = static_cast<const float*>(copy.data.get());
  for (std::uint32_t h = 0; h < 65536; ++h) {
    const double expected = from_f16_bits(static_cast<std::uint16_t>(h));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(values[h])) << h;
    } else {
      ASSERT_EQ(values[h], static_cast<float>(expected)) << h;
      ASSERT_EQ(std::signbit(values[h]), (h & 0x8000) != 0) << h;
    }
  }
}

TEST_P(LinearOfIsa, RefusesWhatDoesNotFit) {
  const Layer layer(backend_, {{32}, 64, DType::bfloat16, DType::bfloat16});
  std::vector<float> x(128), y(128);
  const auto linear = [&](Matrix a, Matrix b, bool accumulate = false) {
    backend_.linear(*layer.packed, a, b, accumulate);
  };
  const Matrix good_x{x.data(), DType::float32, 2, 64}, good_y{y.data(), DType::float32, 2, 32};
  linear(good_x, good_y);
  EXPECT_THROW(linear({x.data(), DType::float32, 2, 63}, good_y), InvalidArgument);
  EXPECT_THROW(linear({x.data(), DType::float16, 2, 64}, good_y), InvalidArgument);
  EXPECT_THROW(linear(good_x, {y.data(), DType::float32, 1, 32}), InvalidArgument);
  EXPECT_THROW(linear(good_x, {y.data(), DType::float32, 2, 31}), InvalidArgument);
  EXPECT_THROW(linear(good_x, {y.data(), DType::bfloat16, 2, 32}, true), InvalidArgument);

  const auto pack = [&](LinearSource source, DType dtype = DType::float32) { backend_.pack_linear(source, dtype); };
  const auto* bytes = reinterpret_cast<const std::byte*>(x.data());
  const TensorView matrix{DType::float32, {3, 4}, bytes}, vector{DType::float32, {3}, bytes};
  EXPECT_THROW(pack({}), InvalidArgument);
  EXPECT_THROW(pack({{matrix}, {}}, DType::float16), InvalidArgument);
  EXPECT_THROW(pack({{vector}, {}}), InvalidArgument);
  EXPECT_THROW(pack({{matrix, {DType::float32, {3, 5}, bytes}}, {}}), InvalidArgument);
  EXPECT_THROW(pack({{{DType::int32, {3, 4}, bytes}}, {}}), InvalidArgument);
  EXPECT_THROW(pack({{matrix}, {vector, vector}}), InvalidArgument);
  EXPECT_THROW(pack({{matrix}, {{DType::float32, {4}, bytes}}}), InvalidArgument);
  EXPECT_THROW(pack({{matrix}, {}, Activation::silu, true}), InvalidArgument);  // 3 rows have no halves
}

INSTANTIATE_TEST_SUITE_P(Isas, LinearOfIsa, testing::ValuesIn(available_isas()),
                         [](const auto& isa) { return std::string(name_of(isa.param)); });

TEST(ChooseIsa, ObeysTheEnvironmentAndNamesWhatThereIs) {
  const char* before = std::getenv("BASED_CPU_ISA");
  const std::string saved = before == nullptr ? "" : before;
  setenv("BASED_CPU_ISA", "", 1);
  EXPECT_EQ(choose_isa(), available_isas().back());
  setenv("BASED_CPU_ISA", "baseline", 1);
  EXPECT_EQ(choose_isa(), Isa::baseline);
  setenv("BASED_CPU_ISA", "mmx", 1);
  try {
    choose_isa();
    ADD_FAILURE() << "expected UnsupportedError";
  } catch (const UnsupportedError& e) {
    EXPECT_NE(std::string(e.what()).find("\"mmx\""), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("baseline"), std::string::npos) << e.what();
  }
  setenv("BASED_CPU_ISA", saved.c_str(), 1);
}

TEST(Memory, LargeAndSmallBuffersAreAlignedAndWritable) {
  CpuBackend backend(std::make_shared<ThreadPool>(1), Isa::baseline);
  for (const std::size_t nbytes : {std::size_t{0}, std::size_t{1}, std::size_t{4095}, std::size_t{5} << 20}) {
    const backend::Buffer buffer = backend.allocate(nbytes, backend::MemoryKind::workspace);
    EXPECT_EQ(buffer.nbytes, nbytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data.get()) % 64, 0u);
    std::memset(buffer.data.get(), 1, nbytes);
    backend.zero(buffer.data.get(), nbytes);
    const auto* bytes = static_cast<const char*>(buffer.data.get());
    EXPECT_TRUE(nbytes == 0 || bytes[nbytes - 1] == 0);
  }
  EXPECT_THROW(backend.allocate(std::size_t{1} << 60, backend::MemoryKind::workspace), std::bad_alloc);
}

TEST(MakeBackend, ChecksItsArguments) {
  EXPECT_THROW(backend::make_backend({}, -1), InvalidArgument);
  EXPECT_THROW(backend::make_backend({}, 1025), InvalidArgument);
  EXPECT_THROW(backend::make_backend(Device::parse("cuda:1"), 0), UnsupportedError);
  const auto first = backend::make_backend({}, 3);
  EXPECT_EQ(first->num_threads(), 3);
  const auto second = first->sibling();
  EXPECT_EQ(second->num_threads(), 3);
  EXPECT_EQ(second->kernel_isa(), first->kernel_isa());
  EXPECT_EQ(&second->memory(), &first->memory());
  EXPECT_EQ(backend::make_backend({}, 0)->num_threads(), available_cpus());
}

}  // namespace
}  // namespace based::cpu
