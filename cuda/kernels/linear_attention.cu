#include "kernels/linear_attention_chunked.cuh"
#include "kernels/linear_attention_recurrent.cuh"
#include "kernels/linear_attention_wgmma.cuh"

#include <algorithm>
#include <cmath>

namespace based::cuda {
namespace {

std::size_t align_16(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

// ---- one token per sequence ----------------------------------------------------------------------------------------

RecurrentArguments recurrent_arguments(const LinearAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                                       const QkvView& qkv, StateView state, StateView pending, void* out,
                                       std::int64_t out_token, std::int64_t out_head, std::int64_t prefix_length) {
  const PendingLayout layout(config, dtype);
  RecurrentArguments a{};
  a.batch = batch;
  a.qkv = qkv;
  a.dtype = dtype;
  a.state = state;
  a.pending = pending;
  a.pending_values = static_cast<std::int64_t>(layout.values);
  a.pending_counts = static_cast<std::int64_t>(layout.counts);
  a.out = out;
  a.out_token = out_token;
  a.out_head = out_head;
  a.num_heads = static_cast<int>(config.num_heads);
  a.feature_dim = static_cast<int>(config.feature_dim);
  a.num_features = static_cast<int>(config.num_features());
  a.head_dim = static_cast<int>(config.head_dim);
  a.scale = static_cast<float>(std::pow(static_cast<double>(config.feature_dim), -0.25));
  a.eps = static_cast<float>(config.eps);
  a.prefix_length = prefix_length;
  return a;
}

/// Chosen by shape and device alone: a sequence's result does not depend on what else is in the batch.
template <int kPending>
bool decode_bulk_takes(const RecurrentArguments& a) {
  constexpr std::size_t kReserved = 1024;  // of each block, by the system; max_shared_bytes is an SM's less one such
  const DeviceInfo& device = device_info();
  // Two blocks on an SM, or nothing is under way while one starts and ends.
  return device.code_capability >= 90 && a.head_dim % 4 == 0 && a.head_dim <= 128 && is_aligned(a.state.data, 16) &&
         a.state.slot_stride % 16 == 0 &&
         2 * (decode_bulk_shared_bytes<kPending>(a.feature_dim, a.num_features, a.head_dim) + kReserved) <=
             static_cast<std::size_t>(device.max_shared_bytes) + kReserved;
}

template <int kPending>
void launch_decode_bulk(cudaStream_t stream, const RecurrentArguments& a) {
  prefer_shared_memory(reinterpret_cast<const void*>(decode_bulk_kernel<kPending>), "linear_attention");
  launch(stream, "linear_attention", decode_bulk_kernel<kPending>,
         dim3(blocks_for(static_cast<std::int64_t>(a.batch.num_singles) * a.num_heads, 1)), dim3(kBulkThreads),
         decode_bulk_shared_bytes<kPending>(a.feature_dim, a.num_features, a.head_dim), a,
         (a.num_features + kBulkChunks - 1) / kBulkChunks);
}

/// kPending: kPendingTokens, or 1 without room for any.
template <int kPending>
void launch_decode(cudaStream_t stream, const RecurrentArguments& a) {
  if (decode_bulk_takes<kPending>(a)) return launch_decode_bulk<kPending>(stream, a);
  const int vec = a.head_dim % 4 == 0 ? 4 : 1;
  const int column_threads = std::min(a.head_dim / vec, 256);
  const int num_blocks = a.batch.num_singles * a.num_heads;
  // More threads keep more bytes under way where blocks are few, fewer weigh less where they are many. The sums follow
  // the threads, so that it is one number for every batch.
  constexpr int kThreads = 256;
  const int row_groups = std::max(1, std::min(kThreads / column_threads, a.num_features));
  const int threads = (column_threads * row_groups + 31) / 32 * 32;
  const std::size_t shared_bytes =
      decode_shared_bytes<kPending>(a.feature_dim, a.num_features, threads, column_threads, vec);
  launch(stream, "linear_attention", vec == 4 ? decode_kernel<4, kPending> : decode_kernel<1, kPending>,
         dim3(blocks_for(num_blocks, 1)), dim3(static_cast<unsigned>(threads)), shared_bytes, a, column_threads,
         row_groups);
}

/// What kernels of many tokens find in S and z is all that the sequences have seen; or the prefixes of single tokens.
void launch_fold_pending(cudaStream_t stream, const RecurrentArguments& a) {
  const int sequences = a.adds_prefix ? a.batch.num_singles : a.batch.num_longs;
  launch(stream, "linear_attention", fold_pending_kernel,
         dim3(blocks_for(static_cast<std::int64_t>(sequences) * a.num_heads, 1)), dim3(kFoldThreads),
         fold_shared_bytes(a.feature_dim), a);
}

// ---- many tokens, any shape ----------------------------------------------------------------------------------------

struct Slices {
  int vec, count, dim;
  bool state_in_shared;
};

/// Equal slices of at most 32 columns which, when possible, lie in shared memory. The model and the card choose them,
/// not the batch, for the order of sums follows from them.
Slices choose_slices(const LinearAttentionConfig& config) {
  constexpr int kMostColumns = 32;
  Slices s{};
  const int head_dim = static_cast<int>(config.head_dim), f = static_cast<int>(config.feature_dim);
  const int num_features = static_cast<int>(config.num_features());
  const auto shared_limit = static_cast<std::size_t>(device_info().max_shared_bytes);
  s.vec = head_dim % 4 == 0 ? 4 : 1;
  const int vectors = head_dim / s.vec, slices = (head_dim + kMostColumns - 1) / kMostColumns;
  s.dim = (vectors + slices - 1) / slices * s.vec;
  const auto fits = [&] { return recurrent_shared_bytes(f, num_features, s.dim, true) <= shared_limit; };
  while (s.dim > s.vec && !fits()) s.dim = (s.dim / s.vec + 1) / 2 * s.vec;
  s.state_in_shared = fits();
  s.count = (head_dim + s.dim - 1) / s.dim;
  return s;
}

std::size_t recurrent_z_floats(const LinearAttentionConfig& config, const DeviceBatch& batch) {
  return static_cast<std::size_t>(batch.num_longs) * static_cast<std::size_t>(config.num_heads * config.num_features());
}

std::size_t recurrent_scratch_bytes(const LinearAttentionConfig& config, const DeviceBatch& batch) {
  const Slices slices = choose_slices(config);
  std::size_t copies = slices.count > 1 ? 1 : 0;
  if (!slices.state_in_shared) copies += static_cast<std::size_t>(slices.count);
  return recurrent_z_floats(config, batch) * copies * sizeof(float);
}

void launch_store_z(cudaStream_t stream, const LinearAttentionConfig& config, const DeviceBatch& batch, StateView state,
                    const float* z_out, const std::int32_t* entries) {
  const std::int64_t per_slot = config.num_heads * config.num_features();
  launch(stream, "linear_attention", store_z_kernel, dim3(blocks_for(batch.num_longs, 1)), dim3(256), 0, batch, state,
         z_out, entries, per_slot * config.head_dim, static_cast<int>(per_slot));
}

void launch_recurrent(cudaStream_t stream, const LinearAttentionConfig& config, RecurrentArguments a, void* scratch) {
  const Slices slices = choose_slices(config);
  a.num_slices = slices.count;
  a.slice_dim = slices.dim;
  a.state_in_shared = slices.state_in_shared;
  a.z_out = slices.count > 1 ? static_cast<float*>(scratch) : nullptr;
  a.z_work = static_cast<float*>(scratch) + (slices.count > 1 ? recurrent_z_floats(config, a.batch) : 0);
  const std::size_t shared_bytes =
      recurrent_shared_bytes(a.feature_dim, a.num_features, slices.dim, slices.state_in_shared);
  launch(stream, "linear_attention", slices.vec == 4 ? recurrent_kernel<4> : recurrent_kernel<1>,
         dim3(blocks_for(static_cast<std::int64_t>(a.batch.num_longs) * a.num_heads * slices.count, 1)),
         dim3(kRecurrentThreads), shared_bytes, a, slices.dim / slices.vec);
  if (a.z_out) launch_store_z(stream, config, a.batch, a.state, a.z_out, nullptr);
}

// ---- many tokens, on tensor cores ----------------------------------------------------------------------------------

bool chunked_takes(const LinearAttentionConfig& config, DType dtype) {
  const std::int64_t f = config.feature_dim;
  return dtype == DType::bfloat16 && (f == 8 || f == 16 || f == 24 || f == 32) && config.head_dim % 8 == 0 &&
         (f == 32 ? chunked_shared_bytes<4>() : chunked_shared_bytes<3>()) <=
             static_cast<std::size_t>(device_info().max_shared_bytes);
}

bool chunked_takes(const QkvView& qkv, const void* out, std::int64_t out_token, std::int64_t out_head) {
  return is_aligned(qkv.q, 16) && is_aligned(qkv.k, 16) && is_aligned(qkv.v, 16) && is_aligned(out, 8) &&
         (qkv.q_token | qkv.q_head | qkv.k_token | qkv.k_head | qkv.v_token | qkv.v_head) % 8 == 0 &&
         (out_token | out_head) % 4 == 0;
}

/// Groups of at most kChunkedWarps · 16 columns, one block each.
int column_groups(const LinearAttentionConfig& config) {
  return static_cast<int>((config.head_dim + 16 * kChunkedWarps - 1) / (16 * kChunkedWarps));
}

bool splits_time(const DeviceBatch& batch) { return batch.num_segments > batch.num_longs; }

std::size_t segment_state_bytes(const LinearAttentionConfig& config, const DeviceBatch& batch, bool reads_prefix) {
  return splits_time(batch) || reads_prefix
             ? static_cast<std::size_t>(batch.num_segments) * linear_attention_state_bytes(config)
             : 0;
}

std::size_t chunked_scratch_bytes(const LinearAttentionConfig& config, const DeviceBatch& batch, bool reads_prefix) {
  const std::size_t z_bytes = static_cast<std::size_t>(batch.num_segments) *
                              static_cast<std::size_t>(config.num_heads * config.num_features()) * sizeof(float);
  return segment_state_bytes(config, batch, reads_prefix) + (column_groups(config) > 1 ? z_bytes : 0);
}

bool wgmma_takes(const LinearAttentionConfig& config, const void* out, std::int64_t out_token, std::int64_t out_head) {
  return config.feature_dim == kWgmmaF && is_aligned(out, 16) && (out_token | out_head) % 8 == 0 &&
         device_info().has_wgmma;
}

/// The kernels' arguments, all but the columns of a block.
ChunkedArguments chunked_arguments(const LinearAttentionConfig& config, const DeviceBatch& batch, const QkvView& qkv,
                                   StateView state, void* out, std::int64_t out_token, std::int64_t out_head,
                                   void* scratch, bool reads_prefix) {
  ChunkedArguments a{};
  a.batch = batch;
  a.qkv = qkv;
  a.state = state;
  a.segment_states = {static_cast<std::byte*>(scratch), linear_attention_state_bytes(config)};
  a.out = static_cast<bf16*>(out);
  a.out_token = out_token;
  a.out_head = out_head;
  a.num_heads = static_cast<int>(config.num_heads);
  a.feature_dim = static_cast<int>(config.feature_dim);
  a.num_features = static_cast<int>(config.num_features());
  a.head_dim = static_cast<int>(config.head_dim);
  a.column_groups = column_groups(config);
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.feature_dim)));
  a.eps = static_cast<float>(config.eps);
  if (a.column_groups > 1)
    a.z_out =
        reinterpret_cast<float*>(static_cast<std::byte*>(scratch) + segment_state_bytes(config, batch, reads_prefix));
  return a;
}

