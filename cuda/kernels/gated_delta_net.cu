#include "kernels/common.cuh"

#include <algorithm>
#include <cmath>

// The gated delta rule, per head: S ← α S, u = β (v − Sᵀk), S ← S + k uᵀ, y = Sᵀq, then RMSNorm and the output gate. q
// and k have length 1 (q: 1 / √key_dim), which is not stored: they stay as the convolution made them, T, and their
// inverse lengths r_q and r_k go into factors of rows.
//
// A step reads and writes S once (delta_walk_kernel, a block per sequence and head):
//   y = α Sᵀq + (k·q) u needs the old S alone, so that one pass sums Sᵀk and Sᵀq and S is written from registers.
//
// A prompt goes in chunks of C = 64 tokens. With G_i = log α_1 + … + log α_i inside the chunk and S_0 the state before
// it (all exponents are ≤ 0):
//   (I + A) U = diag(β) V − diag(β e^G) K S_0     A_ij = β_i e^(G_i − G_j) k_i·k_j, j < i
//   Y = diag(e^G) Q S_0 + P U                     P_ij = e^(G_i − G_j) q_i·k_j, j ≤ i
//   S = e^(G_C) S_0 + (diag(e^(G_C − G)) K)ᵀ U
// delta_chunk_kernel makes A, its inverse (I + A)⁻¹ and P of every chunk at once, delta_scan_kernel walks the chunks of
// a sequence with S in shared memory, a block per group of value columns: columns do not meet but in the norm, which
// delta_norm_kernel makes.
//
// Products are m16n8k8 with TF32 operands (11 significant bits, as many as float16 has) and float32 sums. Of T =
// float32 each operand is two TF32 numbers, and three products are added: about 22 bits.

namespace based::cuda {
namespace {

constexpr int kC = kTileTokens;
constexpr float kLengthEps = 1e-6f;  // added to the squared length of q and k

struct DeltaArguments {
  DeltaInputs in;
  DeviceBatch batch;
  StateView state;
  const void* qkv;        // (N, channels) T
  std::int64_t channels;  // a row of qkv: q of all heads, k, v
  std::int64_t beta_at;   // column of u of β's inputs
  std::int64_t decay_at;  // of α's; −1: α = 1
  std::int64_t gate_at;   // of the output gate's; −1: none
  int num_heads, dk, dv;  // key_dim, head_dim
  float root, eps;        // 1 / √key_dim
  void* out;              // (N, H · dv) T
  float* factors;         // (tiles, H, kFactors)
  float4* fragments;      // (tiles, H, 2, kFragments): (I + A)⁻¹, P
  float* y;               // (N, H · dv)
};

// ---- gates ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// β of a token.
template <typename T>
__device__ __forceinline__ float beta_of(const DeltaArguments& a, std::int64_t token, int head) {
  return sigmoid(to_float(static_cast<const T*>(a.in.u)[token * a.in.u_row + a.beta_at + head]));
}

/// log α of a token, ≤ 0.
template <typename T>
__device__ __forceinline__ float log_alpha_of(const DeltaArguments& a, std::int64_t token, int head) {
  if (a.decay_at < 0) return 0.0f;
  const float x = to_float(static_cast<const T*>(a.in.u)[token * a.in.u_row + a.decay_at + head]) + a.in.dt_bias[head];
  return -expf(a.in.log_rate[head]) * (fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))));
}

/// What column c of a head's result, y over its root mean square, becomes.
template <typename T>
__device__ __forceinline__ T finished(const DeltaArguments& a, std::int64_t token, int head, int c, float y) {
  y *= a.in.norm[c];
  if (a.gate_at >= 0) {
    const std::int64_t at = a.gate_at + static_cast<std::int64_t>(head) * a.dv + c;
    y *= silu<float>(to_float(static_cast<const T*>(a.in.u)[token * a.in.u_row + at]));
  }
  return from_float<T>(y);
}

// ---- token by token ------------------------------------------------------------------------------------------------

constexpr int kWalkHeld = 16;  // rows of the state that a thread keeps in registers between reading and writing

struct WalkShape {
  int threads, column_threads, row_groups;
};

/// Sum over the block of each of three numbers; everyone has them. `place`: 3 · 32 floats.
__device__ __forceinline__ void block_sums(float (&x)[3], float* place) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    x[i] = warp_sum(x[i]);
    if (lane == 0) place[32 * i + warp] = x[i];
  }
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    x[i] = 0.0f;
    for (int w = 0; w < warps; ++w) x[i] += place[32 * i + w];
  }
  __syncthreads();
}

inline std::size_t walk_shared_bytes(const WalkShape& shape, int dk, int dv, int vec) {
  const std::size_t width = static_cast<std::size_t>(shape.column_threads) * static_cast<std::size_t>(vec);
  return (2 * static_cast<std::size_t>(shape.row_groups) * width + width + 2 * static_cast<std::size_t>(dk) +
          static_cast<std::size_t>(dv) + 3 * 32) *
         sizeof(float);
}

