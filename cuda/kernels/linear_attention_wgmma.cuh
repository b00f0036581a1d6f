#pragma once

// Taylor attention of long sequences on Hopper's asynchronous tensor cores (wgmma, sm_90a): bfloat16, feature_dim 16.
// The sums are those of linear_attention_chunked.cuh; here a block's two warpgroups share them out. The first one, the
// builders, makes what the products read, once for all of them:
//   φ(cQ), φ(K) (64 tokens × 160 features), P = mask(p(Q Kᵀ)), 1 / (D + eps)
// The second one, the multipliers, keeps Sᵀ (64 columns × 160 features) as float32 accumulators, which, rounded to
// bfloat16, are the A fragments of the first product as they lie:
//   Oᵀ = Sᵀ φ(cQ)ᵀ + Vᵀ Pᵀ     Sᵀ += Vᵀ φ(K)
// φ(cQ) of the next tile is made while Sᵀ grows, φ(K) while Oᵀ is under way; two blocks of an SM fill each other's
// gaps.
//
// Features come in rows of 16: x_j, then x_j x_((j + r) mod 16) for r = 0 … 8. The second half of r = 8 repeats its
// first half and is 0, but for its first place, which holds the constant feature.

#include "kernels/linear_attention_chunked.cuh"
#include "kernels/wgmma.cuh"

namespace based::cuda {

constexpr int kWgmmaF = 16;
constexpr int kWgmmaGroups = 20;    // of 8 features
constexpr int kWgmmaConstant = 19;  // its first feature is the constant one
constexpr int kWgmmaColumns = 64;

/// A token (of P: a query) per row of 16 bytes.
using CoreMatrix = CoreMatrixOf<bf16>;

struct WgmmaShared {
  CoreMatrix phi_q[kWgmmaGroups][kTileTokens / 8];  // (features, tokens)
  CoreMatrix phi_k[kWgmmaGroups][kTileTokens / 8];
  CoreMatrix v[kStages][kWgmmaColumns / 8][kTileTokens / 8];  // (columns, tokens)
  CoreMatrix p[2][kTileTokens / 8][kTileTokens / 8];          // (keys, queries); of even and odd tiles
  CoreMatrix q[kStages][kWgmmaF / 8][kTileTokens / 8];        // (dimensions, tokens)
  CoreMatrix k[kStages][kWgmmaF / 8][kTileTokens / 8];
  bf16 out[kWarpgroup / 32][2]
          [8 * kTileTokens + 32];  // of a warp: (8 columns, tokens), halves 64 bytes apart modulo 128
  float inverse[2][kTileTokens];   // 1 / (D + eps)
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- instructions --------------------------------------------------------------------------------------------------

/// d (64 × 64) += A B: A (64 × 16) in fragments, rows of B (16 × 64) along K.
__device__ __forceinline__ void wgmma_64(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, "
      "%35}, %36, 1, 1, 1, 0;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// d (64 × 64) += A B: rows of A (64 × 16) along M, of B (16 × 64) along K.
__device__ __forceinline__ void wgmma_64(float (&d)[8][4], std::uint64_t a, std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, "
      "1, 1, 0;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7])
      : "l"(a), "l"(b));
}

/// d (64 × 160) += A B: rows of A (64 × 16) along M, of B (16 × 160) along N.
__device__ __forceinline__ void wgmma_160(float (&d)[kWgmmaGroups][4], std::uint64_t a, std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
      "%57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "
      "%79}, %80, %81, 1, 1, 1, 1, 1;"
      : BASED_GROUP(d[0]), BASED_GROUP(d[1]), BASED_GROUP(d[2]), BASED_GROUP(d[3]), BASED_GROUP(d[4]),
        BASED_GROUP(d[5]), BASED_GROUP(d[6]), BASED_GROUP(d[7]), BASED_GROUP(d[8]), BASED_GROUP(d[9]),
        BASED_GROUP(d[10]), BASED_GROUP(d[11]), BASED_GROUP(d[12]), BASED_GROUP(d[13]), BASED_GROUP(d[14]),
        BASED_GROUP(d[15]), BASED_GROUP(d[16]), BASED_GROUP(d[17]), BASED_GROUP(d[18]), BASED_GROUP(d[19])
      : "l"(a), "l"(b));
}

// ---- the state -----------------------------------------------------------------------------------------------------

/// Place of feature j of group `group` in the packed order.
__device__ __forceinline__ PackedPlace wgmma_place(int group, int j, const FeatureWeights& w) {
  constexpr int f = kWgmmaF;
  const int i = group % 2 * 8 + j, r = group / 2 - 1;
  if (r < 0) return {1 + i, w.linear, w.inverse_linear};
  if (r == 0) return {packed_feature(i, i, f), w.square, w.inverse_square};
  if (r < f / 2 || i < f / 2) return {packed_feature(i, (i + r) % f, f), w.pair, w.inverse_pair};
  return {i == f / 2 ? 0 : -1, 1.0f, 1.0f};
}

/// Calls visit(accumulator, element of the packed S (F, head_dim), place) for what this thread has of Sᵀ.
template <typename Visit>
__device__ __forceinline__ void for_each_sum(float (&s)[kWgmmaGroups][4], int head_dim, int column, float c, int lane,
                                             Visit&& visit) {
  asm volatile("" : "+r"(lane));  // places are found anew each time: kept through the loop they would spill
  const FeatureWeights weights(c);
#pragma unroll
  for (int i = 0; i < kWgmmaGroups; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const PackedPlace place = wgmma_place(i, lane % 4 * 2 + e % 2, weights);
      const int at = column + lane / 4 + e / 2 * 8;
      if (place.feature >= 0 && at < head_dim) visit(s[i][e], place.feature * head_dim + at, place);
    }
}

/// What D needs of the past, in every builder warp.
struct KeyMoments {
  float gram[2][4];  // Σ k kᵀ (dimensions g, g + 8; 8n + 2t, 8n + 2t + 1)
  float sum[4];      // Σ k of dimensions g (twice), g + 8 (twice)
  float count;       // Σ 1

