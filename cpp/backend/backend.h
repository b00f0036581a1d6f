#pragma once

// The device seam. A device is an implementation of Backend and of the opaque types it makes; nothing above this
// header knows which one runs.

#include <array>
#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "based/config.h"
#include "based/sampling.h"
#include "based/tensor.h"

namespace based::backend {

/// Device memory, freed with its last owner.
struct Buffer {
  std::shared_ptr<void> data;
  std::size_t nbytes = 0;
};

/// Dense row-major matrix in device memory; does not own it.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::float32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

/// What Backend::selective_scan reads. N: numbers of state per channel, e: channels.
struct ScanOperands {
  const float* a = nullptr;  // (N, e) float32, ≤ 0
  const float* d = nullptr;  // (e) float32
  Matrix xz;                 // (tokens, 2e) projection: [·|z]
  Matrix x;                  // (tokens, e) projection
  Matrix bc;                 // (tokens, 2N) projection: [B|C]
  Matrix dt;                 // (tokens, e) projection
};

/// The weights that Backend::gated_delta_net reads, float32.
struct DeltaOperands {
  const float* taps = nullptr;      // (channels, K)
  const float* norm = nullptr;      // (head_dim)
  const float* log_rate = nullptr;  // (H); null without a decay
  const float* dt_bias = nullptr;   // (H); null without a decay
};

/// What Backend::rwkv4 reads. e: channels.
struct Rwkv4Operands {
  const float* decay = nullptr;  // (e) float32, ≤ 0
  const float* first = nullptr;  // (e) float32
  Matrix k, v, r;                // (tokens, e) projection
};

/// The weights that Backend::h3 reads, float32.
struct H3Operands {
  const float* taps = nullptr;    // (H · head_dim, K)
  const float* decay = nullptr;   // (H, 2, M): real and imaginary parts
  const float* weight = nullptr;  // (H, 2, M): of the real and of the imaginary parts of the modes
  const float* skip = nullptr;    // (H)
};

/// The weights that Backend::hyena reads, float32.
struct HyenaOperands {
  const float* taps = nullptr;    // (3e, K)
  const float* bias = nullptr;    // (3e)
  const float* filter = nullptr;  // (L, e)
  const float* skip = nullptr;    // (e)
};

/// What Backend::mamba2 reads and overwrites. e: channels of x and of z.
struct Mamba2Operands {
  const float* taps = nullptr;       // (channels, K) float32
  const float* conv_bias = nullptr;  // (channels) float32; null for none
  const float* norm = nullptr;       // (e) float32
  const float* log_rate = nullptr;   // (H) float32
  const float* d = nullptr;          // (H) float32
  const float* dt_bias = nullptr;    // (H) float32
  Matrix u;                          // (tokens, channels | e for z | H for dt) projection
  Matrix xbc;                        // (tokens, channels) projection: memory for what the convolution makes
};

/// What Backend::rwkv7 reads. e: channels of all heads.
struct Rwkv7Operands {
  const float *k_k = nullptr, *k_a = nullptr, *r_k = nullptr;  // (e) float32
  const float *norm = nullptr, *norm_bias = nullptr;           // (e) float32
  Matrix r, k, v;                                              // (tokens, e) projection
  Matrix w, a, g;                                              // (tokens, e) projection: w and a before σ
};

/// What an allocation is for: Model::memory reports the three apart.
enum class MemoryKind : std::uint8_t { weights, states, workspace };

/// Bytes held on a device for one model, by MemoryKind.
struct MemoryCounters {
  std::array<std::atomic<std::size_t>, 3> nbytes{};
};

/// The buffer, counted until its last owner lets go.
Buffer counted(Buffer buffer, std::shared_ptr<MemoryCounters> counters, MemoryKind kind);

/// Named by a number that no other object of the process has or had.
class Identified {
 public:
  Identified();
  std::uint64_t id() const { return id_; }

 private:
  std::uint64_t id_;
};

class Sampler;

/// In RaggedBatch::tokens: the token that `chosen` chose.
constexpr std::int32_t kChosenToken = -1;

/// Tokens of B sequences packed on one axis of N. Host memory, valid until the next batch is begun.
/// Sequence b owns tokens offsets[b] … offsets[b+1] − 1 (at least one) and state slot slots[b] (all different);
/// its first token stands at position positions[b] (tokens seen before).
struct RaggedBatch {
  std::span<const std::int32_t> tokens;     // (N); empty: kChosenToken for every sequence
  std::span<const std::int32_t> offsets;    // (B + 1), offsets[0] = 0, offsets[B] = N
  std::span<const std::int32_t> slots;      // (B); −1 for a row that only fills up step_rows()
  std::span<const std::int64_t> positions;  // (B)

