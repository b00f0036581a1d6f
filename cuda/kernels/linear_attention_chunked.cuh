#pragma once

// Taylor attention of long sequences on tensor cores, bfloat16. With c = 1/√f, s = c q·k, p(s) = 1 + s + s²/2 and x the
// raw keys, tiles of 64 tokens after the state (S, z) of all before them:
//   O = mask(p(Q Kᵀ)) V + φ(cQ) S     D = mask(p(Q Kᵀ)) 1 + Σ1 + cQ·(Σk + ½ Σk kᵀ cq)     out = O / (D + eps)
//   Sᵀ += Vᵀ φ(K)                     Σk kᵀ += Kᵀ K, Σk += Kᵀ 1
//
// A warp owns 16 columns of v. Its Sᵀ (16 × features) are float32 accumulators, which, rounded to bfloat16, are the B
// fragments of φ(Q) S as they lie: the state never leaves the registers. Every warp makes the φ it needs, in registers:
// features come in groups of 8, x_j times a rotation x_(j+r) of its own or of another block of 8 dimensions:
//   linear    block b:        x_j                                             1 group
//   diagonal  block b:        x_j x_(j+r), r = 0 … 4 (r = 4 has each twice)   5 groups
//   crossing  blocks a < b:   x_j y_(j+r), x_(j+4) y_(j+r), r = 0 … 3         8 groups
// 160 features for f = 16. A place that r = 4 leaves over holds the constant feature.
//
// f = 32 has 576 (72 groups), whose 288 accumulators are more than a thread has registers, and the 168 of f = 24 leave
// too few. There 3, or 2, warps share 16 columns of v, as parts of blocks' groups, a crossing being its later block's:
//   part 0: blocks 0, 1   20 groups; Σk kᵀ, Σk and their share of D; (f = 24) mask(p(Q Kᵀ))
//   part 1: block 2       22 groups; mask(p(Q Kᵀ)) V; adds to it what the others hand it of φ(cQ) S; outputs
//   part 2: block 3       30 groups; mask(p(Q Kᵀ)) and its share of D
// They hand over 16 rows × 16 columns at a time through shared memory, by mbarriers at which only part 1 waits, unless
// it is 2 behind. A block of 64 columns has 12 warps then, whose latencies cover each other's.

#include "kernels/common.cuh"

