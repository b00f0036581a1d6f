#include "based/tensor.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "based/error.h"
#include "io/convert_dtype.h"
#include "temporary_folder.h"

namespace based {
namespace {

TEST(DType, NamesAndSizes) {
  for (int i = 0; i <= static_cast<int>(DType::float8_e5m2); ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(parse_dtype(name_of(dtype)), dtype);
    EXPECT_GT(size_of(dtype), 0u);
  }
  EXPECT_EQ(name_of(DType::bfloat16), "bfloat16");
  EXPECT_EQ(name_of(DType::float8_e5m2), "float8_e5m2");
  EXPECT_EQ(size_of(DType::float32), 4u);
  EXPECT_EQ(size_of(DType::float16), 2u);
  EXPECT_EQ(size_of(DType::int64), 8u);
  EXPECT_EQ(size_of(DType::boolean), 1u);
  EXPECT_THROW_WITH(parse_dtype("float31"), InvalidArgument, "found \"float31\", expected one of float32, bfloat16");
  EXPECT_THROW(parse_dtype(""), InvalidArgument);
}

TEST(Device, ParseIsTheInverseOfStr) {
  EXPECT_EQ(Device::parse("cpu"), Device{});
  EXPECT_EQ(Device::parse("cuda"), (Device{Device::Type::cuda, 0}));
  EXPECT_EQ(Device::parse("cuda:12"), (Device{Device::Type::cuda, 12}));
  for (const char* text : {"cpu", "cuda:0", "cuda:12"}) EXPECT_EQ(Device::parse(text).str(), text);
  for (const char* text :
       {"", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:+1", "cuda:1x", "cuda: 1", "cuda:99999999999"}) {
    EXPECT_THROW_WITH(Device::parse(text), InvalidArgument, "expected cpu, cuda or cuda:N");
  }
}

TEST(Shape, ElementsAndText) {
  EXPECT_EQ(shape_str({2, 3}), "(2, 3)");
  EXPECT_EQ(shape_str({}), "()");
  EXPECT_EQ(num_elements({}), 1);
  EXPECT_EQ(num_elements({2, 3, 4}), 24);
  const std::int64_t big = std::int64_t{1} << 40;
  EXPECT_EQ(num_elements({big, 0, big}), 0);
  EXPECT_THROW_WITH(num_elements({big, big}), InvalidArgument, "2^63 or more elements");
  EXPECT_THROW_WITH(num_elements({0, -1}), InvalidArgument, "negative extent");
}

TEST(Tensor, EmptyIsAlignedAndShared) {
  const Tensor a = Tensor::empty(DType::bfloat16, {3, 5});
  EXPECT_EQ(a.nbytes(), 30u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.data()) % 64, 0u);
  std::memset(a.data(), 7, a.nbytes());
  const Tensor b = a;
  EXPECT_EQ(b.data(), a.data());
  EXPECT_EQ(b.view().nbytes(), 30u);
  EXPECT_NE(Tensor::empty(DType::float32, {0, 4}).data(), nullptr);
  EXPECT_THROW(Tensor::empty(DType::float32, {std::int64_t{1} << 61}), std::bad_alloc);
  EXPECT_THROW(Tensor::empty(DType::float32, {-1}), InvalidArgument);
}

// ---- convert ------------------------------------------------------------------------------------------------------

template <class To, class From>
std::vector<To> converted(const std::vector<From>& values, DType from, DType to) {
  // Misaligned on both sides, as files may be.
  std::vector<std::byte> source(values.size() * sizeof(From) + 1);
  std::memcpy(source.data() + 1, values.data(), values.size() * sizeof(From));
  std::vector<std::byte> target(values.size() * sizeof(To) + 1);
  io::convert({from, {static_cast<std::int64_t>(values.size())}, source.data() + 1}, to, target.data() + 1);
  std::vector<To> result(values.size());
  std::memcpy(result.data(), target.data() + 1, result.size() * sizeof(To));
  return result;
}

struct Format16 {
  DType dtype;
  int exponent_bits;
  int mantissa_bits;
};

constexpr Format16 kFormats16[] = {{DType::bfloat16, 8, 7}, {DType::float16, 5, 10}};

/// The value of 16 bits by the definition of IEEE 754.
double value_of(std::uint16_t bits, const Format16& format) {
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int max_exponent = (1 << format.exponent_bits) - 1;
  const int exponent = (bits >> format.mantissa_bits) & max_exponent;
  const int bias = max_exponent / 2;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == max_exponent) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - format.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << format.mantissa_bits), exponent - bias - format.mantissa_bits);
}