/// One block per (sequence, head), of singles or of longs. Thread (r, c) has columns c · kVec … of rows r, r +
/// row_groups, …; `column_threads` values of c. Any size; what does not fit in the registers is read twice.
template <typename T, int kVec>
__global__ void __launch_bounds__(512) delta_walk_kernel(DeltaArguments a, bool longs, WalkShape shape) {
  extern __shared__ __align__(16) float shared[];
  wait_for_predecessors();
  release_successors();
  using Floats = Packed<float, kVec>;
  const int index = static_cast<int>(blockIdx.x) / a.num_heads, head = static_cast<int>(blockIdx.x) % a.num_heads;
  const int sequence = longs ? a.batch.longs[index] : sequence_of_single(a.batch, static_cast<unsigned>(index));
  const int slot = a.batch.slots[sequence];
  if (slot < 0) return;
  const int tid = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int group = tid / shape.column_threads, lane_column = tid % shape.column_threads * kVec;
  const int width = shape.column_threads * kVec, groups = shape.row_groups, dk = a.dk, dv = a.dv;

  float* sums = shared;                       // (Sᵀk | Sᵀq, row_groups, width)
  float* change = sums + 2 * groups * width;  // (width): u
  float* q = change + width;                  // (dk)
  float* k = q + dk;
  float* y = k + dk;      // (dv)
  float* place = y + dv;  // (3, 32)
  float* state = slot_data<float>(a.state, slot) + static_cast<std::int64_t>(head) * dk * dv;

  for (std::int64_t token = a.batch.offsets[sequence]; token < a.batch.offsets[sequence + 1]; ++token) {
    const T* row = static_cast<const T*>(a.qkv) + token * a.channels;
    const T* of_q = row + static_cast<std::int64_t>(head) * dk;
    const T* of_k = of_q + static_cast<std::int64_t>(a.num_heads) * dk;
    const T* of_v = row + 2 * static_cast<std::int64_t>(a.num_heads) * dk + static_cast<std::int64_t>(head) * dv;
    const float beta = beta_of<T>(a, token, head), alpha = expf(log_alpha_of<T>(a, token, head));
    float products[3] = {0.0f, 0.0f, 0.0f};  // q·q, k·k, q·k
    float squares[3] = {0.0f, 0.0f, 0.0f};   // of y

    for (int first_column = 0; first_column < dv; first_column += width) {
      const int column = first_column + lane_column;
      const bool streams = group < groups && column < dv;
      float* s = state + column;
      const auto load_row = [&](int i) {
        return *reinterpret_cast<const Floats*>(s + static_cast<std::int64_t>(i) * dv);
      };
      Floats held[kWalkHeld];
#pragma unroll
      for (int i = 0; i < kWalkHeld; ++i)
        if (streams && group + i * groups < dk) held[i] = load_row(group + i * groups);
      if (first_column == 0) {  // while they are under way
        for (int i = tid; i < dk; i += num_threads) {
          const float x = to_float(of_q[i]), z = to_float(of_k[i]);
          q[i] = x;
          k[i] = z;
          products[0] += x * x;
          products[1] += z * z;
          products[2] += x * z;
        }
        block_sums(products, place);
        products[0] = a.root / sqrtf(products[0] + kLengthEps);
        products[1] = 1.0f / sqrtf(products[1] + kLengthEps);
        products[2] *= products[0] * products[1];
      }
      Floats with_k{}, with_q{};
      const auto add = [&](int i, const Floats& x) {
#pragma unroll
        for (int n = 0; n < kVec; ++n) {
          with_k.x[n] += k[i] * x.x[n];
          with_q.x[n] += q[i] * x.x[n];
        }
      };
      if (streams) {
#pragma unroll
        for (int i = 0; i < kWalkHeld; ++i)
          if (group + i * groups < dk) add(group + i * groups, held[i]);
        for (int i = group + kWalkHeld * groups; i < dk; i += groups) add(i, load_row(i));
        *reinterpret_cast<Floats*>(sums + group * width + lane_column) = with_k;
        *reinterpret_cast<Floats*>(sums + (groups + group) * width + lane_column) = with_q;
      }
      __syncthreads();
      for (int c = tid; c < width && first_column + c < dv; c += num_threads) {
        float sk = 0.0f, sq = 0.0f;
        for (int r = 0; r < groups; ++r) sk += sums[r * width + c], sq += sums[(groups + r) * width + c];
        const float u = beta * (to_float(of_v[first_column + c]) - alpha * (products[1] * sk));
        const float result = alpha * (products[0] * sq) + products[2] * u;
        change[c] = u;
        y[first_column + c] = result;
        squares[0] += result * result;
      }
      __syncthreads();
      if (streams) {
        const Floats u = *reinterpret_cast<const Floats*>(change + lane_column);
        const auto write = [&](int i, Floats x) {
          const float key = products[1] * k[i];
#pragma unroll
          for (int n = 0; n < kVec; ++n) x.x[n] = alpha * x.x[n] + key * u.x[n];
          *reinterpret_cast<Floats*>(s + static_cast<std::int64_t>(i) * dv) = x;
        };
#pragma unroll
        for (int i = 0; i < kWalkHeld; ++i)
          if (group + i * groups < dk) write(group + i * groups, held[i]);
        for (int i = group + kWalkHeld * groups; i < dk; i += groups) write(i, load_row(i));
      }
    }
    block_sums(squares, place);
    const float factor = 1.0f / sqrtf(squares[0] / static_cast<float>(dv) + a.eps);
    T* out = static_cast<T*>(a.out) + (token * a.num_heads + head) * dv;
    for (int c = tid; c < dv; c += num_threads) out[c] = finished<T>(a, token, head, c, y[c] * factor);
    __syncthreads();  // y, q and k are free
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

/// An operand: TF32 in its upper bits, the lower ones are not read; `low`: what it lacks, TF32 too (kExact).
struct Operand {
  std::uint32_t high, low;
};

/// Rounded to nearest, ties away from 0.
__device__ __forceinline__ std::uint32_t tf32(float x) { return __float_as_uint(x) + 0x1000u; }

template <bool kExact>
__device__ __forceinline__ Operand operand(float x) {
  Operand y{tf32(x), 0u};
  if constexpr (kExact) y.low = tf32(x - __uint_as_float(y.high & 0xffffe000u));
  return y;
}

/// Of a number that was T: of 16 bits it is TF32 as it is.
template <typename T>
__device__ __forceinline__ Operand operand_of(float x) {
  if constexpr (std::is_same_v<T, float>) return operand<true>(x);
  return {__float_as_uint(x), 0u};
}

__device__ __forceinline__ void mma_16x8x8(float (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                           std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// D (16 × 8) += A (16 × 8) B (8 × 8). Lane l with g = l / 4, t = l mod 4 holds
///   A: a0 = (g; t)  a1 = (g+8; t)  a2 = (g; t+4)  a3 = (g+8; t+4)      B: b0 = (t; g)  b1 = (t+4; g)
///   D: d0, d1 = (g; 2t, 2t+1)  d2, d3 = (g+8; 2t, 2t+1)
/// What is summed over may come in any order that A and B share.
template <bool kExact>
__device__ __forceinline__ void product(float (&d)[4], const Operand (&a)[4], const Operand (&b)[2]) {
  if constexpr (kExact) {
    mma_16x8x8(d, a[0].low, a[1].low, a[2].low, a[3].low, b[0].high, b[1].high);
    mma_16x8x8(d, a[0].high, a[1].high, a[2].high, a[3].high, b[0].low, b[1].low);
  }
  mma_16x8x8(d, a[0].high, a[1].high, a[2].high, a[3].high, b[0].high, b[1].high);
}

template <typename T>
constexpr bool kIsExact = std::is_same_v<T, float>;

/// Four consecutive numbers of T.
template <typename T>
__device__ __forceinline__ Packed<float, 4> load_four(const T* from) {
  const auto x = *reinterpret_cast<const Packed<T, 4>*>(from);
  Packed<float, 4> y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y.x[i] = to_float(x.x[i]);
  return y;
}

/// Elements of T from a row of keys or queries in shared memory to the next: lanes (g, t) that read elements 4t … of
/// row g meet in no bank, and lanes that read elements 2g, 2g + 1 of row t do not either.
template <typename T>
__host__ __device__ constexpr int key_pitch(int dims) {
  return sizeof(T) == 2 ? (dims + 63) / 64 * 64 + 16 : (dims + 31) / 32 * 32 + 16;
}

/// Rows of `count` tokens and zeros up to kC, columns [0, dims) of them and zeros up to `padded`, to shared memory.
/// `vector`: 16 bytes at a time, asynchronously.
template <typename T>
__device__ __forceinline__ void fetch_rows(T* to, int pitch, const T* from, std::int64_t row, int count, int dims,
                                           int padded, bool vector, int tid, int num_threads) {
  if (vector) {
    constexpr int kPart = 16 / sizeof(T);
    const int parts = padded / kPart;
    for (int i = tid; i < kC * parts; i += num_threads) {
      const int r = i / parts, c = i % parts * kPart;
      const bool valid = r < count && c < dims;
      copy_async_16(to + r * pitch + c, valid ? from + r * row + c : from, valid);
    }
  } else {
    for (int i = tid; i < kC * padded; i += num_threads) {
      const int r = i / padded, c = i % padded;
      to[r * pitch + c] = r < count && c < dims ? from[r * row + c] : from_float<T>(0.0f);
    }
  }
}

// ---- what a chunk knows without the state --------------------------------------------------------------------------

constexpr int kChunkThreads = 128;
constexpr int kPieceDims = 64;        // of q and k in shared memory at a time
constexpr int kFactors = 4 * kC + 4;  // β, β e^G r_k, e^G r_q, e^(G_C − G) r_k of each token; e^(G_C)
constexpr int kFragments = 20 * 32;   // of a lower triangle: 2 (m + 1) products in rows 16m …, 32 lanes each
constexpr int kTrianglePitch = kC + 4;

template <typename T>
struct ChunkShared {
  T k[kC][key_pitch<T>(kPieceDims)];
  T q[kC][key_pitch<T>(kPieceDims)];
  float a[kC][kTrianglePitch];
  float inverse[kC][kTrianglePitch];
  float between[3][16][16];
  float g[kC], beta[kC], rk[kC], rq[kC];
};

/// (I + A)⁻¹ by blocks of 16: those on the diagonal by substitution, a column a thread; then those d below it,
/// X_ij = −X_ii Σ_{k=j}^{i−1} A_ik X_kj.
__device__ __forceinline__ void invert(const float (*a)[kTrianglePitch], float (*x)[kTrianglePitch],
                                       float (*between)[16][16], int tid) {
  const int warp = tid / 32, lane = tid % 32;
  if (lane < 16) {
    const int at = 16 * warp;
    float column[16];
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      float sum = r == lane ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < r; ++j) sum -= a[at + r][at + j] * column[j];
      column[r] = sum;
      x[at + r][at + lane] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int d = 1; d < 4; ++d) {
    for (int e = tid; e < (4 - d) * 256; e += kChunkThreads) {
      const int j = e / 256, i = j + d, r = e / 16 % 16, c = e % 16;
      float sum = 0.0f;
      for (int m = 16 * j; m < 16 * i; ++m) sum += a[16 * i + r][m] * x[m][16 * j + c];
      between[j][r][c] = sum;
    }
    __syncthreads();
    for (int e = tid; e < (4 - d) * 256; e += kChunkThreads) {
      const int j = e / 256, i = j + d, r = e / 16 % 16, c = e % 16;
      float sum = 0.0f;
#pragma unroll
      for (int m = 0; m < 16; ++m) sum += (m <= r ? x[16 * i + r][16 * i + m] : 0.0f) * between[j][m][c];
      x[16 * i + r][16 * j + c] = -sum;
    }
    __syncthreads();
  }
}

/// One block per (tile, head). Warp m has rows 16m … 16m + 15 of K Kᵀ and Q Kᵀ.
template <typename T>
__global__ void __launch_bounds__(kChunkThreads) delta_chunk_kernel(DeltaArguments a, bool vector) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  ChunkShared<T>& shared = *reinterpret_cast<ChunkShared<T>*>(shared_bytes);
  wait_for_predecessors();
  release_successors();
  const int tile_index = static_cast<int>(blockIdx.x) / a.num_heads, head = static_cast<int>(blockIdx.x) % a.num_heads;
  const Tile tile = a.batch.tiles[tile_index];
  if (a.batch.slots[tile.sequence] < 0) return;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, m = tid / 32, g = lane / 4, t = lane % 4;
  const T* q = static_cast<const T*>(a.qkv) + tile.first * a.channels + static_cast<std::int64_t>(head) * a.dk;
  const T* k = q + static_cast<std::int64_t>(a.num_heads) * a.dk;

  if (tid < 32) {  // G, an inclusive sum: lane l has tokens l and l + 32
    float log_alpha[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = lane + 32 * i;
      const bool valid = n < tile.count;
      log_alpha[i] = valid ? log_alpha_of<T>(a, tile.first + n, head) : 0.0f;
      shared.beta[n] = valid ? beta_of<T>(a, tile.first + n, head) : 0.0f;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, log_alpha[i], step);
        if (lane >= step) log_alpha[i] += before;
      }
    }
    log_alpha[1] += __shfl_sync(0xffffffffu, log_alpha[0], 31);
    shared.g[lane] = log_alpha[0];
    shared.g[lane + 32] = log_alpha[1];
  }

  float kk[8][4] = {}, qk[8][4] = {};
  float squares[2][2] = {};  // |q|², |k|² of rows g and g + 8: this lane's share
  for (int first = 0; first < a.dk; first += kPieceDims) {
    const int dims = min(a.dk - first, kPieceDims), padded = (dims + 15) / 16 * 16;
    if (first > 0) __syncthreads();
    fetch_rows(&shared.k[0][0], key_pitch<T>(kPieceDims), k + first, a.channels, tile.count, dims, padded, vector, tid,
               kChunkThreads);
    fetch_rows(&shared.q[0][0], key_pitch<T>(kPieceDims), q + first, a.channels, tile.count, dims, padded, vector, tid,
               kChunkThreads);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    for (int at = 0; at < padded; at += 16) {
      const auto k0 = load_four(&shared.k[16 * m + g][at + 4 * t]),
                 k1 = load_four(&shared.k[16 * m + g + 8][at + 4 * t]);
      const auto q0 = load_four(&shared.q[16 * m + g][at + 4 * t]),
                 q1 = load_four(&shared.q[16 * m + g + 8][at + 4 * t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        squares[0][0] += q0.x[i] * q0.x[i];
        squares[0][1] += q1.x[i] * q1.x[i];
        squares[1][0] += k0.x[i] * k0.x[i];
        squares[1][1] += k1.x[i] * k1.x[i];
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (n > 2 * m + 1) break;
        const auto b = load_four(&shared.k[8 * n + g][at + 4 * t]);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const Operand of_b[2] = {operand_of<T>(b.x[2 * s]), operand_of<T>(b.x[2 * s + 1])};
          const Operand of_k[4] = {operand_of<T>(k0.x[2 * s]), operand_of<T>(k1.x[2 * s]),
                                   operand_of<T>(k0.x[2 * s + 1]), operand_of<T>(k1.x[2 * s + 1])};
          const Operand of_q[4] = {operand_of<T>(q0.x[2 * s]), operand_of<T>(q1.x[2 * s]),
                                   operand_of<T>(q0.x[2 * s + 1]), operand_of<T>(q1.x[2 * s + 1])};
          product<kIsExact<T>>(kk[n], of_k, of_b);
          product<kIsExact<T>>(qk[n], of_q, of_b);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = squares[i][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (t == 0)
        (i == 0 ? shared.rq : shared.rk)[16 * m + g + 8 * half] = (i == 0 ? a.root : 1.0f) / sqrtf(sum + kLengthEps);
    }
  __syncthreads();

  const std::int64_t pair = static_cast<std::int64_t>(tile_index) * a.num_heads + head;
  float* factors = a.factors + pair * kFactors;
  float4* of_inverse = a.fragments + pair * 2 * kFragments;
  float4* of_p = of_inverse + kFragments;
  const float last = shared.g[kC - 1];  // log α of tokens that are not there is 0
  if (tid < kC) {
    const bool valid = tid < tile.count;
    const float beta = shared.beta[tid], decay = expf(shared.g[tid]), rk = valid ? shared.rk[tid] : 0.0f;
    reinterpret_cast<float4*>(factors)[tid] =
        make_float4(beta, beta * decay * rk, valid ? decay * shared.rq[tid] : 0.0f, expf(last - shared.g[tid]) * rk);
  } else if (tid == kC) {
    factors[4 * kC] = expf(last);
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (n > 2 * m + 1) break;
    float p[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = 16 * m + g + e / 2 * 8, j = 8 * n + 2 * t + e % 2;
      const float decay = j <= i && i < tile.count ? expf(shared.g[i] - shared.g[j]) * shared.rk[j] : 0.0f;
      shared.a[i][j] = j < i ? shared.beta[i] * decay * shared.rk[i] * kk[n][e] : 0.0f;
      p[e] = decay * shared.rq[i] * qk[n][e];
    }
    // As A of the product with rows 8n … of U: tokens 8n + 2t, 8n + 2t + 1 in the places of t and t + 4.
    of_p[(m * (m + 1) + n) * 32 + lane] = make_float4(p[0], p[2], p[1], p[3]);
  }
  __syncthreads();
  invert(shared.a, shared.inverse, shared.between, tid);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (n > 2 * m + 1) break;
    const float2 upper = *reinterpret_cast<const float2*>(&shared.inverse[16 * m + g][8 * n + 2 * t]);
    const float2 lower = *reinterpret_cast<const float2*>(&shared.inverse[16 * m + g + 8][8 * n + 2 * t]);
    of_inverse[(m * (m + 1) + n) * 32 + lane] = make_float4(upper.x, lower.x, upper.y, lower.y);
  }
}

// ---- the chunks of a sequence, one after the other ------------------------------------------------------------------

constexpr int kScanThreads = 256;
constexpr int kColumnsPitch = kC + 8;

/// Sᵀ has a row per column of v: float32, padded like keys.
inline std::size_t scan_shared_bytes(int dk, int cols, int stages, std::size_t element) {
  const std::size_t keys = element == 2 ? key_pitch<bf16>(dk) : key_pitch<float>(dk);
  return static_cast<std::size_t>(cols) * (static_cast<std::size_t>(key_pitch<float>(dk)) + 3 * kColumnsPitch) *
             sizeof(float) +
         2 * static_cast<std::size_t>(stages) * kC * keys * element;
}

/// The tile with which a sequence begins: tiles are in order.
__device__ __forceinline__ int first_tile(const DeviceBatch& batch, int token) {
  int begin = 0, end = batch.num_tiles - 1;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (batch.tiles[middle].first < token)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

/// One block per (long sequence, head, kCols columns of v). Warp w has rows 16m …, m = w mod 4, and columns 8 (w / 4)
/// …, with 32 columns 8 (w / 4 + 2) … too, of R, U and Y; and dimensions 16w …, 16 (w + 8) …, … of Sᵀ. `stages`: tiles
/// of keys and queries in shared memory, 2 or, where they are too large, 1.
template <typename T, int kCols>
__global__ void __launch_bounds__(kScanThreads, 2)
    delta_scan_kernel(DeltaArguments a, int slices, int stages, bool vector) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  wait_for_predecessors();
  release_successors();
  constexpr bool kExact = kIsExact<T>;
  constexpr int kN = kCols / 16;  // groups of 8 columns of a warp
  int index = static_cast<int>(blockIdx.x);
  const int slice = index % slices;
  index /= slices;
  const int head = index % a.num_heads, sequence = a.batch.longs[index / a.num_heads];
  const int slot = a.batch.slots[sequence];
  if (slot < 0) return;
  const int first_token = a.batch.offsets[sequence], num_tokens = a.batch.offsets[sequence + 1] - first_token;
  const int first = first_tile(a.batch, first_token), num_tiles = (num_tokens + kC - 1) / kC;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
  const int m = warp % 4, dk = a.dk, padded = (dk + 15) / 16 * 16;
  const int block_column = slice * kCols, columns = min(kCols, a.dv - block_column);
  const int pitch = key_pitch<T>(dk), state_pitch = key_pitch<float>(dk);

  float* s = reinterpret_cast<float*>(shared_bytes);             // (kCols, state_pitch): Sᵀ
  float* of_r = s + kCols * state_pitch;                         // (kCols, kColumnsPitch): R, by column
  float* of_u = of_r + kCols * kColumnsPitch;                    // U
  float* of_w = of_u + kCols * kColumnsPitch;                    // diag(e^(G_C − G) r_k) U
  T* keys = reinterpret_cast<T*>(of_w + kCols * kColumnsPitch);  // (stages, k | q, kC, pitch)

  const T* q = static_cast<const T*>(a.qkv) + static_cast<std::int64_t>(first_token) * a.channels +
               static_cast<std::int64_t>(head) * dk;
  const T* k = q + static_cast<std::int64_t>(a.num_heads) * dk;
  const T* v = static_cast<const T*>(a.qkv) + static_cast<std::int64_t>(first_token) * a.channels +
               2 * static_cast<std::int64_t>(a.num_heads) * dk + static_cast<std::int64_t>(head) * a.dv + block_column;
  float* y = a.y + (static_cast<std::int64_t>(first_token) * a.num_heads + head) * a.dv + block_column;
  const std::int64_t y_row = static_cast<std::int64_t>(a.num_heads) * a.dv;
  float* state = slot_data<float>(a.state, slot) + static_cast<std::int64_t>(head) * dk * a.dv + block_column;

  const auto fetch_tile = [&](int tile) {
    if (tile < num_tiles) {
      T* to = keys + tile % stages * 2 * kC * pitch;
      const int count = min(num_tokens - tile * kC, kC);
      const std::int64_t at = static_cast<std::int64_t>(tile) * kC * a.channels;
      fetch_rows(to, pitch, k + at, a.channels, count, dk, padded, vector, tid, kScanThreads);
      fetch_rows(to + kC * pitch, pitch, q + at, a.channels, count, dk, padded, vector, tid, kScanThreads);
    }
    commit_copies();
  };
  fetch_tile(0);
  for (int i = tid; i < padded * kCols; i += kScanThreads) {
    const int d = i / kCols, c = i % kCols;
    s[c * state_pitch + d] = d < dk && c < columns ? state[static_cast<std::int64_t>(d) * a.dv + c] : 0.0f;
  }

  for (int tile = 0; tile < num_tiles; ++tile) {
    if (stages == 1 && tile > 0) {
      __syncthreads();
      fetch_tile(tile);
    }
    wait_for_copies<0>();
    __syncthreads();  // this tile is there, S too; everyone is done with the last one
    if (stages > 1) fetch_tile(tile + 1);
    const T* of_k = keys + tile % stages * 2 * kC * pitch;
    const T* of_q = of_k + kC * pitch;
    const int count = min(num_tokens - tile * kC, kC);
    const std::int64_t pair = static_cast<std::int64_t>(first + tile) * a.num_heads + head;
    const float* factors = a.factors + pair * kFactors;
    const float4* of_inverse = a.fragments + pair * 2 * kFragments + m * (m + 1) * 32 + lane;
    const float4* of_p = of_inverse + kFragments;

    // What comes from global memory is under way before the first product.
    float4 inverse[8];
#pragma unroll
    for (int n = 0; n < 8; ++n)
      if (n <= 2 * m + 1) inverse[n] = of_inverse[32 * n];
    float4 factor[2];
    float value[kN][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + g + 8 * half;
      factor[half] = reinterpret_cast<const float4*>(factors)[row];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 8 * (warp / 4 + 2 * n) + 2 * t + e;
          value[n][2 * half + e] = row < count && c < columns
                                       ? to_float(v[(static_cast<std::int64_t>(tile) * kC + row) * a.channels + c])
                                       : 0.0f;
        }
    }
    const float decay = factors[4 * kC];

    float ks[kN][4] = {}, qs[kN][4] = {};  // K S, Q S
    for (int at = 0; at < padded; at += 16) {
      const auto k0 = load_four(of_k + (16 * m + g) * pitch + at + 4 * t);
      const auto k1 = load_four(of_k + (16 * m + g + 8) * pitch + at + 4 * t);
      const auto q0 = load_four(of_q + (16 * m + g) * pitch + at + 4 * t);
      const auto q1 = load_four(of_q + (16 * m + g + 8) * pitch + at + 4 * t);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto b = load_four(s + (8 * (warp / 4 + 2 * n) + g) * state_pitch + at + 4 * t);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Operand of_b[2] = {operand<kExact>(b.x[2 * i]), operand<kExact>(b.x[2 * i + 1])};
          const Operand a_k[4] = {operand_of<T>(k0.x[2 * i]), operand_of<T>(k1.x[2 * i]),
                                  operand_of<T>(k0.x[2 * i + 1]), operand_of<T>(k1.x[2 * i + 1])};
          const Operand a_q[4] = {operand_of<T>(q0.x[2 * i]), operand_of<T>(q1.x[2 * i]),
                                  operand_of<T>(q0.x[2 * i + 1]), operand_of<T>(q1.x[2 * i + 1])};
          product<kExact>(ks[n], a_k, of_b);
          product<kExact>(qs[n], a_q, of_b);
        }
      }
    }

    // D's element e of a group of 8 columns: row 16m + g + 8 (e / 2), column 2t + e mod 2.
    const auto place = [&](int n, int e) {
      return (8 * (warp / 4 + 2 * n) + 2 * t + e % 2) * kColumnsPitch + 16 * m + g + e / 2 * 8;
    };
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) of_r[place(n, e)] = factor[e / 2].x * value[n][e] - factor[e / 2].y * ks[n][e];
    __syncthreads();

    // d += the lower triangle, in fragments, times rows 8i … of x, for the triangle's rows 16m ….
    const auto add_triangle = [&](float (&d)[kN][4], const float4(&triangle)[8], const float* x) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i > 2 * m + 1) break;
        const Operand of_a[4] = {operand<kExact>(triangle[i].x), operand<kExact>(triangle[i].y),
                                 operand<kExact>(triangle[i].z), operand<kExact>(triangle[i].w)};
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float2 b =
              *reinterpret_cast<const float2*>(x + (8 * (warp / 4 + 2 * n) + g) * kColumnsPitch + 8 * i + 2 * t);
          const Operand of_b[2] = {operand<kExact>(b.x), operand<kExact>(b.y)};
          product<kExact>(d[n], of_a, of_b);
        }
      }
    };
    float u[kN][4] = {};
    add_triangle(u, inverse, of_r);
    float4 p[8];