  /// A sequence of one token, kChosenToken, is fed what this sampler chose last for its row slots[b]. A row for which
  /// it chose none (SampledToken::failure, or nothing was sampled since assign()) must not advance. Where the host
  /// knows every choice, embed() throws InvalidArgument before anything changes; an asynchronous device leaves the row
  /// alone like one of slot −1, and Sampler::sample() of the same batch reports a failure for it again.
  const Sampler* chosen = nullptr;

  /// For Sampler::sample, (B): the row of logits of each sequence; empty: row b.
  std::span<const std::int32_t> logit_rows = {};

  std::int64_t num_tokens() const { return offsets.empty() ? 0 : offsets.back(); }
  std::int64_t num_sequences() const { return static_cast<std::int64_t>(slots.size()); }

  /// Whether a sequence of the batch has seen nothing before it.
  bool begins_a_sequence() const {
    for (std::size_t b = 0; b < slots.size(); ++b)
      if (slots[b] >= 0 && positions[b] == 0) return true;
    return false;
  }
};

/// What a linear layer is made of: y = act(x Wᵀ + b), W the given (rows_i, K) matrices stacked.
struct LinearSource {
  std::vector<TensorView> weights;  // float32, bfloat16 or float16 on the host
  std::vector<TensorView> biases;   // empty, or one (rows_i) per weight
  Activation activation = Activation::identity;
  bool gated = false;  // the stacked rows are [value (m) | gate (m)]: y = value ⊙ act(gate), m columns
};

/// Weights of one linear layer in the device's own layout. Immutable: may be used by many threads.
class LinearWeight {
 public:
  virtual ~LinearWeight() = default;
  virtual std::int64_t in_features() const = 0;
  virtual std::int64_t out_features() const = 0;  // columns of y: half the rows of W when gated
  virtual std::size_t nbytes() const = 0;
};

class Backend;

/// A point in the work of a device that operates asynchronously. Any thread.
class Point {
 public:
  virtual ~Point() = default;

  /// Returns when it is reached. Throws DeviceError when the work before it failed.
  virtual void wait() const = 0;

  /// Whether all that `backend` does from now on comes after it without a wait.
  virtual bool is_before(const Backend& backend) const = 0;
};

/// State of `capacity` sequences (slots): the parts that the mixers' descriptions list (based/mixers), layer by layer,
/// in the device's own layout. A fresh slot is that of a sequence that has seen nothing.
class StatePool : public Identified {
 public:
  virtual ~StatePool() = default;
  virtual int capacity() const = 0;
  virtual std::size_t nbytes_per_slot() const = 0;  // of a sequence that fills every part, without ContextState
};

/// A tensor of a state's saved form.
struct NamedTensor {
  std::string name;
  Tensor tensor;  // on the host
};

/// The same, owned by another.
struct NamedView {
  std::string name;
  TensorView view;
};

/// What penalties know of a token that a sequence has seen.
struct SeenToken {
  std::int32_t token = 0;
  bool in_prompt = false;
  std::int32_t num_outputs = 0;  // how often it was sampled
  friend bool operator==(const SeenToken&, const SeenToken&) = default;
};

struct SampledToken {
  std::int32_t token = 0;
  float logprob = 0;                       // log softmax of the raw logits, over the vocabulary
  std::vector<TokenLogprob> top_logprobs;  // params.logprobs likeliest, best first
  std::string failure;                     // why this row has no token (then it is −1); empty when it has one
};

/// Chooses tokens on the device. Row i holds one sequence's params and the counts of the tokens it has seen.
/// Random numbers: Philox4x32-10 with key = seed and counter = (sequence, position), so a choice depends on nothing
/// else. One thread at a time.
class Sampler : public Identified {
 public:
  virtual ~Sampler() = default;

  /// Starts a sequence in `row`. Penalties count `seen` (each token once), what the sequence saw before, and `prompt`.
  /// `stop_ids` cannot be sampled while fewer than params.min_tokens were. When it throws, the row is as before.
  virtual void assign(int row, const SamplingParams& params, std::uint64_t seed, std::uint32_t sequence,
                      std::span<const std::int32_t> prompt, std::span<const std::int32_t> stop_ids,
                      std::span<const SeenToken> seen = {}) = 0;

