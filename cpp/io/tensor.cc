#include "based/tensor.h"

#include <charconv>
#include <cstdint>
#include <limits>
#include <new>
#include <utility>

#include "based/error.h"
#include "io/text.h"

namespace based {

using io::concat;

namespace {

struct DTypeInfo {
  std::string_view name;
  std::size_t size;
};

constexpr DTypeInfo kDTypes[] = {
    // in the order of DType
    {"float32", 4}, {"bfloat16", 2}, {"float16", 2}, {"float64", 8},     {"int64", 8},
    {"int32", 4},   {"int16", 2},    {"int8", 1},    {"uint64", 8},      {"uint32", 4},
    {"uint16", 2},  {"uint8", 1},    {"bool", 1},    {"float8_e4m3", 1}, {"float8_e5m2", 1},
};
static_assert(std::size(kDTypes) == static_cast<std::size_t>(DType::float8_e5m2) + 1);

}  // namespace

std::size_t size_of(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].size; }

std::string_view name_of(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].name; }

DType parse_dtype(std::string_view name) {
  std::string names;
  for (std::size_t i = 0; i < std::size(kDTypes); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
    io::append_item(names, kDTypes[i].name);
  }
  throw InvalidArgument(concat("dtype: found \"", name, "\", expected one of ", names));
}

Device Device::parse(std::string_view text) {
  if (text == "cpu") return {Type::cpu, 0};
  if (text == "cuda") return {Type::cuda, 0};
  constexpr std::string_view kPrefix = "cuda:";
  if (text.starts_with(kPrefix)) {
    const char* const begin = text.data() + kPrefix.size();
    const char* const end = text.data() + text.size();
    int index = 0;
    const auto [stop, error] = std::from_chars(begin, end, index);
    if (error == std::errc() && stop == end && *begin != '-') return {Type::cuda, index};
  }
  throw InvalidArgument(concat("device: found \"", text, "\", expected cpu, cuda or cuda:N"));
}

std::string Device::str() const { return type == Type::cpu ? "cpu" : concat("cuda:", index); }

std::string shape_str(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += concat(i ? ", " : "", shape[i]);
  return concat(text, ")");
}

std::int64_t num_elements(const std::vector<std::int64_t>& shape) {
  std::int64_t product = 1;
  bool zero = false;
  bool overflow = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) throw InvalidArgument(concat("shape ", shape_str(shape), ": found a negative extent"));
    zero |= extent == 0;
    overflow |= __builtin_mul_overflow(product, extent, &product);
  }
  if (zero) return 0;
  if (overflow) throw InvalidArgument(concat("shape ", shape_str(shape), ": found 2^63 or more elements"));
  return product;
}

Tensor::Tensor(Device device, DType dtype, std::vector<std::int64_t> shape, std::shared_ptr<void> data)
    : device_(device), dtype_(dtype), shape_(std::move(shape)), data_(std::move(data)) {}

Tensor Tensor::empty(DType dtype, std::vector<std::int64_t> shape) {
  const auto size = static_cast<std::size_t>(num_elements(shape));
  if (size > std::numeric_limits<std::ptrdiff_t>::max() / size_of(dtype)) throw std::bad_alloc();
  constexpr std::align_val_t kAlignment{64};
  std::shared_ptr<void> data(::operator new(size * size_of(dtype), kAlignment),
                             [](void* p) { ::operator delete(p, kAlignment); });
  return Tensor({}, dtype, std::move(shape), std::move(data));
}

}  // namespace based