#pragma unroll
    for (int n = 0; n < 8; ++n)
      if (n <= 2 * m + 1) p[n] = of_p[32 * n];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        of_u[place(n, e)] = u[n][e];
        of_w[place(n, e)] = factor[e / 2].w * u[n][e];
      }
    __syncthreads();

    // Sᵀ (columns × dimensions) = e^(G_C) Sᵀ + Wᵀ K. Two groups of 8 columns of D are the even and the odd ones of 16
    // dimensions, so that a lane has dimensions 4t … 4t + 3 of columns g and g + 8.
    for (int at = 16 * warp; at < padded; at += 16 * (kScanThreads / 32)) {
      float d[kN][2][4];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto old = load_four(s + (16 * n + g + 8 * half) * state_pitch + at + 4 * t);
#pragma unroll
          for (int i = 0; i < 4; ++i) d[n][i % 2][2 * half + i / 2] = decay * old.x[i];
        }
#pragma unroll
      for (int i = 0; i < kC; i += 8) {
        const auto b0 = *reinterpret_cast<const Packed<T, 2>*>(of_k + (i + t) * pitch + at + 2 * g);
        const auto b1 = *reinterpret_cast<const Packed<T, 2>*>(of_k + (i + t + 4) * pitch + at + 2 * g);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float* w = of_w + (16 * n + g) * kColumnsPitch + i + t;
          const Operand of_a[4] = {operand<kExact>(w[0]), operand<kExact>(w[8 * kColumnsPitch]), operand<kExact>(w[4]),
                                   operand<kExact>(w[8 * kColumnsPitch + 4])};
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const Operand of_b[2] = {operand_of<T>(to_float(b0.x[odd])), operand_of<T>(to_float(b1.x[odd]))};
            product<kExact>(d[n][odd], of_a, of_b);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float4*>(s + (16 * n + g + 8 * half) * state_pitch + at + 4 * t) =
              make_float4(d[n][0][2 * half], d[n][1][2 * half], d[n][0][2 * half + 1], d[n][1][2 * half + 1]);
    }

