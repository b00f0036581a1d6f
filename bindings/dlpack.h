#pragma once

#include <cstdint>

// The C structures of DLPack (dmlc.github.io/dlpack), as its version 1.0 lays them out.

namespace based::python::dlpack {

inline constexpr std::int32_t kCpu = 1;
inline constexpr std::int32_t kCuda = 2;

enum class TypeCode : std::uint8_t {
  int_ = 0,
  uint = 1,
  float_ = 2,
  bfloat = 4,
  boolean = 6,
  float8_e4m3fn = 10,
  float8_e5m2 = 12,
};

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  TypeCode code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

/// Capsule "dltensor".
struct ManagedTensor {
  static constexpr const char* kCapsule = "dltensor";
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

/// Capsule "dltensor_versioned".
struct ManagedTensorVersioned {
  static constexpr const char* kCapsule = "dltensor_versioned";
  struct {
    std::uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  std::uint64_t flags;  // bit 1: a copy
  Tensor tensor;
};

inline constexpr std::uint64_t kIsCopied = 2;

}  // namespace based::python::dlpack