using ChunkedKernel = void (*)(ChunkedArguments);

/// `increments`: what segments add to the state; `outputs`: the rest. Of a prefix, what it adds.
void launch_segments(cudaStream_t stream, const LinearAttentionConfig& config, const ChunkedArguments& a,
                     ChunkedKernel increments, ChunkedKernel outputs, int threads, std::size_t shared_bytes) {
  const DeviceBatch& batch = a.batch;
  const dim3 grid(blocks_for(static_cast<std::int64_t>(batch.num_segments) * a.num_heads * a.column_groups, 1));
  const dim3 block(static_cast<unsigned>(threads));
  if (a.prefix_length > 0) {
    launch(stream, "prefix_linear_attention", increments, grid, block, shared_bytes, a);
    const int count = static_cast<int>(config.num_heads * config.num_features() * (config.head_dim + 1));
    const unsigned blocks = blocks_for(count, 256);
    launch(stream, "prefix_linear_attention", add_prefix_kernel, dim3(blocks * static_cast<unsigned>(batch.num_longs)),
           dim3(256), 0, batch, a.state, a.segment_states, a.prefix_length, count, static_cast<int>(blocks));
    return;
  }
  if (splits_time(batch)) {
    launch(stream, "linear_attention", increments, grid, block, shared_bytes, a);
    const int quads = static_cast<int>(linear_attention_state_bytes(config) / 16);
    const unsigned blocks = blocks_for(quads, 256);
    launch(stream, "linear_attention", sum_segments_kernel, dim3(blocks * static_cast<unsigned>(batch.num_longs)),
           dim3(256), 0, batch, a.state, a.segment_states, quads, static_cast<int>(blocks));
  }
  launch(stream, "linear_attention", outputs, grid, block, shared_bytes, a);
  if (a.z_out) launch_store_z(stream, config, batch, a.state, a.z_out, batch.first_segments);
}

