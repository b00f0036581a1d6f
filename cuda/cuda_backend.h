#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "batch_upload.h"
#include "cublas_lt.h"
#include "cuda_sampler.h"
#include "kernels.h"
#include "step_recorder.h"
#include "stream.h"
#include "weight_upload.h"

namespace based::cuda {

/// A CUDA device. Every instance has a stream of its own, on which all its operations run asynchronously and in order,
/// and scratch memory of its own; weights are finished when the instance that loaded them is synchronised. States may
/// be used by one instance after another: each is synchronised before the next one begins (Executors::Lease).
class CudaBackend final : public backend::DeviceBackend<CudaBackend>, private SamplerHost {
 public:
  /// Of a device that can be used. `deterministic`: see LoadOptions.
  CudaBackend(int device, bool deterministic);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  std::unique_ptr<backend::Backend> sibling() const override;
  Device device() const override { return {Device::Type::cuda, device_}; }
  const backend::MemoryCounters& memory() const override { return *shared_->counters; }
  int num_threads() const override { return 1; }
  std::string kernel_isa() const override;
  bool deterministic() const override { return shared_->deterministic; }
  DType activation_dtype(DType weights) const override { return weights; }
  DType projection_dtype(DType weights) const override { return weights; }
  std::int64_t chunk_tokens() const override { return 8192; }
  // How prompts' kernels add up depends on where a call begins and ends: on its segments, on whether its last token is
  // alone, on sums that are scaled when they are stored. With `deterministic` every prompt is cut alike.
  static constexpr std::int64_t kExactPiece = 1024;
  std::int64_t piece_tokens() const override { return deterministic() ? kExactPiece : chunk_tokens(); }
  std::int64_t cut_tokens() const override { return deterministic() ? kExactPiece : Backend::cut_tokens(); }

  backend::Buffer allocate(std::size_t nbytes, backend::MemoryKind kind) override;
  void zero(void* data, std::size_t nbytes) override;
  void copy(void* to, const void* from, std::size_t nbytes) override;
  void copy_from_host(void* device, const void* host, std::size_t nbytes) override;
  void copy_to_host(void* host, const void* device, std::size_t nbytes) override;
  std::shared_ptr<void> allocate_host(std::size_t nbytes) const override;
  bool shares_host_memory() const override { return false; }
  void synchronize() override;
  std::shared_ptr<const backend::Point> point() override;
  void trim() noexcept override;

  void begin(const backend::RaggedBatch& batch) override;
  std::int64_t step_rows(std::int64_t num_sequences) const override;
  void replay(const backend::StepKey& key, const std::function<void()>& operations) override;
  bool asynchronous() const override { return true; }
  bool uses(const Stream& stream) const { return stream_.get() == &stream; }

  // weight_upload.cc
  std::shared_ptr<const backend::LinearWeight> pack_linear(const backend::LinearSource& source, DType dtype) override;
  backend::Buffer pack_float32(const TensorView& tensor) override;

  void embed(const backend::LinearWeight& table, const backend::RaggedBatch& batch, const backend::Matrix& r) override;
  void norm(NormKind kind, double eps, const float* weight, const float* bias, const backend::Matrix& r,
            std::span<const std::int32_t> rows, const backend::Matrix& out) override;
  void linear(const backend::LinearWeight& weight, const backend::Matrix& x, const backend::Matrix& y,
              bool accumulate) override;
  void gated_conv(const GatedConvConfig& config, const float* taps, const backend::RaggedBatch& batch,
                  const backend::Matrix& u, backend::StatePool& states, int layer, const backend::Matrix& out) override;
  void linear_attention(const LinearAttentionConfig& config, const backend::RaggedBatch& batch,
                        const backend::Matrix& qkv, backend::StatePool& states, int layer,
                        const backend::Matrix& out) override;
  void prefix_linear_attention(const PrefixLinearAttentionConfig& config, const backend::RaggedBatch& batch,
                               const backend::Matrix& qkv, const backend::Matrix& encoder, backend::StatePool& states,
                               int layer, const backend::Matrix& out) override;
  void sliding_window(const SlidingWindowConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override;
  void full_attention(const FullAttentionConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override;
  void scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                 const backend::RaggedBatch& batch, const backend::Matrix& xz, backend::StatePool& states, int layer,
                 const backend::Matrix& x) override;
  void selective_scan(const SelectiveScanConfig& config, const backend::ScanOperands& operands,
                      const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
                      const backend::Matrix& out) override;
  void gated_delta_net(const GatedDeltaNetConfig& config, const backend::DeltaOperands& operands,
                       const backend::RaggedBatch& batch, const backend::Matrix& u, backend::StatePool& states,
                       int layer, const backend::Matrix& out) override;
  void token_log_probs(const backend::Matrix& logits, std::int64_t vocab_size, std::span<const std::int32_t> targets,
                       std::span<float> out) override;
  std::unique_ptr<backend::Sampler> make_sampler(std::int64_t vocab_size, int num_rows) override;

  std::size_t available_nbytes() const override;
  std::size_t state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens = kAnyNumber) const override;
  std::unique_ptr<backend::StatePool> make_states(const ModelConfig& config, DType dtype, int capacity) override;
  void reserve_states(backend::StatePool& states, std::span<const std::int32_t> slots,
                      std::span<const std::int64_t> num_tokens) override;
  void copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot,
                  std::int64_t num_tokens) override;
  std::vector<backend::MemoryPiece> state_pieces(const backend::StatePool& states, int slot,
                                                 std::int64_t num_tokens) const override;
  void reset_state(backend::StatePool& states, int slot) override;
  std::vector<backend::NamedTensor> export_state(const backend::StatePool& states, int slot,
                                                 std::int64_t num_tokens) override;
  void import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                    std::span<const backend::NamedView> tensors) override;

 private:
  // What siblings share. It outlives their streams and memory.
  struct Shared {
    int device;
    bool deterministic;
    std::shared_ptr<backend::MemoryCounters> counters;
    MemoryReturn memory;
  };
  explicit CudaBackend(std::shared_ptr<Shared> shared);

  // SamplerHost
  cudaStream_t stream() const override { return stream_->get(); }
  const DeviceBatch& device_batch(const backend::RaggedBatch& batch) override;
  backend::Buffer allocate_workspace(std::size_t nbytes) override;
  void after_launch(StepRecorder::Launched launched) override;

  void copy_staged(void* device, const void* host, std::size_t nbytes) override;

  void* scratch(std::size_t nbytes);
  WeightUpload& weight_upload();

  const std::shared_ptr<Shared> shared_;
  const int device_;
  const std::shared_ptr<Stream> stream_;
  backend::Buffer cublas_workspace_;
  std::unique_ptr<CublasLt> cublas_lt_;

  StagedCopies staged_;
  BatchUpload batches_;
  backend::RaggedBatch batch_;  // the one last begun
  DeviceBatch device_batch_;

  backend::Buffer scratch_;
  std::uint64_t scratch_generation_ = 0;
  std::int64_t step_keys_ = 0;  // that a step's scratch memory serves; 0 before the first full attention
  StepRecorder recorder_;

  std::unique_ptr<WeightUpload> weight_upload_;  // from the first weight to synchronize()
};

}  // namespace based::cuda
