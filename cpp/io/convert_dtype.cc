#include "io/convert_dtype.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "based/error.h"
#include "io/half.h"
#include "io/text.h"

namespace based::io {

namespace {

/// Rounded to odd: rounding the result to nearest in 16 bits equals rounding x itself.
float to_odd(double x) {
  const auto nearest = static_cast<float>(x);
  const double back = nearest;
  const std::uint32_t truncated = std::bit_cast<std::uint32_t>(nearest) - (std::abs(back) > std::abs(x) ? 1u : 0u);
  return std::bit_cast<float>(truncated | (back != x ? 1u : 0u));
}

// Load<D>, Store<D>: an element of dtype D in a file, as the float or double it is converted through.

template <DType>
struct Element;

template <>
struct Element<DType::float32> {
  using Bits = float;
  static float load(float x) { return x; }
  template <class T>
  static float store(T x) {
    return static_cast<float>(x);
  }
};

template <>
struct Element<DType::float64> {
  using Bits = double;
  static double load(double x) { return x; }
  template <class T>
  static double store(T x) {
    return x;
  }
};

template <>
struct Element<DType::bfloat16> {
  using Bits = std::uint16_t;
  static float load(std::uint16_t h) { return float_from_bf16(h); }
  static std::uint16_t store(float x) { return bf16_from_float(x); }
  static std::uint16_t store(double x) { return bf16_from_float(to_odd(x)); }
};

template <>
struct Element<DType::float16> {
  using Bits = std::uint16_t;
  static float load(std::uint16_t h) { return float_from_f16(h); }
  static std::uint16_t store(float x) { return f16_from_float(x); }
  static std::uint16_t store(double x) { return f16_from_float(to_odd(x)); }
};

template <DType From, DType To>
void convert_loop(const std::byte* src, std::byte* out, std::size_t n) {
  using Source = Element<From>;
  using Target = Element<To>;
  for (std::size_t i = 0; i < n; ++i) {
    typename Source::Bits x;
    std::memcpy(&x, src + i * sizeof x, sizeof x);
    const typename Target::Bits y = Target::store(Source::load(x));
    std::memcpy(out + i * sizeof y, &y, sizeof y);
  }
}

[[noreturn]] void fail(DType dtype) {
  throw InvalidArgument(concat("cannot convert ", name_of(dtype), ": expected float32, bfloat16, float16 or float64"));
}

template <DType From>
void convert_from(const std::byte* src, DType to, std::byte* out, std::size_t n) {
  switch (to) {
    case DType::float32:
      return convert_loop<From, DType::float32>(src, out, n);
    case DType::bfloat16:
      return convert_loop<From, DType::bfloat16>(src, out, n);
    case DType::float16:
      return convert_loop<From, DType::float16>(src, out, n);
    case DType::float64:
      return convert_loop<From, DType::float64>(src, out, n);
    default:
      fail(to);
  }
}

}  // namespace

void convert(const TensorView& src, DType dst, void* out) {
  const auto n = static_cast<std::size_t>(src.size());
  auto* const bytes = static_cast<std::byte*>(out);
  switch (src.dtype) {
    case DType::float32:
      return convert_from<DType::float32>(src.data, dst, bytes, n);
    case DType::bfloat16:
      return convert_from<DType::bfloat16>(src.data, dst, bytes, n);
    case DType::float16:
      return convert_from<DType::float16>(src.data, dst, bytes, n);
    case DType::float64:
      return convert_from<DType::float64>(src.data, dst, bytes, n);
    default:
      fail(src.dtype);
  }
}

}  // namespace based::io
