#pragma once

// A backend that fails on purpose: at the k-th operation or allocation from when it is armed. It also hands out memory
// with contents that a test chooses.

#include <atomic>
#include <climits>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace based::test {

/// What a planted fault throws.
struct PlantedFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// When to fail; shared by all backends of one model. Any thread.
class Faults {
 public:
  /// The call after the next k fails. sticky: all later ones fail too, as on a device that is lost.
  void arm(int k, bool sticky) {
    const std::lock_guard lock(mutex_);
    countdown_ = k;
    sticky_ = sticky;
    armed_ = true;
    fired_ = false;
  }
  void disarm() {
    const std::lock_guard lock(mutex_);
    armed_ = false;
  }
  bool fired() const {
    const std::lock_guard lock(mutex_);
    return fired_;
  }

  int num_siblings = 0;           // backends that were made beside the first
  std::optional<std::byte> fill;  // every byte of memory that is allocated
  int max_states = INT_MAX;       // of one pool: there is no memory for more
  bool memory_apart = false;      // says that the device's memory is not the host's
  bool asynchronous = false;      // says that steps are under way when they have been enqueued
  std::int64_t piece = 0;         // not 0: every prompt is cut at all multiples of this
  std::vector<std::pair<std::int64_t, std::int64_t>> pieces;  // then: positions and lengths of what was read
  std::atomic<int> num_refused = 0;
  std::size_t max_workspace = std::numeric_limits<std::size_t>::max();  // bytes at once: there are no more

  void tick(const char* what) {
    const std::lock_guard lock(mutex_);
    if (!armed_) return;
    if (countdown_-- > 0) return;
    fired_ = true;
    if (!sticky_) armed_ = false;
    throw PlantedFault(std::string("planted fault in ") + what);
  }

 private:
  mutable std::mutex mutex_;
  int countdown_ = 0;
  bool armed_ = false, sticky_ = false, fired_ = false;
};

class FaultySampler final : public backend::Sampler {
 public:
  FaultySampler(std::unique_ptr<backend::Sampler> inner, std::shared_ptr<Faults> faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}

  const backend::Sampler* inner() const { return inner_.get(); }

  void assign(int row, const SamplingParams& params, std::uint64_t seed, std::uint32_t sequence,
              std::span<const std::int32_t> prompt, std::span<const std::int32_t> stop_ids,
              std::span<const backend::SeenToken> seen) override {
    faults_->tick("assign");
    inner_->assign(row, params, seed, sequence, prompt, stop_ids, seen);
  }
  void sample(const backend::Matrix& logits, const backend::RaggedBatch& batch) override {
    faults_->tick("sample");
    inner_->sample(logits, batch);
  }
  std::vector<backend::SampledToken> take() override {
    faults_->tick("take");
    return inner_->take();
  }

 private:
  std::unique_ptr<backend::Sampler> inner_;
  std::shared_ptr<Faults> faults_;
};

class FaultyBackend final : public backend::DeviceBackend<FaultyBackend> {
 public:
  FaultyBackend(std::unique_ptr<backend::Backend> inner, std::shared_ptr<Faults> faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}

  std::unique_ptr<backend::Backend> sibling() const override {
    faults_->tick("sibling");
    ++faults_->num_siblings;
    return std::make_unique<FaultyBackend>(inner_->sibling(), faults_);
  }