  /// Chooses one token for each sequence of the batch (begun before) from its row of logits (M, ≥ vocab_size) float32,
  /// and counts it as output. slots[b] is the sampler row; the chosen token stands behind the batch's. Logits that
  /// leave no choice are a failure of their row alone: it counts no token, the other rows choose as usual.
  virtual void sample(const Matrix& logits, const RaggedBatch& batch) = 0;

  /// What the oldest sample() that was not taken yet chose, by sequence; waits for it. At most kMaxSteps may be
  /// waiting. A row that has no token says why in SampledToken::failure.
  virtual std::vector<SampledToken> take() = 0;

  static constexpr int kMaxSteps = 4;
};

/// Some of a device's memory.
struct MemoryPiece {
  std::byte* data;
  std::size_t nbytes;
};

/// Identifies what a decode step does to which memory, for Backend::replay.
struct StepKey {
  std::int64_t rows = 0;
  std::array<std::uint64_t, 4> ids{};  // of states, workspace, sampler, …
  bool reads_prefix = false;           // a sequence begins, in a model whose layers read what begins it as a whole
  friend auto operator<=>(const StepKey&, const StepKey&) = default;
};

/// One device, as one session sees it. An instance serves one thread at a time; instances of one device are
/// independent, and what they make (weights, buffers, pools) may be used by any instance of the same device.
/// Operations may run asynchronously, in order; synchronize() waits, and reads to the host wait by themselves.
/// Matrix arguments must not overlap unless it is said. "activation" means dtype activation_dtype().
class Backend {
 public:
  virtual ~Backend() = default;

  /// Another instance of the same device, threads, kernels, options and memory counters. Any thread may call it.
  virtual std::unique_ptr<Backend> sibling() const = 0;

  virtual Device device() const = 0;
  virtual const MemoryCounters& memory() const = 0;
  virtual int num_threads() const = 0;
  virtual std::string kernel_isa() const = 0;

  /// LoadOptions::deterministic; a CPU always is.
  virtual bool deterministic() const = 0;

  /// For weights of the given dtype, that of x and of the mixers' outputs, and that of the projections that mixers
  /// read ("projection" below). Throws UnsupportedError for weights of a dtype that the device does not take.
  virtual DType activation_dtype(DType weights) const = 0;
  virtual DType projection_dtype(DType weights) const = 0;

  /// Tokens of a long prompt to advance in one call: enough to be efficient, few enough that the workspace stays
  /// small and a layer ends within a tenth of a second, when an interrupt is heard.
  virtual std::int64_t chunk_tokens() const = 0;

  /// Of these, of one sequence at most.
  virtual std::int64_t piece_tokens() const { return chunk_tokens(); }

  /// Where a prompt may be cut: at multiples of this from its start. Where the device is deterministic() no cut there
  /// changes a bit. Divides piece_tokens(). If it is the same number, every prompt is cut at all of its multiples.
  virtual std::int64_t cut_tokens() const { return 64; }

  // ---- memory ------------------------------------------------------------------------------------------------

  /// Uninitialised, aligned to 64 bytes, counted while it lives. Throws OutOfMemory.
  virtual Buffer allocate(std::size_t nbytes, MemoryKind kind) = 0;
  virtual void zero(void* data, std::size_t nbytes) = 0;
  virtual void copy(void* to, const void* from, std::size_t nbytes) = 0;  // within the device
  virtual void copy_from_host(void* device, const void* host, std::size_t nbytes) = 0;
  virtual void copy_to_host(void* host, const void* device, std::size_t nbytes) = 0;
  virtual void synchronize() = 0;

  /// The point behind all that was enqueued; null where operations are done when they return.
  virtual std::shared_ptr<const Point> point() = 0;

  /// Gives back the memory that is only kept to be used again (scratch, recorded steps). Does not throw.
  virtual void trim() noexcept = 0;

  /// Memory of the host that copies to and from the device are fastest with, aligned to 64 bytes. Any thread. Throws
  /// OutOfMemory.
  virtual std::shared_ptr<void> allocate_host(std::size_t nbytes) const = 0;

  /// Whether the host's memory is the device's: what states take is then the same there as here.
  virtual bool shares_host_memory() const = 0;