  __device__ __forceinline__ void load(const float* z, float c, int lane) {
    const int g = lane / 4, t = lane % 4;
    const FeatureWeights weights(c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = g + e / 2 * 8;
      sum[e] = z[1 + i] * weights.inverse_linear;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int j = 8 * n + 2 * t + e % 2;
        gram[n][e] = z[packed_feature(i, j, kWgmmaF)] * (i == j ? weights.inverse_square : weights.inverse_pair);
      }
    }
    count = z[0];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = gram[0][e] = gram[1][e] = 0.0f;
    count = 0.0f;
  }

  __device__ __forceinline__ void store(float* z, float c, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const FeatureWeights weights(c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = g + e / 2 * 8;
      if (t == 0 && e % 2 == 0) z[1 + i] = sum[e] * weights.linear;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int j = 8 * n + 2 * t + e % 2;
        if (i <= j) z[packed_feature(i, j, kWgmmaF)] = gram[n][e] * (i == j ? weights.square : weights.pair);
      }
    }
    if (lane == 0) z[0] = count;
  }

  /// Adds the keys of a tile.
  __device__ __forceinline__ void add(const CoreMatrix (*keys)[kTileTokens / 8], int rows, int lane) {
#pragma unroll
    for (int m = 0; m < kTileTokens / 16; ++m) {
      Pair x[4];  // dimensions g of tokens 2t, 2t + 1 and of 2t + 8, 2t + 9, then g + 8
      load_matrices_transposed(x, keys[lane / 16][2 * m + lane / 8 % 2][lane % 8]);
      const Pair fragment[4] = {x[0], x[2], x[1], x[3]};
      mma_16x8x16<bf16>(gram[0], fragment, x[0], x[1]);
      mma_16x8x16<bf16>(gram[1], fragment, x[2], x[3]);
      mma_16x8x16<bf16>(sum, fragment, kOnes, kOnes);
    }
    count += static_cast<float>(rows);
  }

  /// Adds Σ1 + cq·(Σk + ½ Σk kᵀ cq) of the queries g, g + 8 of `x`, a 16 × 16 fragment of cQ; each lane of four adds a
  /// part.
  __device__ __forceinline__ void add_denominators(float (&d)[2], const Pair (&x)[4], int lane) const {
    const int t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float k0 = __shfl_sync(0xffffffffu, sum[2 * n], 8 * t);
      const float k1 = __shfl_sync(0xffffffffu, sum[2 * n], 8 * t + 4);
      float y[4] = {k0, k1, k0, k1};
      float half[4];  // ½ Σ k kᵀ, symmetric: its accumulators are its B fragments
#pragma unroll
      for (int e = 0; e < 4; ++e) half[e] = 0.5f * gram[e / 2][2 * n + e % 2];
      const Pair high0 = pack<bf16>(half[0], half[1]), high1 = pack<bf16>(half[2], half[3]);
      mma_16x8x16<bf16>(y, x, high0, high1);
      mma_16x8x16<bf16>(y, x, pack<bf16>(half[0] - low(high0), half[1] - high(high0)),
                        pack<bf16>(half[2] - low(high1), half[3] - high(high1)));
      d[0] += y[0] * low(x[2 * n]) + y[1] * high(x[2 * n]);
      d[1] += y[2] * low(x[2 * n + 1]) + y[3] * high(x[2 * n + 1]);
    }
    if (t == 0) d[0] += count, d[1] += count;
  }
};