template <int kBlocks>
void launch_chunked(cudaStream_t stream, const LinearAttentionConfig& config, const ChunkedArguments& a) {
  const int warps = (a.head_dim + 16 * a.column_groups - 1) / (16 * a.column_groups);
  launch_segments(stream, config, a, chunked_kernel<kBlocks, false>, chunked_kernel<kBlocks, true>,
                  32 * warps * kChunkedParts<kBlocks>, chunked_shared_bytes<kBlocks>());
}

}  // namespace

// Of another architecture the kernel is empty and has no shared memory.
bool wgmma_code() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, wgmma_kernel<true>), "linear_attention");
  return attributes.sharedSizeBytes > 0;
}

std::size_t linear_attention_state_bytes(const LinearAttentionConfig& config) {
  return align_16(static_cast<std::size_t>(config.num_heads * config.num_features() * (config.head_dim + 1)) *
                  sizeof(float));
}

PendingLayout::PendingLayout(const LinearAttentionConfig& config, DType dtype) {
  const auto tokens = static_cast<std::size_t>(config.num_heads * kPendingTokens) * size_of(dtype);
  values = align_16(tokens * static_cast<std::size_t>(config.feature_dim));
  counts = values + align_16(tokens * static_cast<std::size_t>(config.head_dim));
  nbytes = counts + align_16(static_cast<std::size_t>(config.num_heads) * sizeof(std::int32_t));
}