  /// Bytes that states may still take, as far as the device knows; the greatest number where it does not. Any thread.
  virtual std::size_t available_nbytes() const { return std::numeric_limits<std::size_t>::max(); }

  // ---- steps -------------------------------------------------------------------------------------------------

  /// Takes the scratch memory of a step of num_sequences sequences of this model, one token each: its operations take
  /// no more. (Operations on several tokens of a sequence take theirs as they begin.) Throws OutOfMemory, and then
  /// nothing has changed. Does nothing where operations need no scratch memory, or have it since the device was opened.
  virtual void reserve_step(const ModelConfig&, std::int64_t /*num_sequences*/) {}

  /// Announces the batch that the operations below are given. Its arrays are copied where needed.
  virtual void begin(const RaggedBatch& batch) = 0;

  /// Rows to give a decode step of `num_sequences` sequences: as many, or a few more so that one recorded step serves
  /// several sizes.
  virtual std::int64_t step_rows(std::int64_t num_sequences) const = 0;

  /// Runs `operations`, which enqueues the operations of one decode step on the batch last begun. A device may record
  /// it and replay the record when called with an equal key, so `operations` depends only on what the key names.
  virtual void replay(const StepKey& key, const std::function<void()>& operations) = 0;

  /// Operations return before they are done: the next step may be enqueued before this one's tokens are taken.
  virtual bool asynchronous() const = 0;

  // ---- weights -----------------------------------------------------------------------------------------------

  /// Packs in `dtype` (rounding to nearest even); biases are kept in float32.
  virtual std::shared_ptr<const LinearWeight> pack_linear(const LinearSource& source, DType dtype) = 0;

  /// A float32 copy of a float32, bfloat16 or float16 tensor.
  virtual Buffer pack_float32(const TensorView& tensor) = 0;

  // ---- operations --------------------------------------------------------------------------------------------

  /// r[n, :] = row tokens[n] of the (vocabulary, d) matrix in `table`; r (N, d) float32. The first operation of a step:
  /// it decides which rows of RaggedBatch::chosen advance.
  virtual void embed(const LinearWeight& table, const RaggedBatch& batch, const Matrix& r) = 0;

  /// out[i, :] = norm(r[rows[i], :]); rows empty: every row in order; rows[i] < 0: out[i, :] keeps its value. weight
  /// and bias (d) float32, bias null for none. RMSNorm: x · rsqrt(mean(x²) + eps) · w. LayerNorm: (x − mean) ·
  /// rsqrt(var + eps) · w + b. r (N, d) float32; out (M, d) float32 or activation.
  virtual void norm(NormKind kind, double eps, const float* weight, const float* bias, const Matrix& r,
                    std::span<const std::int32_t> rows, const Matrix& out) = 0;

  /// y = act(x Wᵀ + b), or y += that when `accumulate`. x (N, K) activation (float32 is accepted too);
  /// y (N, out_features) float32 or activation, float32 when accumulate. A row of y depends on its row of x alone.
  virtual void linear(const LinearWeight& weight, const Matrix& x, const Matrix& y, bool accumulate) = 0;

  /// out[i] = log softmax(logits[i, :vocab_size])[targets[i]], to the host. logits (M, ≥ vocab_size) float32.
  virtual void token_log_probs(const Matrix& logits, std::int64_t vocab_size, std::span<const std::int32_t> targets,
                               std::span<float> out) = 0;

  virtual std::unique_ptr<Sampler> make_sampler(std::int64_t vocab_size, int num_rows) = 0;

  // ---- operations of mixers ----------------------------------------------------------------------------------
  // A device that lacks one does not override it, and does not support() the kinds that need it (Implements, below).

  /// Whether the device has the operations that this kind of mixer needs.
  virtual bool supports(const MixerConfig& mixer) const = 0;

  /// Throws UnsupportedError: this device does not implement that mixer. `where` opens the message.
  [[noreturn]] void throw_unsupported(const std::string& where, std::string_view mixer) const;

  /// out = SiLU(conv(u₁)) ⊙ u₂, u = [u₁|u₂] (N, 2e) projection, taps (e, K) float32: conv(u₁)[t] = Σ_j taps[j]·
  /// u₁[t − K + 1 + j], reading what came before the batch from the state and leaving the last K − 1 there.
  /// out (N, e) activation.
  virtual void gated_conv(const GatedConvConfig& config, const float* taps, const RaggedBatch& batch, const Matrix& u,
                          StatePool& states, int layer, const Matrix& out) {
    unsupported(config, taps, batch, u, states, layer, out);
  }

