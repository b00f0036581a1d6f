#include "cuda_backend.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "based/error.h"
#include "cuda_error.h"
#include "cuda_linear.h"
#include "cuda_states.h"

namespace based::cuda {

using backend::Buffer;
using backend::LinearWeight;
using backend::Matrix;
using backend::MemoryKind;
using backend::RaggedBatch;

namespace {

const CudaLinearWeight& cuda_weight(const LinearWeight& weight) {
  const auto* cuda = dynamic_cast<const CudaLinearWeight*>(&weight);
  if (cuda == nullptr) throw InvalidArgument("a linear layer of another device");
  return *cuda;
}

CudaStatePool& pool_of(backend::StatePool& states) {
  auto* pool = dynamic_cast<CudaStatePool*>(&states);
  if (pool == nullptr) throw InvalidArgument("states of another device");
  return *pool;
}

const CudaStatePool& pool_of(const backend::StatePool& states) {
  return pool_of(const_cast<backend::StatePool&>(states));
}

constexpr std::int64_t kLeastStepKeys = 1024;

// `least`, doubled until it is the number of keys, with the new one, of the longest sequence that has one token.
std::int64_t room_for_keys(const RaggedBatch& batch, std::int64_t least) {
  std::int64_t longest = 0;
  for (std::size_t b = 0; b < batch.positions.size(); ++b)
    if (batch.offsets[b + 1] - batch.offsets[b] == 1) longest = std::max(longest, batch.positions[b] + 1);
  while (least < longest) least *= 2;
  return least;
}

// Room on the host for the blocks of a state.
struct HostBlocks {
  std::vector<CudaStatePool::Block> on_device, blocks;
  std::vector<std::vector<std::byte>> memory;

  explicit HostBlocks(std::vector<CudaStatePool::Block> source) : on_device(std::move(source)) {
    for (const auto& [data, nbytes] : on_device) {
      memory.emplace_back(nbytes);
      blocks.push_back({memory.back().data(), nbytes});
    }
  }
};

// q, k, v of heads side by side in the columns of one matrix.
QkvView columns(const Matrix& qkv, std::int64_t num_qk_heads, std::int64_t qk_dim, std::int64_t num_kv_heads,
                std::int64_t v_dim) {
  const auto* data = static_cast<const std::byte*>(qkv.data);
  const auto at = [&](std::int64_t column) { return data + static_cast<std::size_t>(column) * size_of(qkv.dtype); };
  return {data,
          at(num_qk_heads * qk_dim),
          at((num_qk_heads + num_kv_heads) * qk_dim),
          qkv.cols,
          qk_dim,
          qkv.cols,
          qk_dim,
          qkv.cols,
          v_dim};
}

}  // namespace

CudaBackend::CudaBackend(int device, bool deterministic)
    : CudaBackend(std::shared_ptr<Shared>(
          new Shared{device, deterministic, std::make_shared<backend::MemoryCounters>(), MemoryReturn(device)})) {}

CudaBackend::CudaBackend(std::shared_ptr<Shared> shared)
    : shared_(std::move(shared)),
      device_(shared_->device),
      stream_(std::make_shared<Stream>(device_)),
      staged_(stream_),
      batches_(stream_),
      recorder_(stream_) {
  const UseDevice use(device_);
  const std::lock_guard lock(recording_mutex());
  cublas_workspace_ = allocate(CublasLt::kWorkspaceBytes, MemoryKind::workspace);
  cublas_lt_ =
      std::make_unique<CublasLt>(cublas_workspace_.data.get(), CublasLt::kWorkspaceBytes, shared_->deterministic);
}

CudaBackend::~CudaBackend() {
  try {
    const UseDevice use(device_);
    const std::lock_guard lock(recording_mutex());
    recorder_.clear();
    cublas_lt_.reset();
    cublas_workspace_ = {};
    scratch_ = {};
    weight_upload_.reset();
    stream_->synchronize("ending a backend");  // so that what was freed can go back to the device
  } catch (const std::exception&) {
    // A device that has failed: there is nothing left to wait for.
  }
}

std::unique_ptr<backend::Backend> CudaBackend::sibling() const {
  return std::unique_ptr<backend::Backend>(new CudaBackend(shared_));
}

std::string CudaBackend::kernel_isa() const {
  const UseDevice use(device_);
  return "sm_" + std::to_string(device_info().compute_capability);
}

// ---- memory --------------------------------------------------------------------------------------------------------

Buffer CudaBackend::allocate(std::size_t nbytes, MemoryKind kind) {
  return backend::counted({stream_->allocate(nbytes), nbytes}, shared_->counters, kind);
}

Buffer CudaBackend::allocate_workspace(std::size_t nbytes) { return allocate(nbytes, MemoryKind::workspace); }

void CudaBackend::zero(void* data, std::size_t nbytes) {
  const UseDevice use(device_);
  check(cudaMemsetAsync(data, 0, nbytes, stream()), "zero");
}

void CudaBackend::copy(void* to, const void* from, std::size_t nbytes) {
  const UseDevice use(device_);
  check(cudaMemcpyAsync(to, from, nbytes, cudaMemcpyDeviceToDevice, stream()), "copy");
}

void CudaBackend::copy_from_host(void* device, const void* host, std::size_t nbytes) {
  const UseDevice use(device_);
  check(cudaMemcpyAsync(device, host, nbytes, cudaMemcpyHostToDevice, stream()), "copy_from_host");
  stream_->synchronize("copy_from_host");
}

void CudaBackend::copy_to_host(void* host, const void* device, std::size_t nbytes) {
  const UseDevice use(device_);
  check(cudaMemcpyAsync(host, device, nbytes, cudaMemcpyDeviceToHost, stream()), "copy_to_host");
  stream_->synchronize("copy_to_host");
}

std::shared_ptr<void> CudaBackend::allocate_host(std::size_t nbytes) const {
  const UseDevice use(device_);
  return allocate_pinned(nbytes);
}

void CudaBackend::synchronize() {
  const UseDevice use(device_);
  stream_->synchronize("synchronize");
  weight_upload_.reset();
}

namespace {

class CudaPoint : public backend::Point {
 public:
  explicit CudaPoint(std::shared_ptr<Stream> stream) : stream_(std::move(stream)) {
    event_.record(stream_->get(), "point");
  }
  void wait() const override { event_.wait("point"); }
  bool is_before(const backend::Backend& backend) const override {
    const auto* const other = dynamic_cast<const CudaBackend*>(&backend);
    return other != nullptr && other->uses(*stream_);
  }