namespace based::cuda {

struct ChunkedArguments {
  DeviceBatch batch;
  QkvView qkv;
  StateView state;
  StateView segment_states;  // of segments, laid out as a slot's; used when a sequence has several
  float* z_out;              // (num_segments, H, num_features); null: into the state
  bf16* out;
  std::int64_t out_token, out_head;
  int num_heads, feature_dim, num_features, head_dim;
  int column_groups;
  float scale;  // c
  float eps;
  int prefix_length;  // not 0: k and v are a prefix's, whose tokens the sequences that begin add (PrefixView)
};

/// What a block works on. With a prefix, the segment's part of it: every segment that has any leaves what it adds in
/// its segment state, and add_prefix_kernel adds them up.
struct BlockSegment {
  int column_group, head, segment_index;
  Tile segment;
  int slot;
  bool is_first, is_last;  // of its sequence in this call; with a prefix neither
};

/// Of a sequence with `begin` its first token and `position` that token's, how many of `segment`'s tokens are of its
/// prefix.
__device__ __forceinline__ int prefix_tokens(const Tile& segment, int begin, std::int64_t position, int length) {
  return position == 0 ? min(max(begin + length - segment.first, 0), segment.count) : 0;
}

__device__ __forceinline__ BlockSegment block_segment(const ChunkedArguments& a) {
  int index = static_cast<int>(blockIdx.x);
  const int column_group = index % a.column_groups;
  index /= a.column_groups;
  const int head = index % a.num_heads, segment_index = index / a.num_heads;
  Tile segment = a.batch.segments[segment_index];
  if (a.prefix_length > 0) {
    const int slot = a.batch.slots[segment.sequence];
    segment.count =
        prefix_tokens(segment, a.batch.offsets[segment.sequence], a.batch.positions[segment.sequence], a.prefix_length);
    return {column_group, head, segment_index, segment, segment.count > 0 ? slot : -1, false, false};
  }
  return {column_group,
          head,
          segment_index,
          segment,
          a.batch.slots[segment.sequence],
          segment.first == a.batch.offsets[segment.sequence],
          segment.first + segment.count == a.batch.offsets[segment.sequence + 1]};
}

constexpr int kChunkedWarps = 4;  // at most; 16 columns of v each
constexpr int kColumnPitch = 16 * kChunkedWarps + 8;
constexpr int kScorePitch = kTileTokens + 8;
constexpr int kStages = 3;

/// Warps that share 16 columns of v.
template <int kBlocks>
constexpr int kChunkedParts = kBlocks <= 2 ? 1 : kBlocks - 1;

/// What one of them does.
template <int kBlocks, int kPart>
struct ChunkedPart {
  static constexpr int kParts = kChunkedParts<kBlocks>;
  static constexpr int kBegin = kPart == 0 ? 0 : kPart + 1;  // has the groups of blocks [kBegin, kEnd)
  static constexpr int kEnd = kParts == 1 ? kBlocks : kPart + 2;
  static constexpr bool kGram = kPart == 0;                          // Σk kᵀ, Σk and their part of D
  static constexpr bool kScores = kPart == (kParts == 3 ? 2 : 0);    // mask(p(Q Kᵀ)) and its part of D
  static constexpr bool kFinishes = kPart == (kParts == 1 ? 0 : 1);  // outputs
};

template <int kBlocks>
struct ChunkedShared {
  static constexpr int kPitch = 8 * (kBlocks % 2 == 0 ? kBlocks + 1 : kBlocks);  // rows 16 bytes apart modulo 128
  bf16 q[kStages][kTileTokens][kPitch];
  bf16 k[kStages][kTileTokens][kPitch];
  bf16 v[kStages][kTileTokens][kColumnPitch];
  bf16 scores[2][kTileTokens][kScorePitch];
  // 1 / (D + eps); where two parts make it, what each adds to D + eps
  float denominators[kChunkedParts<kBlocks> == 3 ? 2 : 1][2][kTileTokens];
  // Between the warps of the parts that share 16 columns, of rows m % 2: they have been handed over, twice per tile;
  // and taken, so that rows m + 2 of the tile may follow, once per tile. Every lane arrives for its own rows.
  std::uint64_t handed[2][kChunkedWarps], free[2][kChunkedWarps];
};

/// φ(cQ) S of 16 rows × 16 columns, from a part to the one that finishes: a lane's 8 accumulators in two.
using HandedRows = float4[2][32];

/// Of the 16-row parts of a tile two are under way at a time: HandedRows[2][parts − 1][kChunkedWarps].
template <int kBlocks>
constexpr std::size_t chunked_shared_bytes() {
  static_assert(sizeof(ChunkedShared<kBlocks>) % sizeof(float4) == 0);
  return sizeof(ChunkedShared<kBlocks>) +
         2 * (kChunkedParts<kBlocks> - 1) * static_cast<std::size_t>(kChunkedWarps) * sizeof(HandedRows);
}

// ---- features ------------------------------------------------------------------------------------------------------

/// Two bfloat16.
using Pair = std::uint32_t;

__device__ __forceinline__ Pair multiply(Pair a, Pair b) {
  const __nv_bfloat162 c =
      __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const Pair&>(c);
}
__device__ __forceinline__ float low(Pair x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(Pair x) { return __uint_as_float(x & 0xffff0000u); }

constexpr Pair kOnes = 0x3f803f80u;

/// The groups of blocks [kBegin, kEnd) of dimensions and of their crossings with all blocks before them.
template <int kBegin, int kEnd>
struct FeatureGroups {
  static constexpr int kDiagonal = kEnd - kBegin;
  static constexpr int kCrossing = 6 * kDiagonal;
  static constexpr int kFirstPair = kBegin * (kBegin - 1) / 2;  // pairs (0, 1) (0, 2) (1, 2) (0, 3) …
  static constexpr int kCount = kCrossing + 4 * kEnd * (kEnd - 1) - 8 * kFirstPair;
  static constexpr int kConstant = kBegin == 0 ? kDiagonal + 4 : -1;  // feature 4 of this group is the constant one

  static constexpr __host__ __device__ bool linear(int group) { return group < kDiagonal; }
  static constexpr __host__ __device__ bool diagonal(int group) { return group >= kDiagonal && group < kCrossing; }
  /// Blocks a ≤ b and rotation r of a group.
  static constexpr __host__ __device__ int b(int group) {
    if (linear(group)) return kBegin + group;
    if (diagonal(group)) return kBegin + (group - kDiagonal) / 5;
    const int pair = kFirstPair + (group - kCrossing) / 8;
    return pair < 1 ? 1 : pair < 3 ? 2 : 3;
  }
  static constexpr __host__ __device__ int a(int group) {
    if (group < kCrossing) return b(group);
    return kFirstPair + (group - kCrossing) / 8 - b(group) * (b(group) - 1) / 2;
  }
  static constexpr __host__ __device__ int r(int group) {
    if (linear(group)) return 0;
    return diagonal(group) ? (group - kDiagonal) % 5 : (group - kCrossing) % 8;
  }
};

/// Rotations r = 0 … 4 of one block of 8 dimensions: element j becomes x_((j + r) mod 8).
struct Rotations {
  Pair x[5];

  /// Lane (g, t) holds dimensions 2t, 2t + 1 of row g. Not `all`: only r = 0 and 4, which crossings take of their
  /// earlier block.
  __device__ __forceinline__ void along_pairs(Pair own, int lane, bool all = true) {
    const int quad = lane & ~3;
    const Pair one = all ? __shfl_sync(0xffffffffu, own, quad + ((lane + 1) & 3)) : 0u;
    const Pair two = __shfl_sync(0xffffffffu, own, quad + ((lane + 2) & 3));
    x[0] = own;
    x[1] = __byte_perm(own, one, 0x5432);
    x[2] = one;
    x[3] = __byte_perm(one, two, 0x5432);
    x[4] = two;
  }
  /// Lane (g, t) holds dimension g of rows 2t, 2t + 1.
  __device__ __forceinline__ void along_lanes(Pair own, int lane, bool all = true) {
    x[0] = own;
#pragma unroll
    for (int r = all ? 1 : 4; r < 5; ++r) x[r] = __shfl_sync(0xffffffffu, own, (lane + 4 * r) & 31);
  }
};

/// Group `group` of φ(k).
template <typename Groups, int kBlocks>
__device__ __forceinline__ Pair key_feature(const Rotations (&x)[kBlocks], int group, int lane) {
  const int a = Groups::a(group), b = Groups::b(group), r = Groups::r(group);
  if (Groups::linear(group)) return x[b].x[0];
  if (group == Groups::kConstant) return lane / 4 == 4 ? kOnes : multiply(x[b].x[0], x[b].x[4]);
  if (Groups::diagonal(group)) return multiply(x[b].x[0], x[b].x[r]);
  return multiply(x[a].x[r < 4 ? 0 : 4], x[b].x[r % 4]);
}

/// Group `group` of φ(q), without the weight ½ of x_j². What r = 4 repeats, and the constant, which is added in
/// float32, are 0.
template <typename Groups, int kBlocks>
__device__ __forceinline__ Pair query_feature(const Rotations (&x)[kBlocks], int group, int lane) {
  const int a = Groups::a(group), b = Groups::b(group), r = Groups::r(group);
  if (Groups::linear(group)) return x[b].x[0];
  if (Groups::diagonal(group) && r == 4) return multiply(x[b].x[0], lane % 4 < 2 ? x[b].x[4] : 0u);
  if (Groups::diagonal(group)) return multiply(x[b].x[0], x[b].x[r]);
  return multiply(x[a].x[r < 4 ? 0 : 4], x[b].x[r % 4]);
}

/// Place of feature (i, j) in the packed order, i and j either way round.
__device__ __forceinline__ int packed_feature(int i, int j, int f) {
  const int first = min(i, j), second = max(i, j);
  return 1 + f + first * f - first * (first - 1) / 2 + (second - first);
}

/// Where feature j of a group lies in the packed order, < 0 for a repeated one, and packed value / Σ φ(k) v.
struct PackedPlace {
  int feature;
  float weight, inverse_weight;
};

/// Of a linear feature, of x_i x_j, of x_i².
struct FeatureWeights {
  float linear, pair, square, inverse_linear, inverse_pair, inverse_square;
  __device__ __forceinline__ explicit FeatureWeights(float c)
      : linear(sqrtf(c)),
        pair(c),
        square(c * 0.70710678118654752f),
        inverse_linear(1.0f / linear),
        inverse_pair(1.0f / pair),
        inverse_square(1.0f / square) {}
};

template <typename Groups>
__device__ __forceinline__ PackedPlace packed_place(int group, int j, int f, const FeatureWeights& w) {
  const int a = Groups::a(group), b = Groups::b(group), r = Groups::r(group);
  if (Groups::linear(group)) return {1 + 8 * b + j, w.linear, w.inverse_linear};
  if (!Groups::diagonal(group))
    return {packed_feature(8 * a + (j + (r < 4 ? 0 : 4)) % 8, 8 * b + (j + r % 4) % 8, f), w.pair, w.inverse_pair};
  if (r == 0) return {packed_feature(8 * b + j, 8 * b + j, f), w.square, w.inverse_square};
  const int feature = packed_feature(8 * b + j, 8 * b + (j + r) % 8, f);
  if (r < 4 || j < 4) return {feature, w.pair, w.inverse_pair};
  return {group == Groups::kConstant && j == 4 ? 0 : -1, 1.0f, 1.0f};
}

// ---- the state in registers ----------------------------------------------------------------------------------------

template <int kBlocks, int kPart>
struct ChunkedState {
  using Part = ChunkedPart<kBlocks, kPart>;
  using Groups = FeatureGroups<Part::kBegin, Part::kEnd>;
  static constexpr int kF = 8 * kBlocks;
  static constexpr int kRowTiles = Part::kGram ? (kBlocks + 1) / 2 : 0;
  static constexpr int kGramTiles = kRowTiles == 0 ? 1 : kRowTiles;  // no arrays of none

  float s[Groups::kCount][4];          // (columns g, g + 8; features 2t, 2t + 1) of each group
  float gram[kGramTiles][kBlocks][4];  // Σ k kᵀ (dimensions g, g + 8; 2t, 2t + 1), blocks n ≥ 2m: it is symmetric
  float key_sum[kGramTiles][4];        // Σ k of dimensions g (twice), g + 8 (twice)
  float count;                         // Σ 1

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Groups::kCount; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][e] = 0.0f;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) key_sum[m][e] = 0.0f;
#pragma unroll
      for (int n = 2 * m; n < kBlocks; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) gram[m][n][e] = 0.0f;
    }
    count = 0.0f;
  }

  /// `packed` (F, head_dim) and z (F) of one head; `column`: the warp's first.
  __device__ __forceinline__ void load(const float* packed, const float* z, int head_dim, int column, float c,
                                       int lane) {
    const int g = lane / 4, t = lane % 4;
    const FeatureWeights weights(c);
    const bool valid[2] = {column < head_dim, column + 8 < head_dim};
    packed += column + g;
#pragma unroll
    for (int i = 0; i < Groups::kCount; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const PackedPlace place = packed_place<Groups>(i, 2 * t + e, kF, weights);
        const float* at = packed + place.feature * head_dim;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          s[i][2 * half + e] = place.feature >= 0 && valid[half] ? at[8 * half] * place.inverse_weight : 0.0f;
      }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * m + g + e / 2 * 8;
        key_sum[m][e] = i < kF ? z[1 + i] * weights.inverse_linear : 0.0f;
#pragma unroll
        for (int n = 2 * m; n < kBlocks; ++n) {
          const int j = 8 * n + 2 * t + e % 2;
          gram[m][n][e] =
              i < kF ? z[packed_feature(i, j, kF)] * (i == j ? weights.inverse_square : weights.inverse_pair) : 0.0f;
        }
      }
    if (Part::kGram) count = z[0];
  }

  /// z may be null: then it is not stored.
  __device__ __forceinline__ void store(float* packed, float* z, int head_dim, int column, float c, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const FeatureWeights weights(c);
    const bool valid[2] = {column < head_dim, column + 8 < head_dim};
    packed += column + g;
#pragma unroll
    for (int i = 0; i < Groups::kCount; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const PackedPlace place = packed_place<Groups>(i, 2 * t + e, kF, weights);
        float* at = packed + place.feature * head_dim;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (place.feature >= 0 && valid[half]) at[8 * half] = s[i][2 * half + e] * place.weight;
      }
    if (!z) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 16 * m + g + e / 2 * 8;
        if (t == 0 && e % 2 == 0 && i < kF) z[1 + i] = key_sum[m][e] * weights.linear;
#pragma unroll
        for (int n = 2 * m; n < kBlocks; ++n) {
          const int j = 8 * n + 2 * t + e % 2;
          if (i <= j) z[packed_feature(i, j, kF)] = gram[m][n][e] * (i == j ? weights.square : weights.pair);
        }
      }
    if (lane == 0) z[0] = count;
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------------------

