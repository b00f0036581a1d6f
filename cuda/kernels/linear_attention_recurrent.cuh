#pragma once

// Taylor attention token by token: S_t = S_{t−1} + φ(k_t) v_tᵀ, z_t = z_{t−1} + φ(k_t), y_t = φ(q_t)ᵀ S_t / (φ(q_t)·z_t
// + eps) with φ(x) = [1, y_i, y_i y_j (i < j), y_i²/√2], y = x / f^¼. Any f, head_dim and dtype; all arithmetic is
// float32.
//
// A step is a stream over S, so most steps only read it. They leave their token "pending", as k and v, and attend to
// the pending tokens exactly, without φ: with S and z of the tokens before those,
//   y = (φ(q)ᵀ S + Σ_j p(s_j) v_j) / (φ(q)·z + Σ_j p(s_j) + eps),  p(s) = 1 + s + s²/2,  s_j = q·k_j / √f,
// j over the pending tokens and the step's own. The step that finds W − 1 pending adds φ(k_j) v_jᵀ and φ(k_j) of all W
// to S and z, in the same pass, and writes them. (1 + 1/W)/2 of the bytes of adding in every step, and W (f + head_dim)
// numbers beside (f + 1)(f + 2)/2 · (head_dim + 1). kPending = W; 1: there is no room, and every step adds.

#include "kernels/common.cuh"