#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) qs[n][e] *= factor[e / 2].z;
    add_triangle(qs, p, of_u);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * m + g + e / 2 * 8, c = 8 * (warp / 4 + 2 * n) + 2 * t + e % 2;
        if (row < count && c < columns) y[(static_cast<std::int64_t>(tile) * kC + row) * y_row + c] = qs[n][e];
      }
  }
  __syncthreads();
  for (int i = tid; i < dk * kCols; i += kScanThreads) {
    const int d = i / kCols, c = i % kCols;
    if (c < columns) state[static_cast<std::int64_t>(d) * a.dv + c] = s[c * state_pitch + d];
  }
}

/// The norm and the gate of a tile's tokens, a warp per token. Grid: tiles · heads.
template <typename T>
__global__ void __launch_bounds__(256) delta_norm_kernel(DeltaArguments a) {
  wait_for_predecessors();
  release_successors();
  const Tile tile = a.batch.tiles[static_cast<int>(blockIdx.x) / a.num_heads];
  const int head = static_cast<int>(blockIdx.x) % a.num_heads, lane = static_cast<int>(threadIdx.x) % 32;
  if (a.batch.slots[tile.sequence] < 0) return;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < tile.count; i += 8) {
    const std::int64_t token = tile.first + i;
    const float* y = a.y + (token * a.num_heads + head) * a.dv;
    T* out = static_cast<T*>(a.out) + (token * a.num_heads + head) * a.dv;
    float squares = 0.0f;
    for (int c = lane; c < a.dv; c += 32) squares += y[c] * y[c];
    const float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.dv) + a.eps);
    for (int c = lane; c < a.dv; c += 32) out[c] = finished<T>(a, token, head, c, y[c] * factor);
  }
}