  Device device() const override { return inner_->device(); }
  const backend::MemoryCounters& memory() const override { return inner_->memory(); }
  int num_threads() const override { return inner_->num_threads(); }
  std::string kernel_isa() const override { return inner_->kernel_isa(); }
  bool deterministic() const override { return inner_->deterministic(); }
  bool shares_host_memory() const override { return !faults_->memory_apart; }
  DType activation_dtype(DType weights) const override { return inner_->activation_dtype(weights); }
  std::size_t state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens) const override {
    return inner_->state_nbytes(config, dtype, num_tokens);
  }
  std::size_t available_nbytes() const override { return inner_->available_nbytes(); }
  DType projection_dtype(DType weights) const override { return inner_->projection_dtype(weights); }
  std::int64_t chunk_tokens() const override { return inner_->chunk_tokens(); }
  std::int64_t piece_tokens() const override { return faults_->piece > 0 ? faults_->piece : inner_->piece_tokens(); }
  std::int64_t cut_tokens() const override { return faults_->piece > 0 ? faults_->piece : inner_->cut_tokens(); }
  std::int64_t step_rows(std::int64_t num_sequences) const override { return inner_->step_rows(num_sequences); }
  bool asynchronous() const override { return faults_->asynchronous || inner_->asynchronous(); }
  void trim() noexcept override { inner_->trim(); }

  backend::Buffer allocate(std::size_t nbytes, backend::MemoryKind kind) override {
    faults_->tick("allocate");
    if (kind == backend::MemoryKind::workspace && nbytes > faults_->max_workspace) {
      ++faults_->num_refused;
      throw OutOfMemory("out of memory: planted");
    }
    backend::Buffer buffer = inner_->allocate(nbytes, kind);
    if (faults_->fill) {
      const std::vector<std::byte> contents(nbytes, *faults_->fill);
      inner_->copy_from_host(buffer.data.get(), contents.data(), nbytes);
    }
    return buffer;
  }
  std::shared_ptr<void> allocate_host(std::size_t nbytes) const override {
    faults_->tick("allocate_host");
    return inner_->allocate_host(nbytes);
  }
  void zero(void* data, std::size_t nbytes) override {
    faults_->tick("zero");
    inner_->zero(data, nbytes);
  }
  void copy(void* to, const void* from, std::size_t nbytes) override {
    faults_->tick("copy");
    inner_->copy(to, from, nbytes);
  }
  void copy_from_host(void* device, const void* host, std::size_t nbytes) override {
    faults_->tick("copy_from_host");
    inner_->copy_from_host(device, host, nbytes);
  }
  void copy_to_host(void* host, const void* device, std::size_t nbytes) override {
    faults_->tick("copy_to_host");
    inner_->copy_to_host(host, device, nbytes);
  }
  void synchronize() override {
    faults_->tick("synchronize");
    inner_->synchronize();
  }
  std::shared_ptr<const backend::Point> point() override {
    faults_->tick("point");
    return inner_->point();
  }
  void reserve_step(const ModelConfig& config, std::int64_t num_sequences) override {
    faults_->tick("reserve_step");
    inner_->reserve_step(config, num_sequences);
  }
  void begin(const backend::RaggedBatch& batch) override {
    faults_->tick("begin");
    for (std::size_t b = 0; b + 1 < batch.offsets.size(); ++b)
      if (faults_->piece > 0 && batch.offsets[b + 1] - batch.offsets[b] > 1)
        faults_->pieces.emplace_back(batch.positions[b], batch.offsets[b + 1] - batch.offsets[b]);
    inner_->begin(batch);
  }
  void replay(const backend::StepKey& key, const std::function<void()>& operations) override {
    faults_->tick("replay");
    inner_->replay(key, operations);
  }
  std::shared_ptr<const backend::LinearWeight> pack_linear(const backend::LinearSource& source, DType dtype) override {
    faults_->tick("pack_linear");
    return inner_->pack_linear(source, dtype);
  }
  backend::Buffer pack_float32(const TensorView& tensor) override {
    faults_->tick("pack_float32");
    return inner_->pack_float32(tensor);
  }
  void embed(const backend::LinearWeight& table, const backend::RaggedBatch& batch, const backend::Matrix& r) override {
    faults_->tick("embed");
    backend::RaggedBatch unwrapped = batch;
    if (const auto* sampler = dynamic_cast<const FaultySampler*>(batch.chosen)) unwrapped.chosen = sampler->inner();
    inner_->embed(table, unwrapped, r);
  }
  void norm(NormKind kind, double eps, const float* weight, const float* bias, const backend::Matrix& r,
            std::span<const std::int32_t> rows, const backend::Matrix& out) override {
    faults_->tick("norm");
    inner_->norm(kind, eps, weight, bias, r, rows, out);
  }
  void linear(const backend::LinearWeight& weight, const backend::Matrix& x, const backend::Matrix& y,
              bool accumulate) override {
    faults_->tick("linear");
    inner_->linear(weight, x, y, accumulate);
  }
  void gated_conv(const GatedConvConfig& config, const float* taps, const backend::RaggedBatch& batch,
                  const backend::Matrix& u, backend::StatePool& states, int layer,
                  const backend::Matrix& out) override {
    faults_->tick("gated_conv");
    inner_->gated_conv(config, taps, batch, u, states, layer, out);
  }
  void linear_attention(const LinearAttentionConfig& config, const backend::RaggedBatch& batch,
                        const backend::Matrix& qkv, backend::StatePool& states, int layer,
                        const backend::Matrix& out) override {
    faults_->tick("linear_attention");
    inner_->linear_attention(config, batch, qkv, states, layer, out);
  }
  void sliding_window(const SlidingWindowConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("sliding_window");
    inner_->sliding_window(config, batch, qkv, states, layer, out);
  }
  void full_attention(const FullAttentionConfig& config, const backend::RaggedBatch& batch, const backend::Matrix& qkv,
                      backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("full_attention");
    inner_->full_attention(config, batch, qkv, states, layer, out);
  }
  void scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                 const backend::RaggedBatch& batch, const backend::Matrix& xz, backend::StatePool& states, int layer,
                 const backend::Matrix& x) override {
    faults_->tick("scan_conv");
    inner_->scan_conv(config, taps, bias, batch, xz, states, layer, x);
  }
  void selective_scan(const SelectiveScanConfig& config, const backend::ScanOperands& operands,
                      const backend::RaggedBatch& batch, backend::StatePool& states, int layer,
                      const backend::Matrix& out) override {
    faults_->tick("selective_scan");
    inner_->selective_scan(config, operands, batch, states, layer, out);
  }
  void prefix_linear_attention(const PrefixLinearAttentionConfig& config, const backend::RaggedBatch& batch,
                               const backend::Matrix& qkv, const backend::Matrix& encoder, backend::StatePool& states,
                               int layer, const backend::Matrix& out) override {
    faults_->tick("prefix_linear_attention");
    inner_->prefix_linear_attention(config, batch, qkv, encoder, states, layer, out);
  }
  void gated_delta_net(const GatedDeltaNetConfig& config, const backend::DeltaOperands& operands,
                       const backend::RaggedBatch& batch, const backend::Matrix& u, backend::StatePool& states,
                       int layer, const backend::Matrix& out) override {
    faults_->tick("gated_delta_net");
    inner_->gated_delta_net(config, operands, batch, u, states, layer, out);
  }
  void rwkv4_shift(const Rwkv4Config& config, const std::array<const float*, 3>& mix, const backend::RaggedBatch& batch,
                   const backend::Matrix& x, backend::StatePool& states, int layer,
                   const std::array<backend::Matrix, 3>& mixed) override {
    faults_->tick("rwkv4_shift");
    inner_->rwkv4_shift(config, mix, batch, x, states, layer, mixed);
  }
  void rwkv4(const Rwkv4Config& config, const backend::Rwkv4Operands& operands, const backend::RaggedBatch& batch,
             backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("rwkv4");
    inner_->rwkv4(config, operands, batch, states, layer, out);
  }
  void h3(const H3Config& config, const backend::H3Operands& operands, const backend::RaggedBatch& batch,
          const backend::Matrix& qkv, backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("h3");
    inner_->h3(config, operands, batch, qkv, states, layer, out);
  }
  void hyena(const HyenaConfig& config, const backend::HyenaOperands& operands, const backend::RaggedBatch& batch,
             const backend::Matrix& u, backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("hyena");
    inner_->hyena(config, operands, batch, u, states, layer, out);
  }
  void mamba2(const Mamba2Config& config, const backend::Mamba2Operands& operands, const backend::RaggedBatch& batch,
              backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("mamba2");
    inner_->mamba2(config, operands, batch, states, layer, out);
  }
  void gated_linear_attention(const GatedLinearAttentionConfig& config, const float* norm,
                              const backend::RaggedBatch& batch, const backend::Matrix& u, const backend::Matrix& a,
                              backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("gated_linear_attention");
    inner_->gated_linear_attention(config, norm, batch, u, a, states, layer, out);
  }
  void rwkv7_shift(const Rwkv7Config& config, const std::array<const float*, 6>& mix, const backend::RaggedBatch& batch,
                   const backend::Matrix& x, backend::StatePool& states, int layer,
                   const std::array<backend::Matrix, 6>& mixed) override {
    faults_->tick("rwkv7_shift");
    inner_->rwkv7_shift(config, mix, batch, x, states, layer, mixed);
  }
  void rwkv7_low_rank(const Rwkv7Config& config, const backend::Matrix& w, const backend::Matrix& g) override {
    faults_->tick("rwkv7_low_rank");
    inner_->rwkv7_low_rank(config, w, g);
  }
  void rwkv7(const Rwkv7Config& config, const backend::Rwkv7Operands& operands, const backend::RaggedBatch& batch,
             backend::StatePool& states, int layer, const backend::Matrix& out) override {
    faults_->tick("rwkv7");
    inner_->rwkv7(config, operands, batch, states, layer, out);
  }
  void token_log_probs(const backend::Matrix& logits, std::int64_t vocab_size, std::span<const std::int32_t> targets,
                       std::span<float> out) override {
    faults_->tick("token_log_probs");
    inner_->token_log_probs(logits, vocab_size, targets, out);
  }
  std::unique_ptr<backend::Sampler> make_sampler(std::int64_t vocab_size, int num_rows) override {
    faults_->tick("make_sampler");
    return std::make_unique<FaultySampler>(inner_->make_sampler(vocab_size, num_rows), faults_);
  }
  std::unique_ptr<backend::StatePool> make_states(const ModelConfig& config, DType dtype, int capacity) override {
    faults_->tick("make_states");
    if (capacity > faults_->max_states) throw OutOfMemory("out of memory: planted");
    return inner_->make_states(config, dtype, capacity);
  }
  void reserve_states(backend::StatePool& states, std::span<const std::int32_t> slots,
                      std::span<const std::int64_t> num_tokens) override {
    faults_->tick("reserve_states");
    inner_->reserve_states(states, slots, num_tokens);
  }
  void copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot,
                  std::int64_t num_tokens) override {
    faults_->tick("copy_state");
    inner_->copy_state(from, from_slot, to, to_slot, num_tokens);
  }
  std::vector<backend::MemoryPiece> state_pieces(const backend::StatePool& states, int slot,
                                                 std::int64_t num_tokens) const override {
    return inner_->state_pieces(states, slot, num_tokens);
  }
  void reset_state(backend::StatePool& states, int slot) override {
    faults_->tick("reset_state");
    inner_->reset_state(states, slot);
  }
  std::vector<backend::NamedTensor> export_state(const backend::StatePool& states, int slot,
                                                 std::int64_t num_tokens) override {
    faults_->tick("export_state");
    return inner_->export_state(states, slot, num_tokens);
  }
  void import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                    std::span<const backend::NamedView> tensors) override {
    faults_->tick("import_state");
    inner_->import_state(states, slot, num_tokens, tensors);
  }

 private:
  std::unique_ptr<backend::Backend> inner_;
  std::shared_ptr<Faults> faults_;
};

}  // namespace based::test