namespace {

void attend_chunked(cudaStream_t stream, const LinearAttentionConfig& config, const ChunkedArguments& arguments) {
  if (wgmma_takes(config, arguments.out, arguments.out_token, arguments.out_head))
    return launch_segments(stream, config, arguments, wgmma_kernel<false>, wgmma_kernel<true>, 2 * kWarpgroup,
                           sizeof(WgmmaShared));
  const auto chunked = config.feature_dim == 8    ? launch_chunked<1>
                       : config.feature_dim == 16 ? launch_chunked<2>
                       : config.feature_dim == 24 ? launch_chunked<3>
                                                  : launch_chunked<4>;
  chunked(stream, config, arguments);
}

/// Before all else: the prefix of a sequence that begins, whose S and z are zeros until then.
void add_prefixes(cudaStream_t stream, const LinearAttentionConfig& config, RecurrentArguments recurrent,
                  ChunkedArguments chunked, bool takes_chunks, const QkvView& prefix, void* scratch) {
  recurrent.qkv = chunked.qkv = prefix;
  recurrent.adds_prefix = true;
  chunked.prefix_length = static_cast<int>(recurrent.prefix_length);
  launch_fold_pending(stream, recurrent);
  if (recurrent.batch.num_longs == 0) return;
  if (takes_chunks)
    attend_chunked(stream, config, chunked);
  else
    launch_recurrent(stream, config, recurrent, scratch);
}

}  // namespace

void linear_attention(cudaStream_t stream, const LinearAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                      const QkvView& qkv, StateView state, StateView pending, void* out, std::int64_t out_token,
                      std::int64_t out_head, void* scratch, const PrefixView& prefix) {
  const RecurrentArguments recurrent =
      recurrent_arguments(config, dtype, batch, qkv, state, pending, out, out_token, out_head, prefix.length);
  const bool lazy = pending.data != nullptr;
  const auto takes_chunks = [&](const QkvView& view) {
    return chunked_takes(config, dtype) && chunked_takes(view, out, out_token, out_head);
  };
  const ChunkedArguments arguments =
      chunked_arguments(config, batch, qkv, state, out, out_token, out_head, scratch, prefix.is_read);
  if (prefix.is_read)
    add_prefixes(stream, config, recurrent, arguments, takes_chunks(prefix.keys_values), prefix.keys_values, scratch);
  if (batch.num_singles > 0) (lazy ? launch_decode<kPendingTokens> : launch_decode<1>)(stream, recurrent);
  if (batch.num_longs == 0) return;
  if (lazy) launch_fold_pending(stream, recurrent);
  if (takes_chunks(qkv)) return attend_chunked(stream, config, arguments);
  launch_recurrent(stream, config, recurrent, scratch);
}

std::size_t linear_attention_scratch(const LinearAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                                     bool reads_prefix) {
  if (batch.num_longs == 0) return 0;
  const std::size_t recurrent = recurrent_scratch_bytes(config, batch);
  return chunked_takes(config, dtype) ? std::max(recurrent, chunked_scratch_bytes(config, batch, reads_prefix))
                                      : recurrent;
}

}  // namespace based::cuda