// ---- launching -----------------------------------------------------------------------------------------------------

constexpr const char* kName = "gated_delta_net";

/// The model alone chooses the threads, which the sums follow.
WalkShape walk_shape(int dk, int dv, int vec) {
  WalkShape shape{};
  shape.threads = static_cast<std::int64_t>(dk) * dv > 256 * kWalkHeld * 4 ? 512 : 256;
  shape.column_threads = std::min((dv + vec - 1) / vec, shape.threads);
  shape.row_groups = std::max(1, std::min(shape.threads / shape.column_threads, dk));
  return shape;
}

template <typename T>
void launch_walk(cudaStream_t stream, const DeltaArguments& a, bool longs) {
  const int vec = a.dv % 4 == 0 && is_aligned(a.state.data, 16) && a.state.slot_stride % 16 == 0 ? 4 : 1;
  const WalkShape shape = walk_shape(a.dk, a.dv, vec);
  const int sequences = longs ? a.batch.num_longs : a.batch.num_singles;
  launch(stream, kName, vec == 4 ? delta_walk_kernel<T, 4> : delta_walk_kernel<T, 1>,
         dim3(blocks_for(static_cast<std::int64_t>(sequences) * a.num_heads, 1)),
         dim3(static_cast<unsigned>(shape.threads)), walk_shared_bytes(shape, a.dk, a.dv, vec), a, longs, shape);
}