 private:
  const std::shared_ptr<Stream> stream_;
  Event event_;
};

}  // namespace

std::shared_ptr<const backend::Point> CudaBackend::point() {
  const UseDevice use(device_);
  return std::make_shared<CudaPoint>(stream_);
}

void CudaBackend::copy_staged(void* device, const void* host, std::size_t nbytes) {
  constexpr std::size_t kMost = std::size_t{1} << 20;  // of page-locked memory for each copy under way
  if (nbytes > kMost) return copy_from_host(device, host, nbytes);
  const UseDevice use(device_);
  staged_.copy(device, host, nbytes, "copy_staged");
}

void CudaBackend::trim() noexcept {
  recorder_.clear();
  scratch_ = {};
}

// Scratch of one operation: the next one may use it too, for they run in order.
void* CudaBackend::scratch(std::size_t nbytes) {
  if (nbytes > scratch_.nbytes) {
    if (recorder_.recording()) throw Error("a recorded step needs more scratch memory than the step before it");
    scratch_ = {};
    scratch_ = allocate(nbytes, MemoryKind::workspace);
    ++scratch_generation_;
  }
  return scratch_.data.get();
}

// ---- steps ---------------------------------------------------------------------------------------------------------

void CudaBackend::begin(const RaggedBatch& batch) {
  const UseDevice use(device_);
  report_failures();
  device_batch_ = batches_.upload(batch);
  batch_ = batch;
  if (step_keys_ == 0) return;
  const std::int64_t keys = room_for_keys(batch, step_keys_);
  if (keys > step_keys_) ++scratch_generation_;  // recorded steps have no scratch memory for so many
  step_keys_ = keys;
}

const DeviceBatch& CudaBackend::device_batch(const RaggedBatch& batch) {
  if (batch.offsets.data() != batch_.offsets.data()) throw Error("an operation on a batch that was not begun");
  return device_batch_;
}

// 1, 2, 4, 8, then steps of at most an eighth: idle rows cost little, and few sizes are recorded.
std::int64_t CudaBackend::step_rows(std::int64_t num_sequences) const {
  if (num_sequences <= 2) return num_sequences;
  std::int64_t step = num_sequences <= 16 ? 4 : 8;
  while (step * 16 < num_sequences) step *= 2;
  return (num_sequences + step - 1) / step * step;
}

void CudaBackend::after_launch(StepRecorder::Launched launched) { recorder_.after_launch(batch_, std::move(launched)); }

void CudaBackend::replay(const backend::StepKey& key, const std::function<void()>& operations) {
  const UseDevice use(device_);
  // Records hold the addresses of scratch memory and of the batch.
  recorder_.run(key, scratch_generation_ + batches_.generation(), batch_, operations);
}

// ---- operations ----------------------------------------------------------------------------------------------------

void CudaBackend::embed(const LinearWeight& table, const RaggedBatch& batch, const Matrix& r) {
  const UseDevice use(device_);
  const LinearArguments& layer = cuda_weight(table).layer();
  for (const std::int32_t token : batch.tokens)
    if ((token < 0 || token >= layer.rows) && !(token == backend::kChosenToken && batch.chosen != nullptr))
      throw InvalidArgument("token " + std::to_string(token) + " is not one of 0 … " + std::to_string(layer.rows - 1));
  const auto* sampler = dynamic_cast<const CudaSampler*>(batch.chosen);
  cuda::embed(stream(), layer.dtype, layer.weight, layer.k, device_batch(batch),
              sampler == nullptr ? nullptr : sampler->chosen(), static_cast<float*>(r.data));
}

void CudaBackend::norm(NormKind kind, double eps, const float* weight, const float* bias, const Matrix& r,
                       std::span<const std::int32_t> rows, const Matrix& out) {
  const UseDevice use(device_);
  void* device_rows = nullptr;
  if (!rows.empty()) {
    device_rows = scratch(rows.size_bytes());
    copy_staged(device_rows, rows.data(), rows.size_bytes());
  }
  cuda::norm(stream(), kind, static_cast<float>(eps), weight, bias, static_cast<const float*>(r.data), r.cols,
             static_cast<const std::int32_t*>(device_rows), out.rows, out.dtype, out.data);
}

void CudaBackend::linear(const LinearWeight& weight, const Matrix& x, const Matrix& y, bool accumulate) {
  const UseDevice use(device_);
  const CudaLinearWeight& layer = cuda_weight(weight);
  run_linear(stream(), *cublas_lt_, layer, x, y, accumulate, scratch(linear_scratch(layer, x.dtype, x.rows)));
}

void CudaBackend::gated_conv(const GatedConvConfig& config, const float* taps, const RaggedBatch& batch,
                             const Matrix& u, backend::StatePool& states, int layer, const Matrix& out) {
  const UseDevice use(device_);
  cuda::gated_conv(stream(), config, u.dtype, taps, device_batch(batch), u.data, pool_of(states).layer(layer),
                   out.data);
}

void CudaBackend::linear_attention(const LinearAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                   backend::StatePool& states, int layer, const Matrix& out) {
  const UseDevice use(device_);
  const DeviceBatch& tokens = device_batch(batch);
  cuda::linear_attention(stream(), config, qkv.dtype, tokens,
                         columns(qkv, config.num_heads, config.feature_dim, config.num_heads, config.head_dim),
                         pool_of(states).layer(layer), pool_of(states).pending(layer), out.data, out.cols,
                         config.head_dim, scratch(linear_attention_scratch(config, qkv.dtype, tokens)));
}

void CudaBackend::prefix_linear_attention(const PrefixLinearAttentionConfig& config, const RaggedBatch& batch,
                                          const Matrix& qkv, const Matrix& encoder, backend::StatePool& states,
                                          int layer, const Matrix& out) {
  const UseDevice use(device_);
  const DeviceBatch& tokens = device_batch(batch);
  const LinearAttentionConfig attention = config.attention();
  const std::int64_t heads = config.num_heads, f = config.feature_dim;
  const PrefixView prefix{columns(encoder, 0, f, heads, config.head_dim), config.enc_length, batch.begins_a_sequence()};
  cuda::linear_attention(stream(), attention, qkv.dtype, tokens, columns(qkv, heads, f, heads, config.head_dim),
                         pool_of(states).layer(layer), pool_of(states).pending(layer), out.data, out.cols,
                         config.head_dim,
                         scratch(linear_attention_scratch(attention, qkv.dtype, tokens, prefix.is_read)), prefix);
}

void CudaBackend::sliding_window(const SlidingWindowConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                 backend::StatePool& states, int layer, const Matrix& out) {
  const UseDevice use(device_);
  const DeviceBatch& tokens = device_batch(batch);
  cuda::sliding_window(stream(), config, qkv.dtype, tokens,
                       columns(qkv, config.num_heads, config.head_dim, config.num_kv_heads, config.head_dim),
                       pool_of(states).keys_and_values(layer), out.data, out.cols);
}

void CudaBackend::full_attention(const FullAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                 backend::StatePool& states, int layer, const Matrix& out) {
  const UseDevice use(device_);
  const DeviceBatch& tokens = device_batch(batch);
  if (step_keys_ == 0) step_keys_ = room_for_keys(batch, kLeastStepKeys);
  cuda::full_attention(stream(), config, qkv.dtype, tokens,
                       columns(qkv, config.num_heads, config.head_dim, config.num_kv_heads, config.head_dim),
                       pool_of(states).keys_and_values(layer), out.data, out.cols,
                       scratch(full_attention_scratch(config, tokens, step_keys_)), step_keys_);
}

void CudaBackend::scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                            const RaggedBatch& batch, const Matrix& xz, backend::StatePool& states, int layer,
                            const Matrix& x) {
  const UseDevice use(device_);
  cuda::scan_conv(stream(), config, xz.dtype, taps, bias, device_batch(batch), xz.data, pool_of(states).layer(layer),
                  x.data);
}