/// 16 rows of 8 · kBlocks dimensions as fragments: x[b][0] of rows 0 … 7, x[b][1] of rows 8 … 15 of block b; lane (g,
/// t) has row g, dimensions 2t, 2t + 1, or, transposed, dimension g, rows 2t, 2t + 1.
template <int kBlocks, bool kTransposed, int kPitch>
__device__ __forceinline__ void load_rows(Pair (&x)[kBlocks][2], const bf16 (*rows)[kPitch], int lane) {
#pragma unroll
  for (int b = 0; b < kBlocks; b += 2) {
    const int block = min(b + lane / 16, kBlocks - 1);
    const bf16* row = &rows[lane % 16][8 * block];
    Pair r[4];
    if constexpr (kTransposed)
      load_matrices_transposed(r, row);
    else
      load_matrices(r, row);
    x[b][0] = r[0], x[b][1] = r[1];
    if (b + 1 < kBlocks) x[b + 1][0] = r[2], x[b + 1][1] = r[3];
  }
}

/// Waits for all threads of the block, which come from different places in the code: not the aligned bar.sync.
__device__ __forceinline__ void wait_for_parts(int num_threads) {
  asm volatile("barrier.sync 1, %0;" ::"r"(num_threads) : "memory");
}

/// Warp `warp` of the `num_warps` of a part.
template <int kBlocks, int kPart, bool kOutputs>
__device__ __forceinline__ void run_chunked_part(const ChunkedArguments& a, unsigned char* shared_bytes, int warp,
                                                 int num_warps) {
  using Shared = ChunkedShared<kBlocks>;
  using Part = ChunkedPart<kBlocks, kPart>;
  using State = ChunkedState<kBlocks, kPart>;
  using Groups = typename State::Groups;
  constexpr int kParts = Part::kParts, kEnd = Part::kEnd;
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const auto handed = [&](int m, int sender) -> HandedRows& {
    return reinterpret_cast<HandedRows*>(&shared + 1)[(m % 2 * (kParts - 1) + sender) * kChunkedWarps + warp];
  };

  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_threads = 32 * kParts * num_warps;
  const int g = lane / 4, t = lane % 4;
  const auto wait_for_block = [&] {
    if constexpr (kParts == 1)
      __syncthreads();
    else
      wait_for_parts(num_threads);
  };
  const auto [column_group, head, segment_index, segment, slot, is_first, is_last] = block_segment(a);
  if (slot < 0 || (!kOutputs && is_last)) return;

  const int block_column = column_group * 16 * num_warps, column = block_column + 16 * warp;
  const bool has_columns =
      column < a.head_dim;  // a last group's warp may have none: then it only helps with the scores
  const bf16* q = static_cast<const bf16*>(a.qkv.q) + segment.first * a.qkv.q_token + head * a.qkv.q_head;
  const bf16* k = static_cast<const bf16*>(a.qkv.k) + segment.first * a.qkv.k_token + head * a.qkv.k_head;
  const bf16* v =
      static_cast<const bf16*>(a.qkv.v) + segment.first * a.qkv.v_token + head * a.qkv.v_head + block_column;
  bf16* out = a.out + segment.first * a.out_token + head * a.out_head + column;
  const std::int64_t out_step = 8 * a.out_token;
  const int num_tiles = (segment.count + kTileTokens - 1) / kTileTokens;

  const auto fetch_tile = [&](int tile, int stage) {
    if (tile < num_tiles) {
      const int begin = tile * kTileTokens, left = segment.count - begin;
      for (int i = tid; i < kTileTokens * kBlocks; i += num_threads) {
        const int row = i / kBlocks, part = 8 * (i % kBlocks);
        const bool valid = row < left;
        const std::int64_t n = valid ? begin + row : 0;
        copy_async_16(&shared.k[stage][row][part], k + n * a.qkv.k_token + part, valid);
        if (kOutputs) copy_async_16(&shared.q[stage][row][part], q + n * a.qkv.q_token + part, valid);
      }
      for (int i = tid; i < kTileTokens * 2 * kChunkedWarps; i += num_threads) {
        const int row = i / (2 * kChunkedWarps), part = 8 * (i % (2 * kChunkedWarps));
        if (part >= 16 * num_warps) continue;
        const bool valid = row < left && block_column + part < a.head_dim;
        copy_async_16(&shared.v[stage][row][part], valid ? v + (begin + row) * a.qkv.v_token + part : v, valid);
      }
    }
    commit_copies();
  };
  fetch_tile(0, 0);
  fetch_tile(1, 1);
  if constexpr (kParts > 1) {
    if (tid < 2 * kChunkedWarps) {
      init_barrier(&shared.handed[tid % 2][tid / 2], 32 * (kParts - 1));
      init_barrier(&shared.free[tid % 2][tid / 2], 32);
    }
  }

  const std::int64_t s_at = static_cast<std::int64_t>(head) * a.num_features * a.head_dim;
  const std::int64_t z_at = static_cast<std::int64_t>(a.num_heads) * a.num_features * a.head_dim +
                            static_cast<std::int64_t>(head) * a.num_features;
  State state;
  float* slot_state = slot_data<float>(a.state, slot);
  float* segment_state = is_first && is_last ? slot_state : slot_data<float>(a.segment_states, segment_index);
  if (kOutputs)
    state.load(segment_state + s_at, segment_state + z_at, a.head_dim, column, a.scale, lane);
  else
    state.clear();

  const __nv_bfloat162 scale_pair = __float2bfloat162_rn(a.scale);
  const Pair scale = reinterpret_cast<const Pair&>(scale_pair);
  const auto load_query = [&]<int n>(Pair(&x)[n][2], int stage, int m) {
    load_rows<n, false>(x, &shared.q[stage][16 * m], lane);
#pragma unroll
    for (int b = 0; b < n; ++b) x[b][0] = multiply(x[b][0], scale), x[b][1] = multiply(x[b][1], scale);
  };

  // mask(p(Q Kᵀ)) and D + eps, or this part's share of them, of a tile's rows, 16 at a time; the long and the short
  // ones are shared out evenly.
  const auto score_tile = [&](int stage, int buffer) {
    for (int round = 0; round * num_warps < kTileTokens / 16; ++round) {
      const int turn = round * num_warps + (round % 2 == 0 ? warp : num_warps - 1 - warp);
      const int m = kTileTokens / 16 - 1 - turn;
      if (m < 0) continue;
      Pair x[kBlocks][2];
      load_query(x, stage, m);

      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < (Part::kGram ? kBlocks : 0); ++n) {
        const float k0 = __shfl_sync(0xffffffffu, state.key_sum[n / 2][n % 2 * 2], 8 * t);
        const float k1 = __shfl_sync(0xffffffffu, state.key_sum[n / 2][n % 2 * 2], 8 * t + 4);
        float d[4] = {k0, k1, k0, k1};
#pragma unroll
        for (int b = n / 2 * 2; b < kBlocks; b += 2) {
          const bool whole = b + 1 < kBlocks;
          const int b1 = whole ? b + 1 : b;
          const Pair fragment[4] = {x[b][0], x[b][1], whole ? x[b1][0] : 0u, whole ? x[b1][1] : 0u};
          const float weight = b == n / 2 * 2 ? 0.5f : 1.0f;  // 1: for (b, n) as well
          float part[4];  // ½ Σ k kᵀ, symmetric: its accumulators are its B fragments
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            part[e] = weight * state.gram[n / 2][b][n % 2 * 2 + e];
            part[2 + e] = whole ? weight * state.gram[n / 2][b1][n % 2 * 2 + e] : 0.0f;
          }
          const Pair high0 = pack<bf16>(part[0], part[1]), high1 = pack<bf16>(part[2], part[3]);
          mma_16x8x16<bf16>(d, fragment, high0, high1);
          mma_16x8x16<bf16>(d, fragment, pack<bf16>(part[0] - low(high0), part[1] - high(high0)),
                            pack<bf16>(part[2] - low(high1), part[3] - high(high1)));
        }
        sum[0] += d[0] * low(x[n][0]) + d[1] * high(x[n][0]);
        sum[1] += d[2] * low(x[n][1]) + d[3] * high(x[n][1]);
      }

      for (int kk = 0; Part::kScores && kk <= m; ++kk) {
        Pair y[kBlocks][2];
        load_rows<kBlocks, false>(y, &shared.k[stage][16 * kk], lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float p[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int b = 0; b < kBlocks; b += 2) {
            const bool whole = b + 1 < kBlocks;
            const int b1 = whole ? b + 1 : b;
            const Pair fragment[4] = {x[b][0], x[b][1], whole ? x[b1][0] : 0u, whole ? x[b1][1] : 0u};
            mma_16x8x16<bf16>(p, fragment, y[b][half], whole ? y[b1][half] : 0u);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[e] = fmaf(p[e], fmaf(p[e], 0.5f, 1.0f), 1.0f);
            if (kk == m && 8 * half + 2 * t + e % 2 > g + e / 2 * 8) p[e] = 0.0f;
            sum[e / 2] += p[e];
          }
          const int key = 16 * kk + 8 * half + 2 * t;
          *reinterpret_cast<Pair*>(&shared.scores[buffer][16 * m + g][key]) = pack<bf16>(p[0], p[1]);
          *reinterpret_cast<Pair*>(&shared.scores[buffer][16 * m + g + 8][key]) = pack<bf16>(p[2], p[3]);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], 1);
        sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], 2);
        if constexpr (Part::kGram) sum[e] += state.count + a.eps;
        if constexpr (Part::kGram && Part::kScores) sum[e] = 1.0f / sum[e];
        if (t == 0) shared.denominators[Part::kGram ? 0 : 1][buffer][16 * m + g + 8 * e] = sum[e];
      }
    }
  };

  wait_for_copies<1>();
  wait_for_block();
  if constexpr (kOutputs && (Part::kGram || Part::kScores)) score_tile(0, 0);

  int stage = 0;
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int next_stage = stage == kStages - 1 ? 0 : stage + 1;
    const int free_stage = next_stage == kStages - 1 ? 0 : next_stage + 1;
    const int begin = tile * kTileTokens, rows = min(segment.count - begin, kTileTokens);
    wait_for_copies<0>();
    wait_for_block();
    fetch_tile(tile + 2, free_stage);

    const auto load_values = [&](Pair(&x)[4], int kk) {
      load_matrices_transposed(x, &shared.v[stage][16 * kk + lane % 8 + lane / 16 * 8][16 * warp + (lane & 8)]);
    };
    constexpr bool kKeepValues = kParts == 1;  // as long as the registers last
    Pair values[kTileTokens / 16][4];
    if constexpr (kKeepValues) {
#pragma unroll
      for (int kk = 0; kk < kTileTokens / 16; ++kk) load_values(values[kk], kk);
    }

    if (kOutputs && (kParts > 1 || has_columns)) {  // parts wait for each other, with columns or without
      const int buffer = tile % 2;
      float sums[2][2] = {};  // Σ v of columns 2t, 2t + 1 and of 2t + 8, 2t + 9
      if constexpr (Groups::kConstant >= 0) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          sums[n][0] = __shfl_sync(0xffffffffu, state.s[Groups::kConstant][2 * n], 8 * t + 2);
          sums[n][1] = __shfl_sync(0xffffffffu, state.s[Groups::kConstant][2 * n], 8 * t + 6);
        }
      }
      const auto round = [&](int i, int n) {  // B fragments of 8 columns
        const float weight = Groups::diagonal(i) && Groups::r(i) == 0 ? 0.5f : 1.0f;
        return pack<bf16>(weight * state.s[i][2 * n], weight * state.s[i][2 * n + 1]);
      };
      constexpr bool kKeepRounded = kBlocks <= 3;  // as long as the registers last
      Pair rounded[kKeepRounded ? Groups::kCount : 1][2];
      if constexpr (kKeepRounded) {
#pragma unroll
        for (int i = 0; i < Groups::kCount; ++i) rounded[i][0] = round(i, 0), rounded[i][1] = round(i, 1);
      }
      const bool odd = t % 2 != 0;
      const int first_out = odd ? 2 * t + 6 : 2 * t;
      const bool stores = column + first_out < a.head_dim;
      bf16* target = out + (begin + g) * a.out_token + first_out;
