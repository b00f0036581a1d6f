#pragma once

// Launchers of the CUDA kernels: all that the rest of the library sees of cuda/kernels. Pointers are device memory and
// 16-byte aligned unless said otherwise. Work is enqueued on `stream`; every launch is checked. DType is float32,
// bfloat16 or float16 ("T" below). Strides count elements.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "based/config.h"
#include "based/tensor.h"

namespace based::cuda {

/// Tokens [first, first + count) of the batch's token axis, all of sequence `sequence`. Tiles of a sequence start at
/// its first token in the batch.
struct Tile {
  std::int32_t sequence, first, count;
};

constexpr int kTileTokens = 64;

/// DeviceBatch::slots[b] = kSkippedSlot − slot: `slot` is not to advance in this step.
constexpr std::int32_t kSkippedSlot = -2;

/// A backend::RaggedBatch on the device, with the lists by which kernels share out the work. A sequence of one token is
/// a "single" and is advanced by the recurrent kernels; longer ones are "long" and cut into tiles and segments.
/// slots[b] < 0: a row that kernels leave alone (its output is undefined). It fills up a captured batch size, or
/// embed() found that the sampler has no token for it and marked it: kSkippedSlot − slot, so that sample() knows the
/// row. embed() is the only kernel that writes to a batch. Every kernel reads `slots` after wait_for_predecessors(),
/// and each grid ends after its predecessor, so all kernels of the step see the mark; the next upload overwrites it.
struct DeviceBatch {
  const std::int32_t* tokens = nullptr;      // (N)
  const std::int32_t* offsets = nullptr;     // (B + 1)
  std::int32_t* slots = nullptr;             // (B)
  const std::int64_t* positions = nullptr;   // (B) of each sequence's first token
  const std::int32_t* logit_rows = nullptr;  // (B) row of the logits of each sequence; null: row b
  int num_tokens = 0;                        // N
  int num_sequences = 0;                     // B

  const std::int32_t* singles = nullptr;  // (num_singles) sequences of one token; null when all are: then 0 … B − 1
  int num_singles = 0;

  const Tile* tiles = nullptr;  // (num_tiles) of the long sequences: ≤ kTileTokens tokens each
  int num_tiles = 0;
  const std::int32_t* longs = nullptr;  // (num_longs) the long sequences
  int num_longs = 0;

