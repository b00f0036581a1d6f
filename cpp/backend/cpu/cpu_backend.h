#pragma once

#include <memory>

#include "backend/backend.h"
#include "backend/cpu/cpu_features.h"
#include "backend/cpu/thread_pool.h"

namespace based::cpu {

class Lengths;  // cpu_operands.h

/// Bytes of scratch memory that a mixer's operation takes for a batch, one for each mixer; defined beside the
/// operation.
std::size_t scratch_nbytes(const GatedConvConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const LinearAttentionConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const SlidingWindowConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const FullAttentionConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const SelectiveScanConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const PrefixLinearAttentionConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const GatedDeltaNetConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const Rwkv4Config& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const H3Config& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const HyenaConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const Mamba2Config& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const GatedLinearAttentionConfig& config, const Lengths& lengths, Isa isa, int num_threads);
std::size_t scratch_nbytes(const Rwkv7Config& config, const Lengths& lengths, Isa isa, int num_threads);

/// Of CpuBackend::convolve.
std::size_t conv_scratch_nbytes(std::int64_t kernel_size, const Lengths& lengths, int num_threads);

/// The CPU device. Weights are packed for kernels of the best instruction set of this machine; all operations are
/// synchronous and run on the pool. Kernels are in kernels/, one file per operation; the methods here cut an operation
/// into tasks for the pool.
class CpuBackend final : public backend::DeviceBackend<CpuBackend> {
 public:
  CpuBackend(std::shared_ptr<ThreadPool> pool, Isa isa,
             std::shared_ptr<backend::MemoryCounters> counters = std::make_shared<backend::MemoryCounters>());

  const std::shared_ptr<ThreadPool>& pool() const { return pool_; }

  std::unique_ptr<backend::Backend> sibling() const override;
  Device device() const override { return {}; }
  const backend::MemoryCounters& memory() const override { return *counters_; }
  int num_threads() const override { return pool_->num_threads(); }
  std::string kernel_isa() const override;
  bool deterministic() const override { return true; }
  DType activation_dtype(DType weights) const override;
  DType projection_dtype(DType) const override { return DType::float32; }
  std::int64_t chunk_tokens() const override { return 256; }

  // cpu_backend.cc
  backend::Buffer allocate(std::size_t nbytes, backend::MemoryKind kind) override;
  /// Zeros, aligned to 64 bytes, counted as MemoryKind::states. From 1 MB on, a mapping whose pages take memory when
  /// they are first written, in small pages when `sparse`: a page of 2 MB would take much that is not used. Throws
  /// OutOfMemory.
  backend::Buffer allocate_states(std::size_t nbytes, bool sparse);
  void zero(void* data, std::size_t nbytes) override;
  void copy(void* to, const void* from, std::size_t nbytes) override;
  void copy_from_host(void* device, const void* host, std::size_t nbytes) override;
  void copy_to_host(void* host, const void* device, std::size_t nbytes) override;
  std::shared_ptr<void> allocate_host(std::size_t nbytes) const override;
  bool shares_host_memory() const override { return true; }
  void synchronize() override {}
  std::shared_ptr<const backend::Point> point() override { return nullptr; }
  void trim() noexcept override { scratch_ = {}; }
  void reserve_step(const ModelConfig& config, std::int64_t num_sequences) override;
  void begin(const backend::RaggedBatch&) override {}
  std::int64_t step_rows(std::int64_t num_sequences) const override { return num_sequences; }
  void replay(const backend::StepKey&, const std::function<void()>& operations) override { operations(); }
  bool asynchronous() const override { return false; }
  backend::Buffer pack_float32(const TensorView& tensor) override;

  // cpu_linear.cc
  std::shared_ptr<const backend::LinearWeight> pack_linear(const backend::LinearSource& source, DType dtype) override;
  void embed(const backend::LinearWeight& table, const backend::RaggedBatch& batch, const backend::Matrix& r) override;
  void linear(const backend::LinearWeight& weight, const backend::Matrix& x, const backend::Matrix& y,
              bool accumulate) override;

  // cpu_mixers.cc
  void norm(NormKind kind, double eps, const float* weight, const float* bias, const backend::Matrix& r,
            std::span<const std::int32_t> rows, const backend::Matrix& out) override;
  void gated_conv(const GatedConvConfig& config, const float* taps, const backend::RaggedBatch& batch,
                  const backend::Matrix& u, backend::StatePool& states, int layer, const backend::Matrix& out) override;
  void linear_attention(const LinearAttentionConfig& config, const backend::RaggedBatch& batch,
                        const backend::Matrix& qkv, backend::StatePool& states, int layer,
                        const backend::Matrix& out) override;

  void prefix_linear_attention(const PrefixLinearAttentionConfig& config, const backend::RaggedBatch& batch,
                               const backend::Matrix& qkv, const backend::Matrix& encoder, backend::StatePool& states,
                               int layer, const backend::Matrix& out) override;