#pragma unroll 1
      for (int m = 0; 16 * m < rows; ++m) {
        Pair x[kEnd][2];
        load_query(x, stage, m);
        Pair scores[kTileTokens / 16][4];
        if constexpr (Part::kFinishes) {
#pragma unroll
          for (int kk = 0; kk < kTileTokens / 16; ++kk)
            if (kk <= m) load_matrices(scores[kk], &shared.scores[buffer][16 * m + lane % 16][16 * kk + lane / 16 * 8]);
        }
        constexpr int kSums = kParts == 1 ? 2 : 1;  // two, that products of one do not wait for those of the other
        float o[2][2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[0][n][e] = sums[n][e % 2], o[1][n][e] = 0.0f;
        if constexpr (Part::kFinishes) {
#pragma unroll
          for (int kk = 0; kk < kTileTokens / 16; ++kk)
            if (kk <= m) {
              if constexpr (!kKeepValues) load_values(values[kk], kk);
              mma_16x8x16<bf16>(o[kk % kSums][0], scores[kk], values[kk][0], values[kk][2]);
              mma_16x8x16<bf16>(o[kk % kSums][1], scores[kk], values[kk][1], values[kk][3]);
            }
        }
        Rotations upper[kEnd], lower[kEnd];
#pragma unroll
        for (int b = 0; b < kEnd; ++b) {
          upper[b].along_pairs(x[b][0], lane, b >= Part::kBegin);
          lower[b].along_pairs(x[b][1], lane, b >= Part::kBegin);
        }
#pragma unroll
        for (int i = 0; i < Groups::kCount; i += 2) {
          const Pair phi[4] = {query_feature<Groups>(upper, i, lane), query_feature<Groups>(lower, i, lane),
                               query_feature<Groups>(upper, i + 1, lane), query_feature<Groups>(lower, i + 1, lane)};
#pragma unroll
          for (int n = 0; n < 2; ++n)
            mma_16x8x16<bf16>(o[i / 2 % kSums][n], phi, kKeepRounded ? rounded[kKeepRounded ? i : 0][n] : round(i, n),
                              kKeepRounded ? rounded[kKeepRounded ? i + 1 : 0][n] : round(i + 1, n));
        }
        if constexpr (!Part::kFinishes) {
          if (m >= 2) wait_for_phase(&shared.free[m % 2][warp], tile % 2);
          HandedRows& place = handed(m, kPart == 0 ? 0 : kPart - 1);
#pragma unroll
          for (int n = 0; n < 2; ++n)
            place[n][lane] = make_float4(o[0][n][0] + o[1][n][0], o[0][n][1] + o[1][n][1], o[0][n][2] + o[1][n][2],
                                         o[0][n][3] + o[1][n][3]);
          arrive(&shared.handed[m % 2][warp]);
          continue;
        }
        if constexpr (kParts > 1) {
          wait_for_phase(&shared.handed[m % 2][warp], m / 2);
#pragma unroll
          for (int sender = 0; sender < kParts - 1; ++sender)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const float4 y = handed(m, sender)[n][lane];
              o[0][n][0] += y.x, o[0][n][1] += y.y, o[0][n][2] += y.z, o[0][n][3] += y.w;
            }
          if (m < 2 && 16 * (m + 2) < rows) arrive(&shared.free[m % 2][warp]);
        }
        // Neighbouring lanes swap, so that each stores 4 columns in a row.
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 16 * m + g + 8 * e;
          float inverse = shared.denominators[0][buffer][row];
          if constexpr (kParts == 3) inverse = 1.0f / (inverse + shared.denominators[1][buffer][row]);
          Pair y[2];
#pragma unroll
          for (int n = 0; n < 2; ++n)
            y[n] = pack<bf16>((o[0][n][2 * e] + o[1][n][2 * e]) * inverse,
                              (o[0][n][2 * e + 1] + o[1][n][2 * e + 1]) * inverse);
          const Pair other = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 1);
          if (stores && row < rows)
            *reinterpret_cast<uint2*>(target) = odd ? make_uint2(other, y[1]) : make_uint2(y[0], other);
          target += out_step;
        }
      }
    }

    constexpr int kUnroll = kParts == 1 ? kTileTokens / 16 : 2;