/// Tiles of keys and queries that a block has room for; 0: not even one.
int scan_stages(const GatedDeltaNetConfig& config, std::size_t element) {
  if (config.key_dim > 4096) return 0;
  for (const int stages : {2, 1})
    if (scan_shared_bytes(static_cast<int>(config.key_dim), 32, stages, element) <=
        static_cast<std::size_t>(device_info().max_shared_bytes))
      return stages;
  return 0;
}

template <typename T>
void launch_chunks(cudaStream_t stream, const DeltaArguments& a, int stages) {
  const bool vector = is_aligned(a.qkv, 16) && static_cast<std::size_t>(a.dk) * sizeof(T) % 16 == 0 &&
                      static_cast<std::size_t>(a.channels) * sizeof(T) % 16 == 0;
  const dim3 by_tile(blocks_for(static_cast<std::int64_t>(a.batch.num_tiles) * a.num_heads, 1));
  launch(stream, kName, delta_chunk_kernel<T>, by_tile, dim3(kChunkThreads), sizeof(ChunkShared<T>), a, vector);
  // Narrow blocks fill a card that has few sequences, wide ones read keys and queries less often. A column's numbers do
  // not depend on the columns beside it: both make the same bits.
  const std::int64_t pairs = static_cast<std::int64_t>(a.batch.num_longs) * a.num_heads;
  const auto scan = [&]<int kCols>(std::integral_constant<int, kCols>) {
    const int slices = (a.dv + kCols - 1) / kCols;
    launch(stream, kName, delta_scan_kernel<T, kCols>, dim3(blocks_for(pairs * slices, 1)), dim3(kScanThreads),
           scan_shared_bytes(a.dk, kCols, stages, sizeof(T)), a, slices, stages, vector);
  };
  if (a.dv <= 16 || pairs * ((a.dv + 31) / 32) < 2 * device_info().num_sms)
    scan(std::integral_constant<int, 16>{});
  else
    scan(std::integral_constant<int, 32>{});
  launch(stream, kName, delta_norm_kernel<T>, by_tile, dim3(256), 0, a);
}