// ---- the builders --------------------------------------------------------------------------------------------------

/// Half of the features of one token of `x`: groups 0 … 9 or 10 … 19.
template <bool kQuery, bool kSecondHalf>
__device__ __forceinline__ void build_half(const CoreMatrix (*x)[kTileTokens / 8], CoreMatrix (*phi)[kTileTokens / 8],
                                           int token, Pair scale) {
  Pair even[8], odd[8];  // (x_2i, x_(2i+1)), (x_(2i+1), x_(2i+2))
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 row = *reinterpret_cast<const uint4*>(x[half][token / 8][token % 8]);
    even[4 * half] = row.x, even[4 * half + 1] = row.y, even[4 * half + 2] = row.z, even[4 * half + 3] = row.w;
  }
  if constexpr (kQuery)
#pragma unroll
    for (int i = 0; i < 8; ++i) even[i] = multiply(even[i], scale);
#pragma unroll
  for (int i = 0; i < 8; ++i) odd[i] = __byte_perm(even[i], even[(i + 1) % 8], 0x5432);
#pragma unroll
  for (int group = kSecondHalf ? 10 : 0; group < (kSecondHalf ? 20 : 10); ++group) {
    const int r = group / 2 - 1;
    Pair y[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int i = group % 2 * 4 + n;
      if (r < 0)
        y[n] = even[i];
      else if (group == kWgmmaConstant)
        y[n] = n == 0 && !kQuery ? kOnes & 0xffffu : 0u;  // a query's is added in float32
      else if (r == 0 && kQuery)
        y[n] = multiply(multiply(even[i], 0x3f003f00u), even[i]);  // ½ x_j²
      else
        y[n] = multiply(even[i], r % 2 == 0 ? even[(i + r / 2) % 8] : odd[(i + r / 2) % 8]);
    }
    *reinterpret_cast<uint4*>(phi[group][token / 8][token % 8]) = make_uint4(y[0], y[1], y[2], y[3]);
  }
}

template <bool kQuery>
__device__ __forceinline__ void build_features(const CoreMatrix (*x)[kTileTokens / 8],
                                               CoreMatrix (*phi)[kTileTokens / 8], int warp, int lane, Pair scale) {
  const int token = warp % 2 * 32 + lane;  // lanes write consecutive rows
  if (warp < 2)
    build_half<kQuery, false>(x, phi, token, scale);
  else
    build_half<kQuery, true>(x, phi, token, scale);
}