#pragma unroll kUnroll
    for (int kk = 0; kk < kTileTokens / 16; ++kk) {
      constexpr int kLoaded = Part::kGram ? kBlocks : kEnd;
      Pair x[kLoaded][2];
      load_rows<kLoaded, true>(x, &shared.k[stage][16 * kk], lane);
#pragma unroll
      for (int m = 0; m < State::kRowTiles; ++m) {
        const bool whole = 2 * m + 1 < kBlocks;
        const int b1 = whole ? 2 * m + 1 : 2 * m;
        const Pair fragment[4] = {x[2 * m][0], whole ? x[b1][0] : 0u, x[2 * m][1], whole ? x[b1][1] : 0u};
#pragma unroll
        for (int n = 2 * m; n < kBlocks; ++n) mma_16x8x16<bf16>(state.gram[m][n], fragment, x[n][0], x[n][1]);
        mma_16x8x16<bf16>(state.key_sum[m], fragment, kOnes, kOnes);
      }
      if (!has_columns) continue;
      Pair(&columns)[4] = values[kKeepValues ? kk : 0];
      if constexpr (!kKeepValues) load_values(columns, kk);
      Rotations left[kEnd], right[kEnd];
#pragma unroll
      for (int b = 0; b < kEnd; ++b) {
        left[b].along_lanes(x[b][0], lane, b >= Part::kBegin);
        right[b].along_lanes(x[b][1], lane, b >= Part::kBegin);
      }
#pragma unroll
      for (int i = 0; i < Groups::kCount; ++i)
        mma_16x8x16<bf16>(state.s[i], columns, key_feature<Groups>(left, i, lane), key_feature<Groups>(right, i, lane));
    }
    if constexpr (Part::kGram) state.count += static_cast<float>(rows);
    if constexpr (kOutputs && (Part::kGram || Part::kScores)) {
      if (tile + 1 < num_tiles) score_tile(next_stage, (tile + 1) % 2);
    }
    stage = next_stage;
  }

  if (kOutputs && !is_last) return;
  int store_lane = lane;
  asm volatile("" : "+r"(store_lane));  // its places are computed again, not kept in registers from the load on
  float* target = kOutputs ? slot_state : segment_state;
  float* z = target + z_at;
  if (kOutputs && a.z_out)
    z = a.z_out + (static_cast<std::int64_t>(segment_index) * a.num_heads + head) * a.num_features;
  state.store(target + s_at, Part::kGram && column_group == 0 && warp == 0 ? z : nullptr, a.head_dim, column, a.scale,
              store_lane);
}