std::size_t align_256(std::size_t nbytes) { return (nbytes + 255) / 256 * 256; }

struct ScratchPlan {
  std::size_t fragments, y, nbytes;  // the factors begin at 0
  ScratchPlan(const GatedDeltaNetConfig& config, const DeviceBatch& batch) {
    const auto pairs = static_cast<std::size_t>(batch.num_tiles) * static_cast<std::size_t>(config.num_heads);
    fragments = align_256(pairs * kFactors * sizeof(float));
    y = fragments + align_256(pairs * 2 * kFragments * sizeof(float4));
    nbytes = y + static_cast<std::size_t>(batch.num_tokens) *
                     static_cast<std::size_t>(config.num_heads * config.head_dim) * sizeof(float);
  }
};

}  // namespace

std::size_t gated_delta_net_shared_bytes(const GatedDeltaNetConfig& config) {
  const int dk = static_cast<int>(config.key_dim), dv = static_cast<int>(config.head_dim);
  return std::max(walk_shared_bytes(walk_shape(dk, dv, 1), dk, dv, 1),
                  walk_shared_bytes(walk_shape(dk, dv, 4), dk, dv, 4));
}

std::size_t gated_delta_net_scratch(const GatedDeltaNetConfig& config, DType dtype, const DeviceBatch& batch) {
  return batch.num_longs == 0 || scan_stages(config, size_of(dtype)) == 0 ? 0 : ScratchPlan(config, batch).nbytes;
}