/// Rows 16 · warp … of mask(p(Q Kᵀ)); parts of their sums are added to `d`.
__device__ __forceinline__ void score_rows(CoreMatrix (*p)[kTileTokens / 8], float (&d)[2], const Pair (&query)[4],
                                           const CoreMatrix (*keys)[kTileTokens / 8], int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTileTokens / 8; n += 2) {
    Pair scores[4] = {0u, 0u, 0u, 0u};
    if (n <= 2 * warp) {
      Pair x[4];  // dimensions 0 … 7 and 8 … 15 of 8 keys, then of the next 8
      load_matrices(x, keys[lane / 8 % 2][n + lane / 16][lane % 8]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_16x8x16<bf16>(s, query, x[2 * half], x[2 * half + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[e] = fmaf(s[e], fmaf(s[e], 0.5f, 1.0f), 1.0f);
          if (n == 2 * warp && 8 * half + 2 * t + e % 2 > g + e / 2 * 8) s[e] = 0.0f;
          d[e / 2] += s[e];
        }
        scores[2 * half] = pack<bf16>(s[0], s[1]);
        scores[2 * half + 1] = pack<bf16>(s[2], s[3]);
      }
    }
    store_matrices(p[n + lane / 16][2 * warp + lane / 8 % 2][lane % 8], scores);
  }
}

#endif

// ---- the kernel ----------------------------------------------------------------------------------------------------