  /// Taylor linear attention (LinearAttentionConfig's equation) after the state, which it advances.
  /// qkv (N, H·f | H·f | H·head_dim) projection; out (N, H·head_dim) activation.
  virtual void linear_attention(const LinearAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                StatePool& states, int layer, const Matrix& out) {
    unsupported(config, batch, qkv, states, layer, out);
  }

  /// Rotary on q and k at their positions, then softmax attention over the window, older keys from the ring, which it
  /// advances. qkv (N, (H + 2·H_kv)·head_dim) projection, overwritten; out (N, H·head_dim) activation.
  virtual void sliding_window(const SlidingWindowConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                              StatePool& states, int layer, const Matrix& out) {
    unsupported(config, batch, qkv, states, layer, out);
  }

  /// Rotary on q and k at their positions, then softmax attention over all keys so far, those before the call from the
  /// state, which it advances. Operands as of sliding_window.
  virtual void full_attention(const FullAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                              StatePool& states, int layer, const Matrix& out) {
    unsupported(config, batch, qkv, states, layer, out);
  }

  /// x = SiLU(conv(u) + bias), xz = [u|z] (N, 2e) projection, taps (e, K) and bias (e; null for none) float32: the
  /// convolution of gated_conv, which keeps what came before the batch in the first part of the state.
  /// x (N, e) projection.
  virtual void scan_conv(const SelectiveScanConfig& config, const float* taps, const float* bias,
                         const RaggedBatch& batch, const Matrix& xz, StatePool& states, int layer, const Matrix& x) {
    unsupported(config, taps, bias, batch, xz, states, layer, x);
  }

  /// Δ = softplus(dt), h[n, c] ← exp(Δ[c] a[n, c]) h[n, c] + Δ[c] B[n] x[c], the second part of the state, and
  /// out[c] = (Σ_n C[n] h[n, c] + d[c] x[c]) · SiLU(z[c]). out (N, e) activation.
  virtual void selective_scan(const SelectiveScanConfig& config, const ScanOperands& operands, const RaggedBatch& batch,
                              StatePool& states, int layer, const Matrix& out) {
    unsupported(config, operands, batch, states, layer, out);
  }

  /// The same with a prefix (PrefixLinearAttentionConfig's equation). qkv and out as above; encoder (N, H·f |
  /// H·head_dim) projection: the prefix's keys and values, read where the batch begins a sequence, of its first
  /// enc_length tokens or of as many as the batch has.
  virtual void prefix_linear_attention(const PrefixLinearAttentionConfig& config, const RaggedBatch& batch,
                                       const Matrix& qkv, const Matrix& encoder, StatePool& states, int layer,
                                       const Matrix& out) {
    unsupported(config, batch, qkv, encoder, states, layer, out);
  }

  /// GatedDeltaNetConfig's equation up to W_out, after the state, which it advances. u (N, channels | H for b | H for a
  /// | H·head_dim for g) projection, a and g where the config has them; out (N, H·head_dim) activation.
  virtual void gated_delta_net(const GatedDeltaNetConfig& config, const DeltaOperands& operands,
                               const RaggedBatch& batch, const Matrix& u, StatePool& states, int layer,
                               const Matrix& out) {
    unsupported(config, operands, batch, u, states, layer, out);
  }

  /// mixed[i] = μ_i ⊙ x + (1 − μ_i) ⊙ x' for the three μ (d) float32, of k, v and r; x' is the token before, at first
  /// the first part of the state, which becomes the last token. x and mixed[i] (N, d) activation.
  virtual void rwkv4_shift(const Rwkv4Config& config, const std::array<const float*, 3>& mix, const RaggedBatch& batch,
                           const Matrix& x, StatePool& states, int layer, const std::array<Matrix, 3>& mixed) {
    unsupported(config, mix, batch, x, states, layer, mixed);
  }

  /// Rwkv4Config's y after the second part of the state, which it advances, times σ(r). out (N, e) activation.
  virtual void rwkv4(const Rwkv4Config& config, const Rwkv4Operands& operands, const RaggedBatch& batch,
                     StatePool& states, int layer, const Matrix& out) {
    unsupported(config, operands, batch, states, layer, out);
  }

