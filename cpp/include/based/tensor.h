#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace based {

enum class DType : std::uint8_t {
  float32,
  bfloat16,
  float16,
  float64,
  int64,
  int32,
  int16,
  int8,
  uint64,
  uint32,
  uint16,
  uint8,
  boolean,
  float8_e4m3,
  float8_e5m2,
};

/// Bytes per element.
std::size_t size_of(DType dtype);

/// "float32", "bfloat16", …
std::string_view name_of(DType dtype);

/// Inverse of name_of. Throws InvalidArgument for anything else.
DType parse_dtype(std::string_view name);

struct Device {
  enum class Type : std::uint8_t { cpu, cuda };
  Type type = Type::cpu;
  int index = 0;

  /// "cpu", "cuda" or "cuda:N". Throws InvalidArgument for anything else.
  static Device parse(std::string_view text);
  std::string str() const;
  friend bool operator==(const Device&, const Device&) = default;
};

/// "(2, 3)".
std::string shape_str(const std::vector<std::int64_t>& shape);

/// Product of the extents. Throws InvalidArgument when an extent is negative or the product overflows.
std::int64_t num_elements(const std::vector<std::int64_t>& shape);

/// Non-owning, dense, row-major, on the host. `data` may be misaligned (files allow it): read it with memcpy.
struct TensorView {
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;

  std::int64_t size() const { return num_elements(shape); }
  std::size_t nbytes() const { return static_cast<std::size_t>(size()) * size_of(dtype); }
};

/// Dense, row-major, reference-counted: copying a Tensor shares its memory. Contents are mutable through data();
/// concurrent writers must synchronise among themselves.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Device device, DType dtype, std::vector<std::int64_t> shape, std::shared_ptr<void> data);

  /// Uninitialised host memory, aligned to 64 bytes.
  static Tensor empty(DType dtype, std::vector<std::int64_t> shape);

  /// A copy in the memory of `to`: the host, or the device where this tensor is. Waits. Throws InvalidArgument for
  /// another device, OutOfMemory.
  Tensor copy_to(Device to) const;

  void* data() const { return data_.get(); }
  template <typename T>
  T* data_as() const {
    return static_cast<T*>(data_.get());
  }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  std::int64_t size() const { return num_elements(shape_); }
  std::size_t nbytes() const { return static_cast<std::size_t>(size()) * size_of(dtype_); }
  TensorView view() const { return {dtype_, shape_, static_cast<const std::byte*>(data_.get())}; }
  const std::shared_ptr<void>& storage() const { return data_; }

 private:
  Device device_;
  DType dtype_ = DType::float32;
  std::vector<std::int64_t> shape_;
  std::shared_ptr<void> data_;
};

}  // namespace based