  /// The long sequences once more, in pieces of whole tiles (but for the last one of a sequence) that the
  /// sequence's length alone decides. Segments of a sequence are consecutive.
  const Tile* segments = nullptr;  // (num_segments)
  int num_segments = 0;
  const std::int32_t* first_segments = nullptr;  // (num_longs + 1): segments of longs[i] start at first_segments[i]
};

/// One layer's part of every slot's state: slot s starts at data + s · slot_stride bytes (both multiples of 16).
struct StateView {
  std::byte* data = nullptr;
  std::size_t slot_stride = 0;
  std::byte* slot(std::int64_t s) const { return data + static_cast<std::size_t>(s) * slot_stride; }
};

/// One layer's keys and values of every slot, in elements of T: row r lies in piece r >> piece_shift, pieces start
/// `piece` apart. In a piece a row starts `row` behind the row before it, a head's key `head` behind that of the head
/// before it, and its value `values` behind its key; what `head` has beyond head_dim is zero. With the defaults all
/// rows are in one piece.
struct KeyValueView {
  StateView keys;
  std::int64_t head = 0, row = 0, values = 0, piece = 0;
  int piece_shift = 31;
};

/// Properties of the current device that choose a kernel; one query per process and device.
struct DeviceInfo {
  int compute_capability = 0;  // 10 · major + minor
  int code_capability = 0;  // what the kernels that run on it were compiled for: less when PTX of an older architecture
  int num_sms = 0;
  int max_shared_bytes = 0;  // per block, opt-in
  bool has_wgmma = false;    // wgmma_code()
};
const DeviceInfo& device_info();

/// What CUDA keeps per function and device, set on the current device when a kernel is first given: it may have all
/// shared memory that a block can have; L1 is to leave as much of it as there is. Any thread.
void allow_all_shared_memory(const void* kernel, const char* name);
void prefer_shared_memory(const void* kernel, const char* name);

// ---- embed.cu ------------------------------------------------------------------------------------------------------

/// What DeviceBatch::tokens holds for a sequence that is fed what was chosen for it, and back.
__host__ __device__ constexpr std::int64_t chosen_token(std::int64_t sequence) { return -1 - sequence; }

/// r[n, :] = table[tokens[n], :]; table (vocabulary, d) T, r (N, d) float32. Where tokens[n] is chosen_token(b), and
/// for sequence n when batch.tokens is null, the token is chosen[slots[b]]: rows of slot < 0 read token 0; a row whose
/// chosen token is negative reads token 0, and its sequence is marked in batch.slots.
void embed(cudaStream_t stream, DType dtype, const void* table, std::int64_t d, const DeviceBatch& batch,
           const std::int32_t* chosen, float* r);

// ---- norm.cu -------------------------------------------------------------------------------------------------------

/// out[i, :] = norm(r[rows[i], :]) for i < num_rows; rows null: row i; rows[i] < 0: out[i, :] is left alone.
/// weight, bias (d) float32, bias null for none. out float32 or T.
void norm(cudaStream_t stream, NormKind kind, float eps, const float* weight, const float* bias, const float* r,
          std::int64_t d, const std::int32_t* rows, std::int64_t num_rows, DType out_dtype, void* out);

// ---- gated_conv.cu -------------------------------------------------------------------------------------------------

/// backend::Backend::gated_conv. u (N, 2e) T, taps (e, K) float32, out (N, e) T.
/// State of a slot: (K − 1, e) T, as u has them, oldest first; zeros when fresh.
void gated_conv(cudaStream_t stream, const GatedConvConfig& config, DType dtype, const float* taps,
                const DeviceBatch& batch, const void* u, StateView state, void* out);

/// backend::Backend::scan_conv. xz (N, 2e) T, taps (e, K) and bias (e; null for none) float32, x (N, e) T. State as of
/// gated_conv.
void scan_conv(cudaStream_t stream, const SelectiveScanConfig& config, DType dtype, const float* taps,
               const float* bias, const DeviceBatch& batch, const void* xz, StateView state, void* x);

// ---- selective_scan.cu ---------------------------------------------------------------------------------------------

/// backend::ScanOperands on the device.
struct ScanInputs {
  const float *a = nullptr, *d = nullptr;                                // (N, e) ≤ 0, (e)
  const void *xz = nullptr, *x = nullptr, *bc = nullptr, *dt = nullptr;  // (…, 2e), (…, e), (…, 2N), (…, e) T
};

/// backend::Backend::selective_scan. out (…, e) T. State of a slot: h (N, e) float32, zeros when fresh. However a
/// sequence is cut into calls, and whatever else is in the batch, it gets the same bits.
void selective_scan(cudaStream_t stream, const SelectiveScanConfig& config, DType dtype, const ScanInputs& in,
                    const DeviceBatch& batch, StateView state, void* out);

// ---- gated_delta_net.cu --------------------------------------------------------------------------------------------

/// SiLU(conv(u)) of the first `channels` of the u_row columns of u (N, u_row) T into qkv (N, channels) T
/// (gated_conv.cu). taps (channels, K) float32, state as of gated_conv.
void delta_conv(cudaStream_t stream, const GatedDeltaNetConfig& config, DType dtype, const float* taps,
                const DeviceBatch& batch, const void* u, std::int64_t u_row, StateView state, void* qkv);

/// backend::DeltaOperands on the device, without the taps, and u (N, u_row) T.
struct DeltaInputs {
  const float *norm = nullptr, *log_rate = nullptr, *dt_bias = nullptr;  // (head_dim), (H), (H)
  const void* u = nullptr;
  std::int64_t u_row = 0;
};

/// backend::Backend::gated_delta_net behind the convolution, which made qkv (N, channels) T. out (N, H · head_dim) T.
/// State of a slot: S (H, key_dim, head_dim) float32, zeros when fresh. A prompt goes in chunks of kTileTokens, counted
/// from its first token in the batch: cuts at multiples of that change no bit, unless they leave one token alone, which
/// is walked as a step is. What else is in the batch changes none.
/// `scratch`: gated_delta_net_scratch() bytes.
void gated_delta_net(cudaStream_t stream, const GatedDeltaNetConfig& config, DType dtype, const DeltaInputs& in,
                     const void* qkv, const DeviceBatch& batch, StateView state, void* out, void* scratch);
std::size_t gated_delta_net_scratch(const GatedDeltaNetConfig& config, DType dtype, const DeviceBatch& batch);

/// Shared memory of a block that steps: with more than DeviceInfo::max_shared_bytes, heads are too large.
std::size_t gated_delta_net_shared_bytes(const GatedDeltaNetConfig& config);

// ---- linear_attention.cu -------------------------------------------------------------------------------------------

/// q, k (…, f) and v (…, head_dim) of token n and head h at q + n · q_token + h · q_head, and so on.
struct QkvView {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  std::int64_t q_token = 0, q_head = 0, k_token = 0, k_head = 0, v_token = 0, v_head = 0;
};

/// From this position on a count of tokens in float32 no longer grows when 1 is added to it.
constexpr std::int64_t kCountLimit = std::int64_t{1} << 24;

/// W: at most W − 1 tokens of a sequence are pending, in no sum yet. Beyond 8 there is little to gain: a step moves
/// (1 + 1/W)/2 of the bytes that it would move if it added its token to the sums.
constexpr int kPendingTokens = 8;

/// A slot's pending tokens: k (H, W, f) T, v (H, W, head_dim) T, oldest first, and how many they are, (H) int32, of
/// every head the same number. Offsets in bytes, multiples of 16.
struct PendingLayout {
  std::size_t values, counts, nbytes;  // the keys begin at 0
  PendingLayout(const LinearAttentionConfig& config, DType dtype);
};

/// Keys (…, f) and values (…, head_dim) of tokens that the sequences at position 0 of a batch read as a whole before
/// all else: the first `length` of their tokens, or as many as they have in the batch.
struct PrefixView {
  QkvView keys_values;      // no keys that ask: q is k
  std::int64_t length = 0;  // of the layer, also in calls in which nobody reads one: S and z hold so many keys more
  bool is_read = false;     // a sequence of the batch may begin
};

/// backend::Backend::linear_attention. out (N, H · head_dim) T, or at out + n · out_token + h · out_head.
/// State of a slot, float32: S (H, num_features, head_dim) = Σ φ(k) vᵀ, then z (H, num_features) = Σ φ(k), features in
/// the packed order of docs/state-format.md; zeros when fresh: linear_attention_state_bytes(). `pending`: the slot's
/// pending tokens, all zeros when fresh; with no data, every token is in S and z when the call is done. A sequence of
/// one token adds its own to them, or all W of them to S and z; before a longer one they are added to S and z.
/// z's first feature is the number of keys; of a sequence that may have ≥ kCountLimit of them it is taken from the
/// position. `scratch`: linear_attention_scratch() bytes. `prefix`: of backend::Backend::prefix_linear_attention.
void linear_attention(cudaStream_t stream, const LinearAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                      const QkvView& qkv, StateView state, StateView pending, void* out, std::int64_t out_token,
                      std::int64_t out_head, void* scratch, const PrefixView& prefix = {});
std::size_t linear_attention_scratch(const LinearAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                                     bool reads_prefix = false);
std::size_t linear_attention_state_bytes(const LinearAttentionConfig& config);

/// DeviceInfo::has_wgmma of the current device: the kernel that uses wgmma was compiled for it.
bool wgmma_code();

// ---- softmax_attention.cu ------------------------------------------------------------------------------------------

/// backend::Backend::sliding_window on separate q (H heads), k, v (H_kv heads) of head_dim each. Rotates q and k IN
/// PLACE, but for single tokens that its decode kernel takes. out at out + n · out_token + h · head_dim, T.
/// State of a slot: a ring of `window` rows, keys (H_kv, head_dim) T, already rotated, and values, the same shape. The
/// key of position p lies in row p mod window; rows of positions < 0 or ≥ the sequence's own are never read.
void sliding_window(cudaStream_t stream, const SlidingWindowConfig& config, DType dtype, const DeviceBatch& batch,
                    const QkvView& qkv, const KeyValueView& ring, void* out, std::int64_t out_token);

/// The ring that is one block of memory: keys (window, H_kv, head_dim), then values.
KeyValueView contiguous_ring(const SlidingWindowConfig& config, StateView state);

/// backend::Backend::full_attention; operands as above. The key of position p lies in row p of `context`. Fast where
/// `context` can be read in 16 bytes, whatever the head_dim.
/// `scratch`: full_attention_scratch() bytes, for steps of sequences of at most `max_keys` keys, the new one included.
void full_attention(cudaStream_t stream, const FullAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                    const QkvView& qkv, const KeyValueView& context, void* out, std::int64_t out_token, void* scratch,
                    std::int64_t max_keys);
std::size_t full_attention_scratch(const FullAttentionConfig& config, const DeviceBatch& batch, std::int64_t max_keys);

// ---- linear.cu -----------------------------------------------------------------------------------------------------

/// y = act(x Wᵀ + b), or y += that. See backend::Backend::linear.
struct LinearArguments {
  DType dtype = DType::float32;  // T of W
  const void* weight = nullptr;  // (rows, K) T, row-major; rows = 2m when gated: [value | gate]
  const float* bias = nullptr;   // (rows) or null
  std::int64_t rows = 0, k = 0;
  Activation activation = Activation::identity;
  bool gated = false;
  DType x_dtype = DType::float32;  // T or float32
  const void* x = nullptr;         // (M, K)
  std::int64_t m = 0;
  DType y_dtype = DType::float32;  // T or float32; float32 when accumulate
  void* y = nullptr;               // (M, rows, or rows / 2 when gated)
  bool accumulate = false;
};

/// A decode step's product: streams W once, for few rows of x. True when it takes these arguments.
bool skinny_linear_takes(const LinearArguments& arguments);
void skinny_linear(cudaStream_t stream, const LinearArguments& arguments);

/// Any shape, dtype and alignment; float32 accumulation on CUDA cores.
void general_linear(cudaStream_t stream, const LinearArguments& arguments);

/// y = act(h + b) for h (M, rows) of h_dtype, or value ⊙ act(gate) when gated, or y += that: what a matrix library
/// leaves to do. arguments.x and .weight are not read. h may be y when the shapes and dtypes are equal.
void linear_epilogue(cudaStream_t stream, const LinearArguments& arguments, DType h_dtype, const void* h);

// ---- convert.cu ----------------------------------------------------------------------------------------------------

/// DeviceInfo::code_capability of the current device.
int code_capability();

/// n elements from one of float32, bfloat16, float16 to another (round to nearest even); any alignment to the element.
void convert(cudaStream_t stream, DType from, const void* source, DType to, void* target, std::int64_t n);

}  // namespace based::cuda