void CudaBackend::selective_scan(const SelectiveScanConfig& config, const backend::ScanOperands& operands,
                                 const RaggedBatch& batch, backend::StatePool& states, int layer, const Matrix& out) {
  const UseDevice use(device_);
  const ScanInputs inputs{operands.a,      operands.d,       operands.xz.data,
                          operands.x.data, operands.bc.data, operands.dt.data};
  cuda::selective_scan(stream(), config, operands.x.dtype, inputs, device_batch(batch), pool_of(states).layer(layer, 1),
                       out.data);
}

void CudaBackend::gated_delta_net(const GatedDeltaNetConfig& config, const backend::DeltaOperands& operands,
                                  const RaggedBatch& batch, const Matrix& u, backend::StatePool& states, int layer,
                                  const Matrix& out) {
  const UseDevice use(device_);
  const std::size_t needed = gated_delta_net_shared_bytes(config);
  if (const int most = device_info().max_shared_bytes; needed > static_cast<std::size_t>(most))
    throw UnsupportedError("gated_delta_net: heads of " + std::to_string(config.key_dim) + " × " +
                           std::to_string(config.head_dim) + " take " + std::to_string(needed) +
                           " bytes of shared memory, and this GPU has " + std::to_string(most) +
                           ": run the model on the CPU");
  const DeviceBatch& tokens = device_batch(batch);
  const CudaStatePool& pool = pool_of(states);
  const std::size_t qkv_nbytes =
      (static_cast<std::size_t>(tokens.num_tokens * config.channels()) * size_of(u.dtype) + 255) / 256 * 256;
  auto* qkv = static_cast<std::byte*>(scratch(qkv_nbytes + gated_delta_net_scratch(config, u.dtype, tokens)));
  delta_conv(stream(), config, u.dtype, operands.taps, tokens, u.data, u.cols, pool.layer(layer), qkv);
  cuda::gated_delta_net(stream(), config, u.dtype, {operands.norm, operands.log_rate, operands.dt_bias, u.data, u.cols},
                        qkv, tokens, pool.layer(layer, 1), out.data, qkv + qkv_nbytes);
}

