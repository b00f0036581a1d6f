#pragma once

#include <array>
#include <memory>
#include <vector>

#include "based/tensor.h"
#include "stream.h"

namespace based::cuda {

/// Copies tensors from (mapped) files to the device through page-locked memory: one part fills while others are under
/// way, in the order of `stream`. Converts on the device.
class WeightUpload {
 public:
  explicit WeightUpload(std::shared_ptr<Stream> stream);

  /// device (tensor.size()) of `dtype`, aligned to 16 bytes. Has read all of `tensor` when it returns.
  void put(const TensorView& tensor, DType dtype, void* device);

 private:
  static constexpr std::size_t kPartBytes = std::size_t{8} << 20;
  struct Part {
    std::shared_ptr<void> host;
    std::shared_ptr<void> raw;  // on the device, for what is to be converted
    Event copied;
  };

  std::shared_ptr<Stream> stream_;
  std::array<Part, 4> parts_;
  std::size_t next_part_ = 0;
};

}  // namespace based::cuda