/// One block per (segment, head, group of ≤ 64 columns). kOutputs: outputs, from the state before the segment, and the
/// state after the last one of a sequence. Otherwise: what a segment adds to the state, for all but the last.
template <int kBlocks, bool kOutputs>
__global__ void __launch_bounds__(32 * kChunkedWarps * kChunkedParts<kBlocks>, kChunkedParts<kBlocks> == 1 ? 2 : 1)
    chunked_kernel(ChunkedArguments a) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  wait_for_predecessors();
  release_successors();
  constexpr int kParts = kChunkedParts<kBlocks>;
  const int warp = static_cast<int>(threadIdx.x) / 32, num_warps = static_cast<int>(blockDim.x) / 32 / kParts;
  if constexpr (kParts == 1) {
    run_chunked_part<kBlocks, 0, kOutputs>(a, shared_bytes, warp, num_warps);
  } else {
    if (warp < num_warps)
      run_chunked_part<kBlocks, 0, kOutputs>(a, shared_bytes, warp, num_warps);
    else if (kParts == 2 || warp < 2 * num_warps)
      run_chunked_part<kBlocks, 1, kOutputs>(a, shared_bytes, warp - num_warps, num_warps);
    else
      run_chunked_part<kBlocks, kParts - 1, kOutputs>(a, shared_bytes, warp - 2 * num_warps, num_warps);
  }
}