/// Nearest, ties to even, by search among all finite values and infinity.
std::uint16_t nearest(double x, const Format16& format) {
  const int infinity = ((1 << format.exponent_bits) - 1) << format.mantissa_bits;
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::abs(x);
  int low = 0, high = infinity;  // value(low) ≤ magnitude < value(high), where infinity stands for the next power of 2
  const auto value = [&](int bits) {
    return bits == infinity ? std::ldexp(1.0, 1 << (format.exponent_bits - 1))
                            : value_of(static_cast<std::uint16_t>(bits), format);
  };
  if (magnitude >= value(infinity)) return static_cast<std::uint16_t>(sign | infinity);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (value(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - value(low), above = value(high) - magnitude;
  const int best = below < above ? low : above < below ? high : (low % 2 ? high : low);
  return static_cast<std::uint16_t>(sign | best);
}

TEST(Convert, Reads16BitFormatsExactly) {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  for (const Format16& format : kFormats16) {
    const auto singles = converted<float>(all, format.dtype, DType::float32);
    const auto doubles = converted<double>(all, format.dtype, DType::float64);
    const auto back = converted<std::uint16_t>(singles, DType::float32, format.dtype);
    const auto back_from_double = converted<std::uint16_t>(doubles, DType::float64, format.dtype);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double expected = value_of(all[i], format);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(singles[i]) && std::isnan(doubles[i])) << i;
        ASSERT_TRUE(std::isnan(value_of(back[i], format)) && std::isnan(value_of(back_from_double[i], format))) << i;
        continue;
      }
      ASSERT_EQ(singles[i], expected) << i;
      ASSERT_EQ(doubles[i], expected) << i;
      ASSERT_EQ(back[i], all[i]);
      ASSERT_EQ(back_from_double[i], all[i]);
    }
  }
}

TEST(Convert, RoundsToNearestEvenOnce) {
  std::mt19937_64 random(11);
  for (const Format16& format : kFormats16) {
    std::vector<double> doubles;
    std::vector<float> singles;
    for (int bits = 0; bits < 0x7fff; bits += 3) {  // values, ties, and their neighbours in float64 and float32
      const double a = value_of(static_cast<std::uint16_t>(bits), format);
      const double b = value_of(static_cast<std::uint16_t>(bits + 1), format);
      if (!std::isfinite(a) || !std::isfinite(b)) continue;
      const double tie = (a + b) / 2;
      for (const double x : {a, tie, std::nextafter(tie, 0.0), std::nextafter(tie, b), tie * (1 + 0x1p-40)}) {
        doubles.push_back(bits % 2 ? x : -x);
      }
      const auto single = static_cast<float>(tie);
      for (const float x : {single, std::nextafter(single, 0.0f), std::nextafter(single, static_cast<float>(b))}) {
        singles.push_back(bits % 2 ? x : -x);
      }
    }
    for (int i = 0; i < 200000; ++i) {
      const auto bits = random();
      const auto single = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
      if (std::isfinite(single)) singles.push_back(single);
      doubles.push_back(std::ldexp(static_cast<double>(bits >> 11), static_cast<int>(random() % 340) - 240));
    }
    for (const double x : {0.0, -0.0, 65519.0, 65519.999999999, 65520.0, -65520.0, 1e300, 0x1p-25, 0x1.8p-25, 0x1p-150,
                           5e-324, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
      doubles.push_back(x);
      singles.push_back(static_cast<float>(x));
    }
    const auto from_doubles = converted<std::uint16_t>(doubles, DType::float64, format.dtype);
    for (std::size_t i = 0; i < doubles.size(); ++i)
      ASSERT_EQ(from_doubles[i], nearest(doubles[i], format)) << doubles[i];
    const auto from_singles = converted<std::uint16_t>(singles, DType::float32, format.dtype);
    for (std::size_t i = 0; i < singles.size(); ++i)
      ASSERT_EQ(from_singles[i], nearest(singles[i], format)) << singles[i];
  }
}

TEST(Convert, NanStaysNan) {
  const std::vector<std::uint32_t> nans = {0x7f800001, 0xff800001, 0x7fffffff, 0x7f8fffff, 0x7fc00000};
  for (const Format16& format : kFormats16) {
    for (const std::uint16_t h : converted<std::uint16_t>(nans, DType::float32, format.dtype)) {
      EXPECT_TRUE(std::isnan(value_of(h, format))) << h;
    }
    const std::vector<std::uint64_t> wide = {0x7ff0000000000001, 0xffffffffffffffff};
    for (const std::uint16_t h : converted<std::uint16_t>(wide, DType::float64, format.dtype)) {
      EXPECT_TRUE(std::isnan(value_of(h, format))) << h;
    }
  }
}

TEST(Convert, BetweenFloatsAndOtherDTypes) {
  const std::vector<double> x = {1.0 / 3, -1e-310, 1e39, -0.0};
  const auto singles = converted<float>(x, DType::float64, DType::float32);
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(singles[i]), std::bit_cast<std::uint32_t>(static_cast<float>(x[i])));
  }
  EXPECT_EQ(converted<double>(x, DType::float64, DType::float64), x);
  EXPECT_EQ(converted<std::uint16_t>(std::vector<std::uint16_t>{0x3c00, 0x0001}, DType::float16, DType::bfloat16),
            (std::vector<std::uint16_t>{0x3f80, 0x3380}));
  const std::int64_t integer = 1;
  float out = 0;
  const TensorView view{DType::int64, {1}, reinterpret_cast<const std::byte*>(&integer)};
  EXPECT_THROW_WITH(io::convert(view, DType::float32, &out), InvalidArgument, "cannot convert int64");
  EXPECT_THROW_WITH(io::convert({DType::float32, {1}, view.data}, DType::int8, &out), InvalidArgument, "int8");
}

}  // namespace
}  // namespace based