/// One block per (segment, head, group of 64 columns); arguments and segments as chunked_kernel. Compiled for sm_90a
/// alone: elsewhere it is empty and owns no barriers (has_wgmma).
template <bool kOutputs>
__global__ void __launch_bounds__(2 * kWarpgroup, 2) wgmma_kernel(ChunkedArguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  WgmmaShared& shared = *reinterpret_cast<WgmmaShared*>(shared_bytes);
  // Of φ(Q) with P and `inverse`, and of φ(K): made by all builders, let go by the multipliers' warps. A tile's φ(K) is
  // let go with its v.
  __shared__ std::uint64_t full_q, full_k, free_q, free_k;
  if (threadIdx.x == 0) {
    init_barrier(&full_q, kWarpgroup);
    init_barrier(&full_k, kWarpgroup);
    init_barrier(&free_q, kWarpgroup / 32);
    init_barrier(&free_k, kWarpgroup / 32);
  }
  wait_for_predecessors();
  release_successors();
  __syncthreads();

  const int tid = static_cast<int>(threadIdx.x) % kWarpgroup, lane = tid % 32, warp = tid / 32;
  const auto [column_group, head, segment_index, segment, slot, is_first, is_last] = block_segment(a);
  if (slot < 0 || (!kOutputs && is_last)) return;
  const int num_tiles = (segment.count + kTileTokens - 1) / kTileTokens;
  const int block_column = column_group * kWgmmaColumns;

  const std::int64_t s_at = static_cast<std::int64_t>(head) * a.num_features * a.head_dim;
  const std::int64_t z_at = static_cast<std::int64_t>(a.num_heads) * a.num_features * a.head_dim +
                            static_cast<std::int64_t>(head) * a.num_features;
  float* slot_state = slot_data<float>(a.state, slot);
  float* segment_state = is_first && is_last ? slot_state : slot_data<float>(a.segment_states, segment_index);
  float* new_state = kOutputs ? slot_state : segment_state;
  const bool stores_state = !kOutputs || is_last;

  if (threadIdx.x < kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const bf16* q = static_cast<const bf16*>(a.qkv.q) + segment.first * a.qkv.q_token + head * a.qkv.q_head;
    const bf16* k = static_cast<const bf16*>(a.qkv.k) + segment.first * a.qkv.k_token + head * a.qkv.k_head;
    const bf16* v =
        static_cast<const bf16*>(a.qkv.v) + segment.first * a.qkv.v_token + head * a.qkv.v_head + block_column;
    // A thread fetches parts of tokens `row` and row + 8: eight lanes fill a core matrix, four such groups share a
    // token's sectors.
    const int row = warp * 16 + lane % 8, part = lane / 8;
    const bool is_key = part < 2;
    const std::int64_t qk_step = 8 * (is_key ? a.qkv.k_token : a.qkv.q_token), v_step = 8 * a.qkv.v_token;
    const bf16* qk_from = (is_key ? k + row * a.qkv.k_token : q + row * a.qkv.q_token) + part % 2 * 8;
    const bf16* v_from = v + row * a.qkv.v_token + part * 8;
    bf16* const qk_to = &(is_key ? shared.k : shared.q)[0][part % 2][row / 8][row % 8][0];
    bf16* const v_to = &shared.v[0][part][row / 8][row % 8][0];
    const bool has_columns[2] = {block_column + 8 * part < a.head_dim, block_column + 8 * part + 32 < a.head_dim};
    int left = segment.count - row;  // rows of the next tile to fetch, from this one on
    const auto fetch_tile = [&](int stage) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool valid = left > 8 * i;
        if (is_key || kOutputs)
          copy_async_16(qk_to + stage * kWgmmaF * kTileTokens + i * 64, valid ? qk_from + i * qk_step : k, valid);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool has = valid && has_columns[half];
          copy_async_16(v_to + stage * kWgmmaColumns * kTileTokens + half * 4 * 8 * kTileTokens + i * 64,
                        has ? v_from + i * v_step + half * 32 : v, has);
        }
      }
      commit_copies();
      qk_from += kTileTokens / 8 * qk_step;
      v_from += kTileTokens / 8 * v_step;
      left -= kTileTokens;
    };
    fetch_tile(0);
    fetch_tile(1);

    KeyMoments moments;
    if (kOutputs)
      moments.load(segment_state + z_at, a.scale, lane);
    else
      moments.clear();
    const __nv_bfloat162 scale_pair = __float2bfloat162_rn(a.scale);
    const Pair scale = reinterpret_cast<const Pair&>(scale_pair);

    int stage = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
      wait_for_copies<1>();
      asm volatile("bar.sync 1, 128;" ::: "memory");
      if constexpr (kOutputs) {
        Pair query[4];
        load_matrices(query, shared.q[stage][lane / 16][2 * warp + lane / 8 % 2][lane % 8]);
#pragma unroll
        for (int i = 0; i < 4; ++i) query[i] = multiply(query[i], scale);
        float d[2] = {0.0f, 0.0f};
        moments.add_denominators(d, query, lane);
        score_rows(shared.p[tile % 2], d, query, shared.k[stage], warp, lane);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          d[e] += __shfl_xor_sync(0xffffffffu, d[e], 1);
          d[e] += __shfl_xor_sync(0xffffffffu, d[e], 2);
        }
        if (lane % 4 < 2)
          shared.inverse[tile % 2][16 * warp + lane / 4 + lane % 4 * 8] =
              1.0f / ((lane % 4 == 0 ? d[0] : d[1]) + a.eps);
        if (tile > 0) wait_for_phase(&free_q, (tile - 1) % 2);
        build_features<true>(shared.q[stage], shared.phi_q, warp, lane, scale);
        fence_for_wgmma();
        arrive(&full_q);
      }
      if (tile > 0) wait_for_phase(&free_k, (tile - 1) % 2);
      build_features<false>(shared.k[stage], shared.phi_k, warp, lane, scale);
      fence_for_wgmma();
      arrive(&full_k);
      fetch_tile(stage == 0 ? kStages - 1 : stage - 1);  // here: a fence waits for copies under way
      moments.add(shared.k[stage], min(segment.count - tile * kTileTokens, kTileTokens), lane);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (stores_state && warp == 0 && column_group == 0) {
      float* z = kOutputs && a.z_out
                     ? a.z_out + (static_cast<std::int64_t>(segment_index) * a.num_heads + head) * a.num_features
                     : new_state + z_at;
      moments.store(z, a.scale, lane);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");
    const int column = block_column + 16 * warp;
    float s[kWgmmaGroups][4];  // Sᵀ: (columns g, g + 8; features 2t, 2t + 1) of each group
#pragma unroll
    for (int i = 0; i < kWgmmaGroups; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][e] = 0.0f;
    if (kOutputs) {
      const float* packed = segment_state + s_at;
      for_each_sum(s, a.head_dim, column, a.scale, lane,
                   [packed](float& sum, int at, const PackedPlace& place) { sum = packed[at] * place.inverse_weight; });
    }
    constexpr unsigned kRow = sizeof(CoreMatrix), kColumn = sizeof(CoreMatrix) * kTileTokens / 8;
    const std::uint64_t phi_q = core_matrices(shared.phi_q, kColumn, kRow);
    const std::uint64_t phi_k = core_matrices(shared.phi_k, kRow, kColumn);
    // 16 along K, in descriptors' units of 16 bytes: two core matrices of tokens, or of features or keys.
    constexpr std::uint64_t kTokens = 2 * kRow / 16, kFeatures = 2 * kColumn / 16;

    bf16* out = a.out + segment.first * a.out_token + head * a.out_head + column + lane % 2 * 8;
    const bool has_columns = column + lane % 2 * 8 < a.head_dim;
    int stage = 0;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const std::uint64_t v = core_matrices(shared.v[stage], kRow, kColumn);
      float o[8][4];  // Oᵀ: (columns g, g + 8; tokens 2t, 2t + 1) of 8 tokens each
      if constexpr (kOutputs) {
        const float sums[2] = {__shfl_sync(0xffffffffu, s[kWgmmaConstant][0], lane & ~3),
                               __shfl_sync(0xffffffffu, s[kWgmmaConstant][2], lane & ~3)};
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] = sums[e / 2];
        Pair rounded[kWgmmaGroups / 2][4];
#pragma unroll
        for (int i = 0; i < kWgmmaGroups / 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            rounded[i][e] = pack<bf16>(s[2 * i + e / 2][e % 2 * 2], s[2 * i + e / 2][e % 2 * 2 + 1]);
        const std::uint64_t p = core_matrices(shared.p[tile % 2], kColumn, kRow);
        wait_for_phase(&full_q, tile % 2);
        begin_wgmma();
#pragma unroll
        for (int i = 0; i < kTileTokens / 16; ++i) wgmma_64(o, v + i * kTokens, p + i * kFeatures);
#pragma unroll
        for (int i = 0; i < kWgmmaGroups / 2; ++i) wgmma_64(o, rounded[i], phi_q + i * kFeatures);
        commit_wgmma();
      }
      wait_for_phase(&full_k, tile % 2);
      begin_wgmma();
#pragma unroll
      for (int i = 0; i < kTileTokens / 16; ++i) wgmma_160(s, v + i * kTokens, phi_k + i * kTokens);
      commit_wgmma();
      if constexpr (kOutputs) {
        wait_for_wgmma<1>();
        use_after_wait(o);
        bf16(*staged)[8 * kTileTokens + 32] = shared.out[warp];
        const int begin = tile * kTileTokens, rows = min(segment.count - begin, kTileTokens);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          Pair y[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 inverse =
                *reinterpret_cast<const float2*>(&shared.inverse[tile % 2][8 * (n + half) + lane % 4 * 2]);
#pragma unroll
            for (int e = 0; e < 2; ++e)
              y[2 * half + e] = pack<bf16>(o[n + half][2 * e] * inverse.x, o[n + half][2 * e + 1] * inverse.y);
          }
          store_matrices_transposed(&staged[lane / 8 % 2][(8 * (n + lane / 16) + lane % 8) * 8], y);
        }
        __syncwarp();
        if (lane == 0) arrive(&free_q);
#pragma unroll
        for (int i = 0; i < kTileTokens; i += 16) {
          const int row = i + lane / 2;
          if (has_columns && row < rows)
            *reinterpret_cast<uint4*>(out + (begin + row) * a.out_token) =
                *reinterpret_cast<const uint4*>(&staged[lane % 2][row * 8]);
        }
        __syncwarp();
      }
      wait_for_wgmma<0>();
      use_after_wait(s);
      if (lane == 0) arrive(&free_k);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (stores_state) {
      float* packed = new_state + s_at;
      for_each_sum(s, a.head_dim, column, a.scale, lane,
                   [packed](float& sum, int at, const PackedPlace& place) { packed[at] = sum * place.weight; });
    }
  }
#endif
}

}  // namespace based::cuda