/// Segment states from what each segment adds: exclusive sums, beginning with the slot's state. A thread has 4 floats
/// of the state of one long sequence; `quads` of them.
__global__ void __launch_bounds__(256) sum_segments_kernel(DeviceBatch batch, StateView state, StateView segment_states,
                                                           int quads, int blocks_per_sequence) {
  wait_for_predecessors();
  release_successors();
  const int index = static_cast<int>(blockIdx.x) / blocks_per_sequence;
  const int quad = static_cast<int>(blockIdx.x) % blocks_per_sequence * 256 + static_cast<int>(threadIdx.x);
  const int first = batch.first_segments[index], end = batch.first_segments[index + 1];
  const int slot = batch.slots[batch.longs[index]];
  if (slot < 0 || end - first < 2 || quad >= quads) return;
  float4 sum = slot_data<const float4>(state, slot)[quad];
  constexpr int kAhead = 4;
  for (int i = first; i < end; i += kAhead) {
    float4 x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j < end - 1) x[j] = slot_data<const float4>(segment_states, i + j)[quad];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j >= end) break;
      slot_data<float4>(segment_states, i + j)[quad] = sum;
      if (i + j < end - 1) sum.x += x[j].x, sum.y += x[j].y, sum.z += x[j].z, sum.w += x[j].w;
    }
  }
}