  /// Mamba2Config's equation up to W_out, after the state, which it advances. out (N, H·head_dim) activation.
  virtual void mamba2(const Mamba2Config& config, const Mamba2Operands& operands, const RaggedBatch& batch,
                      StatePool& states, int layer, const Matrix& out) {
    unsupported(config, operands, batch, states, layer, out);
  }

  /// GatedLinearAttentionConfig's equation up to W_out, after the state, which it advances. u (N, H·key_dim for q |
  /// H·key_dim for k | H·head_dim for v | H·head_dim for g) and a (N, H·key_dim) = W₂ W₁ u + b projection, norm
  /// (head_dim) float32; out (N, H·head_dim) activation.
  virtual void gated_linear_attention(const GatedLinearAttentionConfig& config, const float* norm,
                                      const RaggedBatch& batch, const Matrix& u, const Matrix& a, StatePool& states,
                                      int layer, const Matrix& out) {
    unsupported(config, norm, batch, u, a, states, layer, out);
  }

  /// mixed[i] = x + (x' − x) ⊙ mix[i] for the μ (d) float32 of r, w, k, v, a and g; x' is the token before, at first
  /// the first part of the state, which becomes the last token. x and mixed[i] (N, d) activation.
  virtual void rwkv7_shift(const Rwkv7Config& config, const std::array<const float*, 6>& mix, const RaggedBatch& batch,
                           const Matrix& x, StatePool& states, int layer, const std::array<Matrix, 6>& mixed) {
    unsupported(config, mix, batch, x, states, layer, mixed);
  }

  /// w ← tanh(w), g ← σ(g); w (N, decay_rank), g (N, gate_rank) projection.
  virtual void rwkv7_low_rank(const Rwkv7Config& config, const Matrix& w, const Matrix& g) {
    unsupported(config, w, g);
  }

  /// The rest of Rwkv7Config's equation up to W_out, after the second part of the state, which it advances. out (N, e)
  /// activation.
  virtual void rwkv7(const Rwkv7Config& config, const Rwkv7Operands& operands, const RaggedBatch& batch,
                     StatePool& states, int layer, const Matrix& out) {
    unsupported(config, operands, batch, states, layer, out);
  }

  /// k ← conv(k);  x ← a x + k vᵀ, the second part of the state;  out = (Σ_m weight · x + skip k vᵀ)ᵀ q, per head:
  /// H3Config's equation between the projections. qkv (N, 3 · H·head_dim) projection; out (N, H·head_dim) activation.
  virtual void h3(const H3Config& config, const H3Operands& operands, const RaggedBatch& batch, const Matrix& qkv,
                  StatePool& states, int layer, const Matrix& out) {
    unsupported(config, operands, batch, qkv, states, layer, out);
  }

  /// HyenaConfig's equation between the projections, with the filter as a table. u (N, 3e) projection; out (N, e)
  /// activation. No sequence has more than L tokens.
  virtual void hyena(const HyenaConfig& config, const HyenaOperands& operands, const RaggedBatch& batch,
                     const Matrix& u, StatePool& states, int layer, const Matrix& out) {
    unsupported(config, operands, batch, u, states, layer, out);
  }

  // ---- states ------------------------------------------------------------------------------------------------

  /// Bytes that a slot of such a pool takes when its sequence has seen num_tokens tokens: a long part takes memory when
  /// it is used. kAnyNumber: of a sequence that fills every part; a ContextState has no end. Any thread.
  virtual std::size_t state_nbytes(const ModelConfig& config, DType dtype,
                                   std::int64_t num_tokens = kAnyNumber) const = 0;
  static constexpr std::int64_t kAnyNumber = std::numeric_limits<std::int64_t>::max();

  /// All slots fresh. `dtype`: the model's. Throws OutOfMemory.
  virtual std::unique_ptr<StatePool> make_states(const ModelConfig& config, DType dtype, int capacity) = 0;

  /// Takes the memory that the slots of sequences of so many tokens need; those of a longer one keep theirs. Comes
  /// before the batch that makes them so long. Throws OutOfMemory, and then every state is as before. Does nothing
  /// where states have all their memory from the start.
  virtual void reserve_states(StatePool&, std::span<const std::int32_t> /*slots*/,
                              std::span<const std::int64_t> /*num_tokens*/) {}