namespace based::cuda {

struct RecurrentArguments {
  DeviceBatch batch;
  QkvView qkv;
  DType dtype;
  StateView state;
  StateView pending;  // data null: none
  void* out;
  std::int64_t out_token, out_head;
  std::int64_t pending_values, pending_counts;  // where they begin, bytes (PendingLayout)
  int num_heads, feature_dim, num_features, head_dim;
  float scale;  // f^−¼
  float eps;
  std::int64_t prefix_length;  // keys that S and z may hold beside those of the sequence's own tokens (PrefixView)
  bool adds_prefix;  // k and v are a prefix's, of the sequences that begin: they are added, and no output is made
  // recurrent_kernel only:
  int num_slices, slice_dim;  // columns of a block
  bool state_in_shared;
  float* z_work;  // (num_longs, H, num_slices, num_features), unless state_in_shared
  float* z_out;   // (num_longs, H, num_features); null: into the state
};

__device__ __forceinline__ float load_element(const void* data, std::int64_t index, DType dtype) {
  if (dtype == DType::bfloat16) return to_float(static_cast<const bf16*>(data)[index]);
  if (dtype == DType::float16) return to_float(static_cast<const fp16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

__device__ __forceinline__ void store_element(void* data, std::int64_t index, float x, DType dtype) {
  if (dtype == DType::bfloat16)
    static_cast<bf16*>(data)[index] = from_float<bf16>(x);
  else if (dtype == DType::float16)
    static_cast<fp16*>(data)[index] = from_float<fp16>(x);
  else
    static_cast<float*>(data)[index] = x;
}

/// Calls f(T{}) with the element type of `dtype`: one choice for many loads, which are then under way together.
template <typename F>
__device__ __forceinline__ void with_element(DType dtype, F&& f) {
  if (dtype == DType::bfloat16) return f(bf16{});
  if (dtype == DType::float16) return f(fp16{});
  f(float{});
}

/// Of one head of a slot: k (W, f) and v (W, head_dim) of its pending tokens, T, and how many there are.
struct PendingTokens {
  void *keys, *values;
  std::int32_t* count;
};

__device__ __forceinline__ PendingTokens pending_tokens(const RecurrentArguments& a, int slot, int head) {
  auto* data = slot_data<std::byte>(a.pending, slot);
  const std::int64_t row = static_cast<std::int64_t>(head) * kPendingTokens * (a.dtype == DType::float32 ? 4 : 2);
  return {data + row * a.feature_dim, data + a.pending_values + row * a.head_dim,
          reinterpret_cast<std::int32_t*>(data + a.pending_counts) + head};
}

/// p(s) of s = y_q · y_k, by a warp.
__device__ __forceinline__ float taylor_score(const float* yq, const float* yk, int f, int lane) {
  float s = 0.0f;
  for (int i = lane; i < f; i += 32) s += yq[i] * yk[i];
  s = warp_sum(s);
  return 1.0f + s + 0.5f * s * s;
}

/// Feature `feature` as weight · y[i] y[j], where y[f] = 1.
struct FeaturePair {
  int i, j;
  float weight;
};

__device__ __forceinline__ FeaturePair feature_pair(int feature, int f) {
  if (feature <= f) return {feature == 0 ? f : feature - 1, f, 1.0f};
  const int p = feature - 1 - f;
  const auto row_start = [f](int i) { return i * f - i * (i - 1) / 2; };
  const float middle = static_cast<float>(f) + 0.5f;
  int i = static_cast<int>(middle - sqrtf(fmaxf(middle * middle - 2.0f * static_cast<float>(p), 0.0f)));
  i = min(max(i, 0), f - 1);
  while (row_start(i) > p) --i;
  while (row_start(i + 1) <= p) ++i;
  const int j = i + p - row_start(i);
  return {i, j, i == j ? 0.70710678118654752f : 1.0f};
}

/// Keys that a sequence has left in S and z and among the pending tokens. (Of one whose first prompt was shorter than
/// the prefix that its layer can read: at least so many; it is used from kCountLimit on, where that is no difference.)
__device__ __forceinline__ std::int64_t keys_before(const RecurrentArguments& a, int sequence) {
  return a.batch.positions[sequence] + a.prefix_length;
}

/// z's first feature, the number of keys in S and z: of the `position` keys of the sequence, `pending` are not among
/// them. `stored` is what lies in z, which has stopped to count at kCountLimit.
__device__ __forceinline__ float token_count(float stored, std::int64_t position, int pending) {
  return position < kCountLimit ? stored : static_cast<float>(position - pending);
}

template <int kVec>
struct Columns {
  float x[kVec];
};

template <int kVec>
__device__ __forceinline__ Columns<kVec> load_columns(const float* p) {
  Columns<kVec> c;
  if constexpr (kVec == 4) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    c.x[0] = v.x, c.x[1] = v.y, c.x[2] = v.z, c.x[3] = v.w;
  } else {
    c.x[0] = *p;
  }
  return c;
}

template <int kVec>
__device__ __forceinline__ void store_columns(float* p, const Columns<kVec>& c) {
  if constexpr (kVec == 4)
    *reinterpret_cast<float4*>(p) = make_float4(c.x[0], c.x[1], c.x[2], c.x[3]);
  else
    *p = c.x[0];
}

// ---- one token per sequence ----------------------------------------------------------------------------------------

constexpr int kDecodeBatch = 4;  // rows of the state under way per thread, twice

/// Features whose φ is in shared memory at a time.
template <int kPending>
constexpr int kDecodeRows = kPending > 1 ? 512 : 1024;

template <int kPending>
std::size_t decode_shared_bytes(int feature_dim, int num_features, int threads, int column_threads, int vec) {
  const auto rows =
      static_cast<std::size_t>(num_features < kDecodeRows<kPending> ? num_features : kDecodeRows<kPending>);
  const auto width = static_cast<std::size_t>(column_threads) * static_cast<std::size_t>(vec);
  const std::size_t sums = static_cast<std::size_t>(threads) * static_cast<std::size_t>(vec);
  return (sums + kPending * width + (kPending + 1) * (rows + static_cast<std::size_t>(feature_dim) + 1) + kPending +
          32 + 1) *
         sizeof(float);
}

/// One block per (single, head): a stream over S, read, dotted with φ(q) and, when the pending tokens are added,
/// updated and written, in one pass. Thread (r, c) has columns c · kVec … of rows r, r + row_groups, …;
/// `column_threads` values of c.
template <int kVec, int kPending>
__global__ void __launch_bounds__(1024) decode_kernel(RecurrentArguments a, int column_threads, int row_groups) {
  extern __shared__ __align__(16) float shared[];
  wait_for_predecessors();
  release_successors();
  constexpr int kRows = kDecodeRows<kPending>;
  const int f = a.feature_dim, num_features = a.num_features;
  const int index = static_cast<int>(blockIdx.x) / a.num_heads, head = static_cast<int>(blockIdx.x) % a.num_heads;
  const int sequence = a.batch.singles ? a.batch.singles[index] : index;
  const int slot = a.batch.slots[sequence];
  if (slot < 0) return;
  const std::int64_t token = a.batch.offsets[sequence], position = keys_before(a, sequence);
  const int tid = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  PendingTokens pending{};
  int count = 0;  // of pending tokens before this one
  if constexpr (kPending > 1) {
    pending = pending_tokens(a, slot, head);
    count = *pending.count;
  }
  const bool folds = count + 1 == kPending;

  const int shared_rows = min(num_features, kRows), width = column_threads * kVec;
  float* sums = shared;                           // (row_groups, width)
  float* values = sums + num_threads * kVec;      // (kPending, width): v of the pending tokens, then of this one
  float* phi_k = values + kPending * width;       // (shared_rows, kPending)
  float* phi_q = phi_k + shared_rows * kPending;  // (shared_rows)
  float* yk = phi_q + shared_rows;                // (kPending, f + 1)
  float* yq = yk + kPending * (f + 1);
  float* scores = yq + f + 1;  // (kPending)
  float* warp_sums = scores + kPending;
  float* denominator = warp_sums + 32;

  float* state = slot_data<float>(a.state, slot);
  float* z = state + static_cast<std::int64_t>(a.num_heads) * num_features * a.head_dim +
             static_cast<std::int64_t>(head) * num_features;
  state += static_cast<std::int64_t>(head) * num_features * a.head_dim;
  const std::int64_t q_at = token * a.qkv.q_token + head * a.qkv.q_head;
  const std::int64_t k_at = token * a.qkv.k_token + head * a.qkv.k_head;
  const std::int64_t v_at = token * a.qkv.v_token + head * a.qkv.v_head;
  const std::int64_t out_at = token * a.out_token + head * a.out_head;
  const int group = tid / column_threads, lane_column = (tid % column_threads) * kVec;

  for (int first_column = 0; first_column < a.head_dim; first_column += width) {
    const int column = first_column + lane_column;
    const bool streams = group < row_groups && column < a.head_dim;
    Columns<kVec> acc{};
    float partial = 0.0f;
    for (int first_row = 0; first_row < num_features; first_row += kRows) {
      const int rows = min(num_features - first_row, kRows);
      float* s = state + static_cast<std::int64_t>(first_row) * a.head_dim + column;
      const int row_step = row_groups * a.head_dim;
      const auto load_batch = [&](Columns<kVec>(&x)[kDecodeBatch], int row) {
#pragma unroll
        for (int i = 0; i < kDecodeBatch; ++i)
          if (streams && row + i * row_groups < rows) x[i] = load_columns<kVec>(s + row * a.head_dim + i * row_step);
      };
      Columns<kVec> now[kDecodeBatch], next[kDecodeBatch];
      load_batch(now, group);
      const bool has_z = first_column == 0 && tid < rows;
      const float first_z = has_z ? z[first_row + tid] : 0.0f;  // under way with the rows
      if (first_row == 0)
        with_element(a.dtype, [&]<typename T>(T) {
          const T* v = static_cast<const T*>(a.qkv.v) + v_at + first_column;
          T* old_v = static_cast<T*>(pending.values) + first_column;
          const int columns = min(width, a.head_dim - first_column);
#pragma unroll 4
          for (int i = tid; i < (count + 1) * columns; i += num_threads) {
            const int j = i / columns, c = i % columns;
            values[j * width + c] = to_float(j == count ? v[c] : old_v[j * a.head_dim + c]);
          }
          const T* q = static_cast<const T*>(a.qkv.q) + q_at;
          const T* k = static_cast<const T*>(a.qkv.k) + k_at;
          T* old_k = static_cast<T*>(pending.keys);
          if (first_column == 0)
            for (int i = tid; i < (count + 2) * (f + 1); i += num_threads) {
              const int j = i / (f + 1), d = i % (f + 1);
              float y = 1.0f;
              if (d < f) y = to_float(j > count ? q[d] : j == count ? k[d] : old_k[j * f + d]) * a.scale;
              (j > count ? yq : yk + j * (f + 1))[d] = y;
            }
          if (folds) return;
          for (int c = tid; c < columns; c += num_threads) old_v[count * a.head_dim + c] = v[c];
          if (first_column == 0)
            for (int d = tid; d < f; d += num_threads) old_k[count * f + d] = k[d];
        });
      __syncthreads();
      if (first_row == 0 && first_column == 0)
        for (int j = tid / 32; j <= count; j += num_threads / 32) {
          const float score = taylor_score(yq, yk + j * (f + 1), f, tid % 32);
          if (tid % 32 == 0) scores[j] = score;
        }
      for (int row = tid; row < rows; row += num_threads) {
        const FeaturePair pair = feature_pair(first_row + row, f);
        const float q = yq[pair.i] * yq[pair.j] * pair.weight;
        phi_q[row] = q;
        float sum = 0.0f;
        if (folds)
#pragma unroll
          for (int j = 0; j < kPending; ++j) {
            const float k = yk[j * (f + 1) + pair.i] * yk[j * (f + 1) + pair.j] * pair.weight;
            phi_k[row * kPending + j] = k;
            sum += k;
          }
        if (first_column == 0) {
          float old = row == tid ? first_z : z[first_row + row];
          if (first_row + row == 0) old = token_count(old, position, count);
          partial += q * old;
          if (folds) z[first_row + row] = old + sum;
        }
      }
      __syncthreads();
      for (int row = group; row < rows; row += kDecodeBatch * row_groups) {
        load_batch(next, row + kDecodeBatch * row_groups);
#pragma unroll
        for (int i = 0; i < kDecodeBatch; ++i) {
          const int at = row + i * row_groups;
          if (!streams || at >= rows) continue;
#pragma unroll
          for (int n = 0; n < kVec; ++n) acc.x[n] += phi_q[at] * now[i].x[n];
        }
        if (folds && streams) {
#pragma unroll 1
          for (int j = 0; j < kPending; ++j) {
            const Columns<kVec> v = load_columns<kVec>(values + j * width + lane_column);
#pragma unroll
            for (int i = 0; i < kDecodeBatch; ++i) {
              const int at = row + i * row_groups;
              if (at >= rows) continue;
#pragma unroll
              for (int n = 0; n < kVec; ++n) now[i].x[n] += phi_k[at * kPending + j] * v.x[n];
            }
          }
#pragma unroll
          for (int i = 0; i < kDecodeBatch; ++i)
            if (row + i * row_groups < rows) store_columns<kVec>(s + row * a.head_dim + i * row_step, now[i]);
        }
#pragma unroll
        for (int i = 0; i < kDecodeBatch; ++i) now[i] = next[i];
      }
    }
    if (first_column == 0) {
      partial = warp_sum(partial);
      if (tid % 32 == 0) warp_sums[tid / 32] = partial;
    }
    store_columns<kVec>(sums + tid * kVec, acc);
    __syncthreads();
    if (first_column == 0) {
      if (tid < 32) {
        float sum = warp_sum(tid < num_threads / 32 ? warp_sums[tid] : 0.0f);
        for (int j = 0; j <= count; ++j) sum += scores[j];
        if (tid == 0) *denominator = sum + a.eps;
      }
      if constexpr (kPending > 1)
        if (tid == 0) *pending.count = folds ? 0 : count + 1;  // all have read it
      __syncthreads();
    }
    for (int i = tid; i < width && first_column + i < a.head_dim; i += num_threads) {
      float sum = 0.0f;
      for (int r = 0; r < row_groups; ++r) sum += sums[r * width + i];
      for (int j = 0; j <= count; ++j) sum += scores[j] * values[j * width + i];
      store_element(a.out, out_at + first_column + i, sum / *denominator, a.dtype);
    }
    __syncthreads();
  }
}

// ---- one token per sequence, from compute capability 9.0 on ---------------------------------------------------------

constexpr int kBulkWarps = 8;
constexpr int kBulkThreads = 32 * kBulkWarps;
constexpr int kBulkChunks = 16;  // at most, of whole rows of S
constexpr int kBulkRows = 5;     // rows under way per thread

/// Floats for φ(k), and for the sums of the rows when it is no longer needed; even, for what follows has 8 bytes.
__host__ __device__ constexpr int decode_bulk_work(int pending, int num_features) {
  const int phi_k = (num_features * pending + 1) / 2 * 2;
  return phi_k > kBulkThreads * 4 ? phi_k : kBulkThreads * 4;
}

template <int kPending>
std::size_t decode_bulk_shared_bytes(int feature_dim, int num_features, int head_dim) {
  const auto f = static_cast<std::size_t>(feature_dim), rows = static_cast<std::size_t>(num_features);
  const std::size_t floats = rows * static_cast<std::size_t>(head_dim) +
                             static_cast<std::size_t>(decode_bulk_work(kPending, num_features)) + rows +
                             (kPending + 1) * (f + 1) + kPending + kBulkWarps;
  return floats * sizeof(float) + kBulkChunks * sizeof(std::uint64_t);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// Phase 0 of `barrier` ends when `bytes`, a multiple of 16, have come from `global` to `shared`.
__device__ __forceinline__ void load_bulk(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

/// What this thread wrote into shared memory is seen by bulk copies issued after it.
__device__ __forceinline__ void fence_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void store_bulk(void* global, const void* shared, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
#endif

/// One block per (single, head), head_dim a multiple of 4 and at most 128. All of S is under way to shared memory at
/// once, without a register; the pending tokens' scores are made meanwhile. Warp w dots with φ(q) and, when the pending
/// tokens are added, updates and writes back chunks w, w + kBulkWarps, … of `chunk_rows` rows, apart from the other
/// warps. Lane (r, c) has columns 4c … of rows r, r + row_groups, …. Thread n < head_dim adds up column n of y.
template <int kPending>
__global__ void __launch_bounds__(kBulkThreads, 3) decode_bulk_kernel(RecurrentArguments a, int chunk_rows) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static_assert(kPending <= kBulkWarps);
  extern __shared__ __align__(16) float shared[];
  const int f = a.feature_dim, num_features = a.num_features, head_dim = a.head_dim;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int num_chunks = (num_features + chunk_rows - 1) / chunk_rows;
  float* tile = shared;                           // (num_features, head_dim)
  float* phi_k = tile + num_features * head_dim;  // (num_features, kPending)
  float* sums = phi_k;                            // later: (kBulkWarps, row_groups, head_dim)
  std::uint64_t* barriers =
      reinterpret_cast<std::uint64_t*>(phi_k + decode_bulk_work(kPending, num_features));  // (kBulkChunks)
  float* phi_q = reinterpret_cast<float*>(barriers + kBulkChunks);                         // (num_features)
  float* yk = phi_q + num_features;                                                        // (kPending, f + 1)
  float* yq = yk + kPending * (f + 1);
  float* scores = yq + f + 1;  // (kPending)
  float* warp_sums = scores + kPending;

  if (lane == 0) {
    for (int chunk = warp; chunk < num_chunks; chunk += kBulkWarps) init_barrier(barriers + chunk, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_for_bulk();
  }
  FeaturePair pair = feature_pair(min(tid, num_features - 1), f);
  wait_for_predecessors();
  release_successors();
  const int index = static_cast<int>(blockIdx.x) / a.num_heads, head = static_cast<int>(blockIdx.x) % a.num_heads;
  const int sequence = sequence_of_single(a.batch, static_cast<unsigned>(index));
  const int slot = a.batch.slots[sequence];
  const std::int64_t token = a.batch.offsets[sequence], position = keys_before(a, sequence);
  if (slot < 0) return;

  float* state = slot_data<float>(a.state, slot);
  float* z = state + static_cast<std::int64_t>(a.num_heads) * num_features * head_dim +
             static_cast<std::int64_t>(head) * num_features;
  state += static_cast<std::int64_t>(head) * num_features * head_dim;
  const auto chunk_bytes = [&](int chunk) {
    return static_cast<unsigned>(min(chunk_rows, num_features - chunk * chunk_rows) * head_dim) *
           static_cast<unsigned>(sizeof(float));
  };
  if (lane == 0)
    for (int chunk = warp; chunk < num_chunks; chunk += kBulkWarps) {
      const int at = chunk * chunk_rows * head_dim;
      load_bulk(tile + at, state + at, chunk_bytes(chunk), barriers + chunk);
    }

  PendingTokens pending{};
  int count = 0;  // of pending tokens before this one
  if constexpr (kPending > 1) {
    pending = pending_tokens(a, slot, head);
    count = *pending.count;
  }
  const float first_z = tid < num_features ? z[tid] : 0.0f;
  const std::int64_t q_at = token * a.qkv.q_token + head * a.qkv.q_head;
  const std::int64_t k_at = token * a.qkv.k_token + head * a.qkv.k_head;
  const std::int64_t v_at = token * a.qkv.v_token + head * a.qkv.v_head;
  const bool folds = count + 1 == kPending;
  float column_v[kPending];  // v of the pending tokens and, last, of this one
  with_element(a.dtype, [&]<typename T>(T) {
    const T* q = static_cast<const T*>(a.qkv.q) + q_at;
    const T* k = static_cast<const T*>(a.qkv.k) + k_at;
    T* old_k = static_cast<T*>(pending.keys);
    T* old_v = static_cast<T*>(pending.values) + tid;
    // Element i of yk and yq. What lies in the place of a pending k is read before it is known whether it is one.
    T old{}, mine{};
    const auto load = [&](int i) {
      const int j = i / (f + 1), d = i % (f + 1);
      if (j > kPending || d == f) return;
      if (j + 1 < kPending) old = old_k[j * f + d];
      mine = (j < kPending ? k : q)[d];
    };
    const auto scale = [&](int i) {
      const int j = i / (f + 1), d = i % (f + 1);
      if (j > kPending) return;
      yk[i] = d == f ? 1.0f : to_float(j < count ? old : mine) * a.scale;
      if (j == count && d < f && !folds) old_k[j * f + d] = mine;
    };
    load(tid);
    T x[kPending];
    if (tid < head_dim) {
      x[kPending - 1] = static_cast<const T*>(a.qkv.v)[v_at + tid];
#pragma unroll
      for (int j = 0; j + 1 < kPending; ++j)
        if (j < count) x[j] = old_v[j * head_dim];
    }
    scale(tid);
    for (int i = tid + kBulkThreads; i < (kPending + 1) * (f + 1); i += kBulkThreads) load(i), scale(i);
    if (tid < head_dim) {
#pragma unroll
      for (int j = 0; j < kPending; ++j) column_v[j] = to_float(x[j]);
      if (!folds) old_v[count * head_dim] = x[kPending - 1];
    }
  });
  __syncthreads();
  if (warp < kPending) {
    const float score = taylor_score(yq, yk + warp * (f + 1), f, lane);
    if (lane == 0) scores[warp] = warp <= count ? score : 0.0f;
  }
  float partial = 0.0f;
  for (int row = tid; row < num_features; row += kBulkThreads) {
    if (row != tid) pair = feature_pair(row, f);
    const float q = yq[pair.i] * yq[pair.j] * pair.weight;
    float old = row == tid ? first_z : z[row];
    if (row == 0) old = token_count(old, position, count);
    phi_q[row] = q;
    partial += q * old;
    if (folds) {
      float sum = old;
#pragma unroll
      for (int j = 0; j < kPending; ++j) {
        const float k = yk[j * (f + 1) + pair.i] * yk[j * (f + 1) + pair.j] * pair.weight;
        phi_k[row * kPending + j] = k;
        sum += k;
      }
      if (row == 0 && position >= kCountLimit) sum = static_cast<float>(position + 1);  // one by one none would count
      z[row] = sum;
    }
  }
  partial = warp_sum(partial);
  if (lane == 0) warp_sums[warp] = partial;
  __syncthreads();
  if constexpr (kPending > 1)
    if (tid == 0) *pending.count = folds ? 0 : count + 1;  // all have read it
  float y = 0.0f;
  if (tid < head_dim) {
    y = scores[count] * column_v[kPending - 1];
#pragma unroll
    for (int j = 0; j + 1 < kPending; ++j)
      if (j < count) y += scores[j] * column_v[j];
  }

  const int row_groups = 32 / (head_dim / 4), group = lane / (head_dim / 4), column = lane % (head_dim / 4) * 4;
  const bool streams = group < row_groups;
  Columns<4> acc{};
  const auto stream = [&]<bool kFolds>(const Columns<4>(&v)[kFolds ? kPending : 1]) {
    constexpr int kRows = kFolds && kPending > 1 ? 2 : kBulkRows;  // v takes the registers of the others
    for (int chunk = warp; chunk < num_chunks; chunk += kBulkWarps) {
      const int first_row = chunk * chunk_rows, rows = min(chunk_rows, num_features - first_row);
      float* chunk_tile = tile + first_row * head_dim;
      wait_for_phase(barriers + chunk, 0);
      for (int row = streams ? group : rows; row < rows; row += kRows * row_groups) {
        Columns<4> s[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (row + i * row_groups < rows)
            s[i] = load_columns<4>(chunk_tile + (row + i * row_groups) * head_dim + column);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int at = row + i * row_groups;
          if (at >= rows) continue;
          const float q = phi_q[first_row + at];
#pragma unroll
          for (int n = 0; n < 4; ++n) acc.x[n] += q * s[i].x[n];
          if constexpr (kFolds) {
            constexpr int kPart = kPending % 4 == 0 ? 4 : 1;
#pragma unroll
            for (int part = 0; part < kPending; part += kPart) {
              const Columns<kPart> k = load_columns<kPart>(phi_k + (first_row + at) * kPending + part);
#pragma unroll
              for (int j = 0; j < kPart; ++j)
#pragma unroll
                for (int n = 0; n < 4; ++n) s[i].x[n] += k.x[j] * v[part + j].x[n];
            }
            store_columns<4>(chunk_tile + at * head_dim + column, s[i]);
          }
        }
      }
      if constexpr (kFolds) {
        fence_for_bulk();
        __syncwarp();
        if (lane == 0) store_bulk(state + first_row * head_dim, chunk_tile, chunk_bytes(chunk));
      }
    }
  };
  if (folds) {
    Columns<4> v[kPending] = {};
    if (streams)
      with_element(a.dtype, [&]<typename T>(T) {
        const T* old_v = static_cast<const T*>(pending.values) + column;
        const T* mine = static_cast<const T*>(a.qkv.v) + v_at + column;
#pragma unroll
        for (int j = 0; j + 1 < kPending; ++j) {
          const auto x = *reinterpret_cast<const Packed<T, 4>*>(old_v + j * head_dim);
#pragma unroll
          for (int n = 0; n < 4; ++n) v[j].x[n] = to_float(x.x[n]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) v[kPending - 1].x[n] = to_float(mine[n]);
      });
    stream.template operator()<true>(v);
    __syncthreads();  // the sums overwrite φ(k)
  } else if constexpr (kPending > 1) {
    const Columns<4> none[1] = {};
    stream.template operator()<false>(none);
  }

  if (streams) store_columns<4>(sums + (warp * row_groups + group) * head_dim + column, acc);
  __syncthreads();
  if (tid < head_dim) {
    float denominator = a.eps;
    for (int i = 0; i < kBulkWarps * row_groups; ++i) y += sums[i * head_dim + tid];
#pragma unroll
    for (int i = 0; i < kBulkWarps; ++i) denominator += warp_sums[i];
#pragma unroll
    for (int j = 0; j < kPending; ++j) denominator += scores[j];
    store_element(a.out, token * a.out_token + head * a.out_head + tid, y / denominator, a.dtype);
  }
  // Shared memory must outlive the copies that read it.
  if (folds && lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#else
  __trap();  // never launched: decode_bulk_takes asks which code would run
#endif
}

// ---- before many tokens per sequence -------------------------------------------------------------------------------

constexpr int kFoldThreads = 256;
constexpr int kFoldColumns = 128;  // of v in shared memory at a time
constexpr int kFoldRows = 256;     // features whose φ is in shared memory at a time

inline std::size_t fold_shared_bytes(int feature_dim) {
  return kPendingTokens * (kFoldColumns + kFoldRows + static_cast<std::size_t>(feature_dim) + 1) * sizeof(float);
}

/// One block per (long sequence, head): adds the pending tokens to S and z, so that kernels of many tokens find all
/// that the sequence has seen, and puts the count right. Reads and writes S once when there are any. adds_prefix: one
/// block per (single, head), which adds the prefix of a sequence that begins with its only token, as if it were
/// pending.
__global__ void __launch_bounds__(kFoldThreads) fold_pending_kernel(RecurrentArguments a) {
  extern __shared__ __align__(16) float shared[];
  wait_for_predecessors();
  release_successors();
  constexpr int kW = kPendingTokens;
  const int f = a.feature_dim, num_features = a.num_features, head_dim = a.head_dim;
  const int index = static_cast<int>(blockIdx.x) / a.num_heads, head = static_cast<int>(blockIdx.x) % a.num_heads;
  const int sequence = a.adds_prefix ? sequence_of_single(a.batch, static_cast<unsigned>(index)) : a.batch.longs[index];
  const int slot = a.batch.slots[sequence];
  if (slot < 0 || (a.adds_prefix && a.batch.positions[sequence] != 0)) return;
  const std::int64_t position = a.adds_prefix ? 0 : keys_before(a, sequence);
  PendingTokens pending{};
  if (a.adds_prefix) {
    const std::int64_t token = a.batch.offsets[sequence], size = a.dtype == DType::float32 ? 4 : 2;
    auto* keys = const_cast<void*>(a.qkv.k);
    auto* values = const_cast<void*>(a.qkv.v);  // both are only read
    pending.keys = static_cast<std::byte*>(keys) + (token * a.qkv.k_token + head * a.qkv.k_head) * size;
    pending.values = static_cast<std::byte*>(values) + (token * a.qkv.v_token + head * a.qkv.v_head) * size;
  } else {
    pending = pending_tokens(a, slot, head);
  }
  const int count = a.adds_prefix ? 1 : *pending.count, tid = static_cast<int>(threadIdx.x);
  if (count == 0 && position < kCountLimit) return;
  float* values = shared;                   // (kW, kFoldColumns)
  float* phi = values + kW * kFoldColumns;  // (kFoldRows, kW)
  float* yk = phi + kFoldRows * kW;         // (kW, f + 1)
  float* state = slot_data<float>(a.state, slot);
  float* z = state + static_cast<std::int64_t>(a.num_heads) * num_features * head_dim +
             static_cast<std::int64_t>(head) * num_features;
  state += static_cast<std::int64_t>(head) * num_features * head_dim;
  if (count == 0) {
    if (tid == 0) z[0] = static_cast<float>(position);
    return;
  }
  for (int i = tid; i < kW * (f + 1); i += kFoldThreads) {  // φ(k) of tokens that are not there is 0
    const int j = i / (f + 1), d = i % (f + 1);
    yk[i] = j >= count ? 0.0f : d == f ? 1.0f : load_element(pending.keys, j * f + d, a.dtype) * a.scale;
  }
  for (int first_column = 0; first_column < head_dim; first_column += kFoldColumns) {
    const int columns = min(kFoldColumns, head_dim - first_column);
    for (int i = tid; i < kW * columns; i += kFoldThreads) {
      const int j = i / columns, c = i % columns;
      values[j * kFoldColumns + c] =
          j < count ? load_element(pending.values, j * head_dim + first_column + c, a.dtype) : 0.0f;
    }
    for (int first_row = 0; first_row < num_features; first_row += kFoldRows) {
      const int rows = min(num_features - first_row, kFoldRows);
      __syncthreads();  // yk and values are there; the last rows' φ is no longer needed
      for (int row = tid; row < rows; row += kFoldThreads) {
        const FeaturePair pair = feature_pair(first_row + row, f);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kW; ++j) {
          // The weight of token j ≥ count is 0, that of the constant feature too.
          const float k = yk[j * (f + 1) + pair.i] * yk[j * (f + 1) + pair.j] * pair.weight;
          phi[row * kW + j] = k;
          sum += k;
        }
        if (first_column == 0) {
          const bool counts = first_row + row == 0;
          z[first_row + row] = (counts ? token_count(z[0], position, count) : z[first_row + row]) + sum;
        }
      }
      __syncthreads();
      float* s = state + static_cast<std::int64_t>(first_row) * head_dim + first_column;
#pragma unroll 4
      for (int i = tid; i < rows * columns; i += kFoldThreads) {
        const int row = i / columns, c = i % columns;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kW; ++j) sum += phi[row * kW + j] * values[j * kFoldColumns + c];
        s[row * head_dim + c] += sum;
      }
    }
    __syncthreads();
  }
  if (tid == 0 && !a.adds_prefix) *pending.count = 0;
}

// ---- many tokens per sequence --------------------------------------------------------------------------------------

constexpr int kGroupTokens = 8;      // tokens that share one pass over the state
constexpr int kRecurrentRows = 512;  // features whose φ is in shared memory at a time
constexpr int kRecurrentThreads = 256;

inline std::size_t recurrent_shared_bytes(int feature_dim, int num_features, int slice_dim, bool state_in_shared) {
  std::size_t floats = static_cast<std::size_t>(kRecurrentRows) * 2 * kGroupTokens;
  floats += 2 * kGroupTokens * (static_cast<std::size_t>(feature_dim) + 1) + kRecurrentThreads / 32 * kGroupTokens;
  if (state_in_shared) {
    floats = (floats + 3) / 4 * 4 + static_cast<std::size_t>(num_features) * static_cast<std::size_t>(slice_dim);
    floats += static_cast<std::size_t>(num_features);
  }
  return floats * sizeof(float);
}

/// One block per (long sequence, head, slice of columns). A slice of S stays in shared memory, when it fits, from the
/// first token to the last; every pass over it takes kGroupTokens tokens.
template <int kVec>
__global__ void __launch_bounds__(kRecurrentThreads) recurrent_kernel(RecurrentArguments a, int column_threads) {
  extern __shared__ __align__(16) float shared[];
  wait_for_predecessors();
  release_successors();
  constexpr int kT = kGroupTokens;
  const int f = a.feature_dim, num_features = a.num_features;
  const std::int64_t pair_index = blockIdx.x / static_cast<unsigned>(a.num_slices);  // (long, head)
  const int slice = static_cast<int>(blockIdx.x) % a.num_slices;
  const int index = static_cast<int>(pair_index / a.num_heads), head = static_cast<int>(pair_index % a.num_heads);
  const int sequence = a.batch.longs[index];
  const int slot = a.batch.slots[sequence];
  if (slot < 0) return;
  const int first_token = a.batch.offsets[sequence];
  int num_tokens = a.batch.offsets[sequence + 1] - first_token;
  if (a.adds_prefix)  // of the others z is handed on as it is
    num_tokens = a.batch.positions[sequence] == 0
                     ? static_cast<int>(min(static_cast<std::int64_t>(num_tokens), a.prefix_length))
                     : 0;
  const std::int64_t position = a.adds_prefix ? 0 : keys_before(a, sequence);
  const int tid = static_cast<int>(threadIdx.x);
  const int row_groups = kRecurrentThreads / column_threads;
  const int group = tid / column_threads, lane_column = (tid % column_threads) * kVec;
  const int first_column = slice * a.slice_dim;
  const int column = first_column + lane_column;
  const bool streams = group < row_groups && lane_column < a.slice_dim && column < a.head_dim;

  float* work = shared;  // φ: (rows, [k | q], kT), then sums: (kRecurrentThreads, kT, kVec)
  static_assert(kRecurrentThreads * kT * 4 <= kRecurrentRows * 2 * kT);
  float* y = work + kRecurrentRows * 2 * kT;  // ([k | q], kT, f + 1)
  float* warp_sums = y + 2 * kT * (f + 1);    // (warps, kT)
  const int shared_begin = (kRecurrentRows * 2 * kT + 2 * kT * (f + 1) + kRecurrentThreads / 32 * kT + 3) / 4 * 4;

  float* slot_state = slot_data<float>(a.state, slot);
  float* global_z = slot_state + static_cast<std::int64_t>(a.num_heads) * num_features * a.head_dim +
                    static_cast<std::int64_t>(head) * num_features;
  float* global_state = slot_state + static_cast<std::int64_t>(head) * num_features * a.head_dim + column;
  float* state = global_state;
  int row_stride = a.head_dim;
  float* z = a.z_work + (pair_index * a.num_slices + slice) * num_features;
  if (a.state_in_shared) {
    state = shared + shared_begin + lane_column;
    row_stride = a.slice_dim;
    z = shared + shared_begin + num_features * a.slice_dim;
    if (streams)
      for (int row = group; row < num_features; row += row_groups)
        store_columns<kVec>(state + row * row_stride,
                            load_columns<kVec>(global_state + static_cast<std::int64_t>(row) * a.head_dim));
  }
  for (int row = tid; row < num_features; row += kRecurrentThreads) z[row] = global_z[row];
  __syncthreads();

  for (int begin = 0; begin < num_tokens; begin += kT) {
    const int count = min(num_tokens - begin, kT);
    for (int i = tid; i < 2 * kT * (f + 1); i += kRecurrentThreads) {
      const int row = i / (f + 1), dim = i % (f + 1);
      const int token = row % kT;
      float x = 1.0f;
      if (dim < f && token < count) {
        const std::int64_t n = first_token + begin + token;
        x = row < kT ? load_element(a.qkv.k, n * a.qkv.k_token + head * a.qkv.k_head + dim, a.dtype)
                     : load_element(a.qkv.q, n * a.qkv.q_token + head * a.qkv.q_head + dim, a.dtype);
        x *= a.scale;
      }
      y[i] = x;
    }
    Columns<kVec> v[kT], acc[kT];
    float partial[kT];
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      partial[t] = 0.0f;
#pragma unroll
      for (int n = 0; n < kVec; ++n) {
        acc[t].x[n] = 0.0f;
        v[t].x[n] = 0.0f;
        if (streams && t < count)
          v[t].x[n] = load_element(
              a.qkv.v, (first_token + begin + t) * a.qkv.v_token + head * a.qkv.v_head + column + n, a.dtype);
      }
    }
    __syncthreads();
    for (int first_row = 0; first_row < num_features; first_row += kRecurrentRows) {
      const int rows = min(num_features - first_row, kRecurrentRows);
      for (int row = tid; row < rows; row += kRecurrentThreads) {
        const FeaturePair pair = feature_pair(first_row + row, f);
        float sum = z[first_row + row];
        const bool counts = first_row + row == 0 && position >= kCountLimit;
        Columns<4> k[kT / 4], q[kT / 4];
#pragma unroll
        for (int t = 0; t < kT; ++t) {
          const float* yk = y + t * (f + 1);
          const float* yq = yk + kT * (f + 1);
          const float phi_k = t < count ? yk[pair.i] * yk[pair.j] * pair.weight : 0.0f;
          const float phi_q = yq[pair.i] * yq[pair.j] * pair.weight;
          sum = counts && t < count ? static_cast<float>(position + begin + t + 1) : sum + phi_k;
          partial[t] += phi_q * sum;
          k[t / 4].x[t % 4] = phi_k;
          q[t / 4].x[t % 4] = phi_q;
        }
        z[first_row + row] = sum;
#pragma unroll
        for (int i = 0; i < kT / 4; ++i) {
          store_columns<4>(work + row * 2 * kT + 4 * i, k[i]);
          store_columns<4>(work + row * 2 * kT + kT + 4 * i, q[i]);
        }
      }
      __syncthreads();
      if (streams) {
#pragma unroll 2
        for (int row = group; row < rows; row += row_groups) {
          float* at = state + static_cast<std::int64_t>(first_row + row) * row_stride;
          Columns<kVec> s = load_columns<kVec>(at);
#pragma unroll
          for (int i = 0; i < kT / 4; ++i) {
            const Columns<4> k = load_columns<4>(work + row * 2 * kT + 4 * i);
            const Columns<4> q = load_columns<4>(work + row * 2 * kT + kT + 4 * i);
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
              for (int n = 0; n < kVec; ++n) {
                s.x[n] += k.x[t] * v[4 * i + t].x[n];
                acc[4 * i + t].x[n] += q.x[t] * s.x[n];
              }
          }
          store_columns<kVec>(at, s);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      store_columns<kVec>(work + (t * kRecurrentThreads + tid) * kVec, acc[t]);
      partial[t] = warp_sum(partial[t]);
      if (tid % 32 == 0) warp_sums[tid / 32 * kT + t] = partial[t];
    }
    __syncthreads();
    const int slice_columns = a.adds_prefix ? 0 : min(a.slice_dim, a.head_dim - first_column);
    for (int i = tid; i < count * slice_columns; i += kRecurrentThreads) {
      const int t = i / slice_columns, n = i % slice_columns;
      float sum = 0.0f, denominator = a.eps;
      for (int r = 0; r < row_groups; ++r) sum += work[(t * kRecurrentThreads + r * column_threads) * kVec + n];
      for (int w = 0; w < kRecurrentThreads / 32; ++w) denominator += warp_sums[w * kT + t];
      store_element(a.out, (first_token + begin + t) * a.out_token + head * a.out_head + first_column + n,
                    sum / denominator, a.dtype);
    }
  }

  if (a.state_in_shared && streams)
    for (int row = group; row < num_features; row += row_groups)
      store_columns<kVec>(global_state + static_cast<std::int64_t>(row) * a.head_dim,
                          load_columns<kVec>(state + row * row_stride));
  if (slice == 0) {
    float* z_out = a.z_out ? a.z_out + pair_index * num_features : global_z;
    for (int row = tid; row < num_features; row += kRecurrentThreads) z_out[row] = z[row];
  }
}

}  // namespace based::cuda