/// Adds to the state of each long sequence that begins what the segments of its prefix add. A thread has one of the
/// `count` floats of a state.
__global__ void __launch_bounds__(256) add_prefix_kernel(DeviceBatch batch, StateView state, StateView segment_states,
                                                         int prefix_length, int count, int blocks_per_sequence) {
  wait_for_predecessors();
  release_successors();
  const int index = static_cast<int>(blockIdx.x) / blocks_per_sequence;
  const int at = static_cast<int>(blockIdx.x) % blocks_per_sequence * 256 + static_cast<int>(threadIdx.x);
  const int sequence = batch.longs[index], slot = batch.slots[sequence];
  if (slot < 0 || at >= count) return;
  float sum = 0.0f;
  for (int i = batch.first_segments[index]; i < batch.first_segments[index + 1]; ++i) {
    const Tile segment = batch.segments[i];
    if (prefix_tokens(segment, batch.offsets[sequence], batch.positions[sequence], prefix_length) == 0) break;
    sum += slot_data<const float>(segment_states, i)[at];
  }
  if (batch.positions[sequence] == 0) slot_data<float>(state, slot)[at] += sum;
}

/// z of the long sequences into their slots, after kernels whose blocks all read the old one. z_out (num_longs or, with
/// `entries`, num_segments; count); long sequence i's is number entries[i + 1] − 1.
__global__ void __launch_bounds__(256) store_z_kernel(DeviceBatch batch, StateView state, const float* z_out,
                                                      const std::int32_t* entries, std::int64_t z_begin, int count) {
  wait_for_predecessors();
  release_successors();
  const int index = static_cast<int>(blockIdx.x);
  const int slot = batch.slots[batch.longs[index]];
  if (slot < 0) return;
  const std::int64_t entry = entries ? entries[index + 1] - 1 : index;
  float* z = slot_data<float>(state, slot) + z_begin;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 256) z[i] = z_out[entry * count + i];
}

}  // namespace based::cuda