  /// to[to_slot] = from[from_slot], the state of a sequence that has seen num_tokens tokens; pools of the same config
  /// and dtype. Takes memory as reserve_states() does.
  virtual void copy_state(const StatePool& from, int from_slot, StatePool& to, int to_slot,
                          std::int64_t num_tokens) = 0;

  /// The memory that holds the state of a sequence that has seen num_tokens tokens, for which the slot has memory: the
  /// same bytes in the pieces of another slot, of a pool of the same config and dtype, are the same state.
  virtual std::vector<MemoryPiece> state_pieces(const StatePool& states, int slot, std::int64_t num_tokens) const = 0;

  /// Makes a slot fresh, and gives back what a long part has taken.
  virtual void reset_state(StatePool& states, int slot) = 0;

  /// The saved form of a slot whose sequence has seen num_tokens tokens, in layer order: the tensors
  /// "layers.{i}.{name}" that the mixers' descriptions list (StateTensor), rows oldest first. Pending tokens are left
  /// out when there are none; there are as many in all layers.
  virtual std::vector<NamedTensor> export_state(const StatePool& states, int slot, std::int64_t num_tokens) = 0;

  /// Inverse of export_state: the tensors have its names, order and shapes (the caller has checked); those of the
  /// model's dtype may be float32, bfloat16 or float16 and are converted. Pending tokens that this pool cannot keep as
  /// they are, are added to the sums. Takes memory as reserve_states() does.
  virtual void import_state(StatePool& states, int slot, std::int64_t num_tokens,
                            std::span<const NamedView> tensors) = 0;

 protected:
  /// What an operation that the device lacks does. The operands are not used.
  template <class Config, class... Operands>
  [[noreturn]] void unsupported(const Config&, const Operands&...) const {
    throw_unsupported("", Config::kName);
  }
};

/// Which operations of a device each kind of mixer needs. Device implements an operation when its class declares it.
/// The compiler tells: &Device::f has the type of a pointer to a member of Device then, and otherwise of Backend.
template <class Device>
struct Implements {
  bool operator()(const GatedConvConfig&) const { return declares(&Device::gated_conv); }
  bool operator()(const LinearAttentionConfig&) const { return declares(&Device::linear_attention); }
  bool operator()(const SlidingWindowConfig&) const { return declares(&Device::sliding_window); }
  bool operator()(const FullAttentionConfig&) const { return declares(&Device::full_attention); }
  bool operator()(const SelectiveScanConfig&) const {
    return declares(&Device::scan_conv) && declares(&Device::selective_scan);
  }
  bool operator()(const PrefixLinearAttentionConfig&) const { return declares(&Device::prefix_linear_attention); }
  bool operator()(const GatedDeltaNetConfig&) const { return declares(&Device::gated_delta_net); }
  bool operator()(const Rwkv4Config&) const { return declares(&Device::rwkv4_shift) && declares(&Device::rwkv4); }
  bool operator()(const H3Config&) const { return declares(&Device::h3); }
  bool operator()(const HyenaConfig&) const { return declares(&Device::hyena); }
  bool operator()(const Mamba2Config&) const { return declares(&Device::mamba2); }
  bool operator()(const GatedLinearAttentionConfig&) const { return declares(&Device::gated_linear_attention); }
  bool operator()(const Rwkv7Config&) const {
    return declares(&Device::rwkv7_shift) && declares(&Device::rwkv7_low_rank) && declares(&Device::rwkv7);
  }

 private:
  template <class Class, class... Arguments>
  static constexpr bool declares(void (Class::*)(Arguments...)) {
    return std::is_same_v<Class, Device>;
  }
};

/// The base of a device's class, which answers supports() for it: class X final : public DeviceBackend<X>.
template <class Device>
class DeviceBackend : public Backend {
 public:
  static bool implements(const MixerConfig& mixer) { return std::visit(Implements<Device>{}, mixer); }
  bool supports(const MixerConfig& mixer) const final { return implements(mixer); }
};

/// The first instance for a device; Backend::sibling() makes others. num_threads: CPU threads, 0 for the CPUs that this
/// process may use. deterministic: LoadOptions::deterministic, which changes nothing on a CPU. Throws UnsupportedError
/// for a device that this build or machine does not have, and InvalidArgument for a number of threads < 0 or > 1024.
std::unique_ptr<Backend> make_backend(Device device, int num_threads, bool deterministic = false);

}  // namespace based::backend