void CudaBackend::token_log_probs(const Matrix& logits, std::int64_t vocab_size, std::span<const std::int32_t> targets,
                                  std::span<float> out) {
  const UseDevice use(device_);
  const std::size_t nbytes = targets.size_bytes();
  auto* device_targets = static_cast<std::byte*>(scratch(2 * nbytes));
  std::byte* device_out = device_targets + nbytes;
  copy_staged(device_targets, targets.data(), nbytes);
  cuda::token_log_probs(stream(), static_cast<const float*>(logits.data), logits.rows, logits.cols, vocab_size,
                        reinterpret_cast<const std::int32_t*>(device_targets), reinterpret_cast<float*>(device_out));
  copy_to_host(out.data(), device_out, nbytes);
}

std::unique_ptr<backend::Sampler> CudaBackend::make_sampler(std::int64_t vocab_size, int num_rows) {
  const UseDevice use(device_);
  SamplerHost& host = *this;
  return std::make_unique<CudaSampler>(host, vocab_size, num_rows);
}

// ---- states --------------------------------------------------------------------------------------------------------

std::size_t CudaBackend::available_nbytes() const {
  const UseDevice use(device_);
  return device_memory().free;
}

std::size_t CudaBackend::state_nbytes(const ModelConfig& config, DType dtype, std::int64_t num_tokens) const {
  return StatePlaces(config, dtype).state_nbytes(num_tokens);
}