  // cpu_softmax_attention.cc
  void sliding_window(const SlidingWindowConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override;
  void full_attention(const FullAttentionConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_selective_scan.cc
  void scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                 const backend::RaggedBatch& batch, const backend::Matrix& xz, backend::StatePool& states, int layer,
                 const backend::Matrix& x) override;
  void selective_scan(const SelectiveScanConfig& config, const backend::ScanOperands& operands,
                      const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
                      const backend::Matrix& out) override;

  // cpu_gated_delta_net.cc
  void gated_delta_net(const GatedDeltaNetConfig& config, const backend::DeltaOperands& operands,
                       const backend::RaggedBatch& batch, const backend::Matrix& u, backend::StatePool& states,
                       int layer, const backend::Matrix& out) override;

  // cpu_rwkv4.cc
  void rwkv4_shift(const Rwkv4Config& config, const std::array<const float*, 3>& mix, const backend::RaggedBatch& batch,
                   const backend::Matrix& x, backend::StatePool& states, int layer,
                   const std::array<backend::Matrix, 3>& mixed) override;
  void rwkv4(const Rwkv4Config& config, const backend::Rwkv4Operands& operands, const backend::RaggedBatch& batch,
             backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_h3.cc
  void h3(const H3Config& config, const backend::H3Operands& operands, const backend::RaggedBatch& batch,
          const backend::Matrix& qkv, backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_hyena.cc
  void hyena(const HyenaConfig& config, const backend::HyenaOperands& operands, const backend::RaggedBatch& batch,
             const backend::Matrix& u, backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_mamba2.cc
  void mamba2(const Mamba2Config& config, const backend::Mamba2Operands& operands, const backend::RaggedBatch& batch,
              backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_gated_linear_attention.cc
  void gated_linear_attention(const GatedLinearAttentionConfig& config, const float* norm,
                              const backend::RaggedBatch& batch, const backend::Matrix& u, const backend::Matrix& a,
                              backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_rwkv7.cc
  void rwkv7_shift(const Rwkv7Config& config, const std::array<const float*, 6>& mix, const backend::RaggedBatch& batch,
                   const backend::Matrix& x, backend::StatePool& states, int layer,
                   const std::array<backend::Matrix, 6>& mixed) override;
  void rwkv7_low_rank(const Rwkv7Config& config, const backend::Matrix& w, const backend::Matrix& g) override;
  void rwkv7(const Rwkv7Config& config, const backend::Rwkv7Operands& operands, const backend::RaggedBatch& batch,
             backend::StatePool& states, int layer, const backend::Matrix& out) override;

  // cpu_sampler.cc
  void token_log_probs(const backend::Matrix& logits, std::int64_t vocab_size, std::span<const std::int32_t> targets,
                       std::span<float> out) override;
  std::unique_ptr<backend::Sampler> make_sampler(std::int64_t vocab_size, int num_rows) override;

  // cpu_states.cc
  std::size_t state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens = kAnyNumber) const override;
  std::size_t available_nbytes() const override;
  std::unique_ptr<backend::StatePool> make_states(const ModelConfig& config, DType dtype, int capacity) override;
  void reserve_states(backend::StatePool& states, std::span<const std::int32_t> slots,
                      std::span<const std::int64_t> num_tokens) override;
  /// Throws OutOfMemory unless the system has so many bytes that nothing was promised yet.
  void check_available(std::size_t nbytes);
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
  /// cpu_mixers.cc: the convolution of the first e = out.cols columns of u, advancing the first part of the layer's
  /// state. out = SiLU(conv + bias), bias null for none; times columns [e, 2e) of u when `gated`.
  void convolve(std::int64_t kernel_size, const float* taps, const float* bias, bool gated,
                const backend::RaggedBatch& batch, const backend::Matrix& u, backend::StatePool& states, int layer,
                const backend::Matrix& out);

  /// linear_attention, and the other where `encoder` is given.
  void taylor_attention(const LinearAttentionConfig& config, std::int64_t enc_length, const backend::RaggedBatch& batch,
                        const backend::Matrix& qkv, const backend::Matrix* encoder, backend::StatePool& states,
                        int layer, const backend::Matrix& out);

  std::shared_ptr<ThreadPool> pool_;
  Isa isa_;
  std::shared_ptr<backend::MemoryCounters> counters_;
  // Scratch memory of the operation that runs. It grows to the largest need so far; an operation takes all of its own
  // before it changes a state.
  std::byte* scratch(std::size_t nbytes);
  backend::Buffer scratch_;

  static constexpr std::size_t kFoundAhead = std::size_t{64} << 20;
  std::size_t found_ = 0;  // bytes that were available when last asked, and are not used yet; at most kFoundAhead
};

}  // namespace based::cpu
