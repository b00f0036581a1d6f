#pragma once

#include <cstddef>
#include <memory>

namespace based::cuda {

/// A range of addresses of one device. Memory is mapped to parts of it when asked for, so that pointers into the range
/// keep their meaning while it fills. Any thread; kept alive by what is mapped to it.
class AddressRange : public std::enable_shared_from_this<AddressRange> {
 public:
  /// Bytes that addresses and memory are handed out in. Throws UnsupportedError where the device cannot map memory.
  static std::size_t granularity(int device);

  /// `nbytes`: a multiple of granularity(). Throws OutOfMemory when there are not so many addresses.
  AddressRange(int device, std::size_t nbytes);
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;

  std::byte* data() const { return data_; }

  /// Memory at data() + offset, both multiples of granularity(), where nothing is mapped: uninitialised, usable when
  /// this returns. Unmapped with its last owner, who first waits for the work that uses it. Throws OutOfMemory with
  /// the bytes needed and free.
  std::shared_ptr<void> map(std::size_t offset, std::size_t nbytes);

 private:
  int device_;
  std::size_t nbytes_;
  std::byte* data_ = nullptr;
};

}  // namespace based::cuda