void gated_delta_net(cudaStream_t stream, const GatedDeltaNetConfig& config, DType dtype, const DeltaInputs& in,
                     const void* qkv, const DeviceBatch& batch, StateView state, void* out, void* scratch) {
  DeltaArguments a{};
  a.in = in;
  a.batch = batch;
  a.state = state;
  a.qkv = qkv;
  a.channels = config.channels();
  a.beta_at = a.channels;
  a.decay_at = config.decay ? a.beta_at + config.num_heads : -1;
  a.gate_at = config.output_gate ? a.beta_at + (config.decay ? 2 : 1) * config.num_heads : -1;
  a.num_heads = static_cast<int>(config.num_heads);
  a.dk = static_cast<int>(config.key_dim);
  a.dv = static_cast<int>(config.head_dim);
  a.root = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.key_dim)));
  a.eps = static_cast<float>(config.eps);
  a.out = out;
  const ScratchPlan plan(config, batch);
  auto* memory = static_cast<std::byte*>(scratch);
  a.factors = reinterpret_cast<float*>(memory);
  a.fragments = reinterpret_cast<float4*>(memory + plan.fragments);
  a.y = reinterpret_cast<float*>(memory + plan.y);
  for_dtype(dtype, [&]<typename T>(T) {
    if (batch.num_singles > 0) launch_walk<T>(stream, a, false);
    if (batch.num_longs == 0) return;
    if (const int stages = scan_stages(config, sizeof(T)))
      launch_chunks<T>(stream, a, stages);
    else
      launch_walk<T>(stream, a, true);
  });
}

}  // namespace based::cuda
