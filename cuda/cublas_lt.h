#pragma once

// Matrix products by NVIDIA's cuBLASLt, which is loaded when first needed: the library links to nothing of it.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "based/tensor.h"

namespace based::cuda {

/// What to give to dlopen, in order: the paths added (a directory stands for the library's names in it, anything else
/// for itself), then each name wherever the system's loader looks, and in `folders`.
std::vector<std::string> library_candidates(const std::vector<std::string>& added,
                                            const std::vector<std::string>& folders);

/// Loads cuBLASLt unless it is loaded. Throws UnsupportedError that names every place tried and the remedy.
void require_cublas_lt();

/// y (M, rows) = x (M, k) Wᵀ (+ bias) (+ y), row-major, float32 accumulation; float32 is never rounded to TF32.
struct Product {
  DType dtype = DType::float32;    // of W and x
  DType y_dtype = DType::float32;  // dtype, or float32
  std::int64_t rows = 0, k = 0, m = 0;
  const void* weight = nullptr;
  const void* x = nullptr;
  void* y = nullptr;
  const void* bias = nullptr;  // (rows) y_dtype, or null
  bool accumulate = false;     // y_dtype float32
};

/// One handle, for one thread at a time on the device that was current when it was made. matmul() allocates no device
/// memory and may be captured into a CUDA graph.
class CublasLt {
 public:
  /// `workspace`: device memory, aligned to 256 bytes, that outlives this object; work on one stream at a time.
  /// `row_invariant`: a row of y depends on its row of x alone, to the bit, and not on M.
  CublasLt(void* workspace, std::size_t workspace_bytes, bool row_invariant);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

  bool row_invariant() const { return row_invariant_; }

  /// Rows and extents that fill whole 16-byte vectors, and pointers aligned to them; row_invariant(): a weight for
  /// which there is an algorithm for every M. Where it says no for one M, it does for all.
  bool takes(const Product& product);

  /// Throws DeviceError when the library reports a failure. product: takes().
  void matmul(cudaStream_t stream, const Product& product);

 private:
  struct Algorithm {
    std::uint64_t data[8];
  };
  struct Plan;
  using Key = std::tuple<DType, DType, std::int64_t, std::int64_t, std::int64_t, bool, bool>;

  const Plan& plan_for(const Product& product);
  std::unique_ptr<Plan> describe(const Product& product) const;
  bool accepts(const Plan& plan, const Algorithm& algorithm) const;
  const std::optional<Algorithm>& invariant_algorithm(const Product& product);

  void* workspace_;
  std::size_t workspace_bytes_;
  bool row_invariant_;
  void* handle_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  std::map<Key, std::optional<Algorithm>> invariant_;  // by Key of M = 0
};

}  // namespace based::cuda