std::unique_ptr<backend::StatePool> CudaBackend::make_states(const ModelConfig& config, DType dtype, int capacity) {
  if (capacity < 1)
    throw InvalidArgument("capacity of a state pool must be at least 1, got " + std::to_string(capacity));
  auto pool = std::make_unique<CudaStatePool>(config, dtype, capacity);
  Buffer memory = allocate(pool->nbytes(), MemoryKind::states);
  zero(memory.data.get(), memory.nbytes);
  pool->attach(std::move(memory), stream_, shared_->counters);
  return pool;
}

void CudaBackend::reserve_states(backend::StatePool& states, std::span<const std::int32_t> slots,
                                 std::span<const std::int64_t> num_tokens) {
  CudaStatePool& pool = pool_of(states);
  for (std::size_t i = 0; i < slots.size(); ++i)
    if (slots[i] >= 0) pool.reserve(slots[i], num_tokens[i]);
}

void CudaBackend::copy_state(const backend::StatePool& from, int from_slot, backend::StatePool& to, int to_slot,
                             std::int64_t num_tokens) {
  pool_of(to).reserve(to_slot, num_tokens);
  const auto source = pool_of(from).blocks(from_slot, num_tokens), target = pool_of(to).blocks(to_slot, num_tokens);
  for (std::size_t i = 0; i < source.size(); ++i) copy(target[i].data, source[i].data, source[i].nbytes);
}

std::vector<backend::MemoryPiece> CudaBackend::state_pieces(const backend::StatePool& states, int slot,
                                                            std::int64_t num_tokens) const {
  return pool_of(states).blocks(slot, num_tokens);
}

void CudaBackend::reset_state(backend::StatePool& states, int slot) {
  pool_of(states).release(slot, *stream_);
  zero(pool_of(states).slot(slot), pool_of(states).slot_nbytes());
}

std::vector<backend::NamedTensor> CudaBackend::export_state(const backend::StatePool& states, int slot,
                                                            std::int64_t num_tokens) {
  const CudaStatePool& pool = pool_of(states);
  HostBlocks host(pool.blocks(slot, num_tokens));
  for (std::size_t i = 0; i < host.blocks.size(); ++i)
    copy_to_host(host.blocks[i].data, host.on_device[i].data, host.blocks[i].nbytes);
  return pool.save(host.blocks, num_tokens);
}

void CudaBackend::import_state(backend::StatePool& states, int slot, std::int64_t num_tokens,
                               std::span<const backend::NamedView> tensors) {
  CudaStatePool& pool = pool_of(states);
  pool.reserve(slot, num_tokens);
  HostBlocks host(pool.blocks(slot, num_tokens));
  pool.restore(host.blocks, num_tokens, tensors);
  for (std::size_t i = 0; i < host.blocks.size(); ++i)
    copy_from_host(host.on_device[i].data, host.blocks[i].data, host.blocks[i].nbytes);
}

}  // namespace based::cuda
