#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/softmax_attention.cuh"

// Softmax over a window of keys, or over all keys so far, online: running maximum m, sum l and weighted values in
// float32, in powers of two (scores are scaled by log₂ e). Full attention is a window that no context fills, whose ring
// is the context, and a step that shares a sequence's keys among blocks.

namespace based::cuda {
namespace {

constexpr int kMostPadding = 7;  // elements of a head in a state, so that it is whole words of 16 bytes

// A window that no context fills: more than limits::kSize.
constexpr int kAllKeys = 1 << 30;

// The singles, then the tiles.
__device__ __forceinline__ Tile item_of(const DeviceBatch& batch, unsigned index) {
  if (static_cast<int>(index) >= batch.num_singles)
    return batch.tiles[index - static_cast<unsigned>(batch.num_singles)];
  const std::int32_t sequence = sequence_of_single(batch, index);
  return {sequence, batch.offsets[sequence], 1};
}

// ---- rotary --------------------------------------------------------------------------------------------------------

// base^(−2 · pair / R), in turns a token.
__device__ __forceinline__ double frequency(const AttentionArguments& a, int pair) {
  return exp2(a.log2_step * pair) * 0.15915494309189533577;
}

// cos and sin, in double until they are rounded: a position may be large.
__device__ __forceinline__ float2 rotation(double turns_per_token, std::int64_t position) {
  double turns = static_cast<double>(position) * turns_per_token, sine, cosine;
  turns -= rint(turns);
  sincospi(2 * turns, &sine, &cosine);
  return {static_cast<float>(cosine), static_cast<float>(sine)};
}

__device__ __forceinline__ float2 rotate(float a, float b, float cosine, float sine) {
  return {a * cosine - b * sine, a * sine + b * cosine};
}

constexpr int kRotateThreads = 256;
constexpr int kRotateTokens = 16;  // of a block

// Rotates q and k of all items in place, n pairs at a time. Grid: items · kTileTokens / kRotateTokens. Shared memory:
// the block's cosines (kRotateTokens, num_pairs), then its sines.
template <typename T, int n>
__global__ void __launch_bounds__(kRotateThreads) rotate_kernel(const AttentionArguments a) {
  constexpr unsigned kParts = kTileTokens / kRotateTokens;
  extern __shared__ __align__(32) float table[];
  wait_for_predecessors();
  release_successors();
  const Tile item = item_of(a.batch, blockIdx.x / kParts);
  const int begin = static_cast<int>(blockIdx.x % kParts) * kRotateTokens;
  const int count = min(kRotateTokens, item.count - begin);
  if (count <= 0 || a.batch.slots[item.sequence] < 0) return;
  const std::int64_t first = item.first + begin;
  const std::int64_t position = a.batch.positions[item.sequence] + first - a.batch.offsets[item.sequence];
  float* cosines = table;
  float* sines = table + kRotateTokens * a.num_pairs;
  for (int i = threadIdx.x; i < count * a.num_pairs; i += kRotateThreads) {
    const float2 r = rotation(frequency(a, i % a.num_pairs), position + i / a.num_pairs);
    cosines[i] = r.x;
    sines[i] = r.y;
  }
  __syncthreads();
  const unsigned vectors = static_cast<unsigned>(a.num_pairs / n);
  const unsigned heads = static_cast<unsigned>(a.num_heads + a.num_kv_heads);
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(count) * heads * vectors; i += kRotateThreads) {
    const int pair = static_cast<int>(i % vectors) * n;
    const int head = static_cast<int>(i / vectors % heads), t = static_cast<int>(i / vectors / heads);
    const T* x = head < a.num_heads ? static_cast<const T*>(a.qkv.q) + (first + t) * a.qkv.q_token + head * a.qkv.q_head
                                    : static_cast<const T*>(a.qkv.k) + (first + t) * a.qkv.k_token +
                                          (head - a.num_heads) * a.qkv.k_head;
    using Vector = Packed<T, n>;
    Vector* low = reinterpret_cast<Vector*>(const_cast<T*>(x) + a.first_of_pair(pair));
    Vector* high = a.interleaved ? low + 1 : reinterpret_cast<Vector*>(const_cast<T*>(x) + pair + a.num_pairs);
    const auto cosine = *reinterpret_cast<const Packed<float, n>*>(cosines + t * a.num_pairs + pair);
    const auto sine = *reinterpret_cast<const Packed<float, n>*>(sines + t * a.num_pairs + pair);
    Vector v[2] = {*low, *high};
    const auto turn = [&](int j, T& first_value, T& second_value) {
      const float2 r = rotate(to_float(first_value), to_float(second_value), cosine.x[j], sine.x[j]);
      first_value = from_float<T>(r.x);
      second_value = from_float<T>(r.y);
    };
    if (a.interleaved) {
#pragma unroll
      for (int j = 0; j < n; ++j) turn(j, v[2 * j / n].x[2 * j % n], v[(2 * j + 1) / n].x[(2 * j + 1) % n]);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) turn(j, v[0].x[j], v[1].x[j]);
    }
    *low = v[0];
    *high = v[1];
  }
}

// ---- decode --------------------------------------------------------------------------------------------------------

constexpr int kDecodeThreads = 256;  // at most
constexpr int kMaxRowBytes = 512;    // of a head: a 16-byte load a lane
constexpr int kLoads = 4;            // keys, and values, of a step
constexpr int kStages = 2;           // steps a thread has on their way; 3 blocks of an SM: 172 KB
constexpr int kStagesAlone = 4;      // where there are too few blocks for that: a window of 129 at once

// How a block is cut. `lanes` (a power of two) share a key of a head, `splits` groups of lanes share the keys of a
// head. Both depend on head_dim alone and every sum on them alone, so that a sequence's result does not depend on the
// batch; `heads` of a block and `stages` do.
struct DecodeShape {
  int lanes, splits, heads, stages;
  int threads() const { return lanes * splits * heads; }
  __device__ __host__ std::size_t ring_bytes(std::size_t row_bytes) const {
    return static_cast<std::size_t>(stages * 2 * kLoads * splits * heads) * row_bytes;
  }
  std::size_t sum_bytes(std::size_t head_dim) const {
    return static_cast<std::size_t>(splits * heads) * (head_dim + 2) * sizeof(float);
  }
};

// 16 bytes of T: of bfloat16 the high half of a word is a float32 but for its low bits.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& packed, float (&x)[16 / sizeof(T)]) {
  const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      x[2 * i] = both.x;
      x[2 * i + 1] = both.y;
    }
  }
}

// Where a step's keys lie: in a ring of one piece, in a ring of several, or in a context.
enum class Keys { ring, pieces, context };

// A context is cut into chunks of so many keys, wherever its sequence stands in a batch: a block takes one at a time,
// and join_kernel joins them in order. 256 keys and values of 128 dimensions are 131 KB, what is left of them 520
// bytes.
constexpr int kChunkKeys = 256;

__device__ __host__ __forceinline__ int num_chunks(std::int64_t num_keys) {
  return static_cast<int>((num_keys + kChunkKeys - 1) / kChunkKeys);
}

// What chunks leave: weighted values (singles, H, room, ring.head), then m and l (singles, H, room, 2), float32.
struct ChunkSums {
  float* values;
  float* totals;
  int room;  // chunks of a sequence
};

// Numbers d … d + 3 of a head's output.
template <typename T>
__device__ __forceinline__ void store_quotient(const AttentionArguments& a, T* head, int d, const float4& numerator,
                                               float denominator) {
  const float inverse = 1.0f / denominator;
  const Packed<T, 4> y{from_float<T>(numerator.x * inverse), from_float<T>(numerator.y * inverse),
                       from_float<T>(numerator.z * inverse), from_float<T>(numerator.w * inverse)};
  if (a.aligned) {
    *reinterpret_cast<Packed<T, 4>*>(head + d) = y;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (d + i < a.head_dim) head[d + i] = y.x[i];
  }
}

// One block per single and `heads` query heads, whose rows lie side by side: rotary, the ring's new row, and attention,
// in one pass over the ring; of a context, over every gridDim.y-th chunk. A thread moves its 16 bytes of keys and
// values through shared memory by asynchronous copies and alone reads them: no barrier on the way. A block of another
// head may write the new row meanwhile: its key and value are taken from the call, never from the ring.
// Shared memory: (stages, 2, kLoads, splits, heads, head_dim) T, and in the end (splits, heads, head_dim + 2) float32:
// in the same place, but for a context, whose next keys are on their way then.
template <typename T, Keys where>
__global__ void __launch_bounds__(kDecodeThreads, 3)
    decode_kernel(const AttentionArguments a, const DecodeShape shape, const ChunkSums chunks) {
  constexpr int n = 16 / sizeof(T);
  extern __shared__ __align__(128) std::byte ring[];
  __shared__ __align__(16) T rotated[2][kMaxRowBytes / sizeof(T)];  // q and k of this token, (heads, head_dim)
  const int tid = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int hd = a.head_dim, width = static_cast<int>(a.ring.head), lanes = shape.lanes, splits = shape.splits,
            heads = shape.heads;
  const int lane = tid & (lanes - 1), group = tid >> (31 - __clz(lanes)), num_groups = splits * heads;
  const int split = group >> (31 - __clz(heads)), local_head = group & (heads - 1);
  const bool active = lane * n < width, rotates = tid < heads * a.num_pairs;
  const int pair = rotates ? tid % a.num_pairs : 0;
  const double turns_per_token = rotates ? frequency(a, pair) : 0.0;
  wait_for_predecessors();
  release_successors();

  const unsigned parts = static_cast<unsigned>(a.num_heads / heads);
  const std::int32_t sequence = sequence_of_single(a.batch, blockIdx.x / parts);
  const int first_head = static_cast<int>(blockIdx.x % parts) * heads, head = first_head + local_head;
  if (a.batch.slots[sequence] < 0) return;
  const std::int64_t token = a.batch.offsets[sequence], position = a.batch.positions[sequence];
  T* ring_keys = reinterpret_cast<T*>(a.ring_keys(sequence)) + a.kv_head(head) * width + lane * n;
  T* ring_values = ring_keys + a.ring.values;
  // Softmax does not mind the order: rows in theirs, but for the one that leaves the window.
  const int own_row = static_cast<int>(position % a.window);
  const int own_chunk = where == Keys::context ? own_row / kChunkKeys : 0;
  const int chunk_hop = where == Keys::context ? static_cast<int>(gridDim.y) : 1;
  int chunk = where == Keys::context ? static_cast<int>(blockIdx.y) : 0;
  if (chunk > own_chunk) return;
  int first_row, count, num_steps;  // of the chunk, the new row apart
  const auto begin_chunk = [&] {
    first_row = chunk * kChunkKeys;
    count = where == Keys::context ? min(own_row - first_row, kChunkKeys)
                                   : static_cast<int>(min(position, static_cast<std::int64_t>(a.window - 1)));
    num_steps = (count + kLoads * splits - 1) / (kLoads * splits);
  };
  begin_chunk();

  // Of 16 bytes: addresses are a good part of the kernel's instructions.
  const std::uint32_t row_words = static_cast<std::uint32_t>(a.ring.row / n);
  const std::uint32_t piece_words = static_cast<std::uint32_t>(a.ring.piece / n);
  const int hop =
      num_groups * width * static_cast<int>(sizeof(T));  // from a key of a step to the next, then its values
  std::byte* const mine = ring + group * width * static_cast<int>(sizeof(T)) + lane * 16;
  const auto fetch = [&](int step, int stage) {
    if (active && step < num_steps) {
      std::byte* const to = mine + stage * 2 * kLoads * hop;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = (step * kLoads + j) * splits + split;
        const bool valid = i < count;
        std::uint32_t row;
        if constexpr (where == Keys::context)
          row = static_cast<std::uint32_t>(first_row + (valid ? i : 0));
        else
          row = static_cast<std::uint32_t>(valid ? i + (i >= own_row ? 1 : 0) : 0);
        std::uint64_t word = std::uint64_t{row} * row_words;
        if constexpr (where != Keys::ring)
          word = std::uint64_t{row >> a.ring.piece_shift} * piece_words +
                 std::uint64_t{row & ((1u << a.ring.piece_shift) - 1)} * row_words;
        copy_async_16(to + j * hop, reinterpret_cast<const uint4*>(ring_keys) + word, valid);
        copy_async_16(to + (kLoads + j) * hop, reinterpret_cast<const uint4*>(ring_values) + word, valid);
      }
    }
    commit_copies();  // empty at the end, so that the count of groups stays that of stages
  };
  const auto fetch_first = [&] {
#pragma unroll 1
    for (int stage = 0; stage < shape.stages; ++stage) fetch(stage, stage);
  };
  fetch_first();

  uint4 own_value{};
  if (split == 0 && active) {
    const T* v = static_cast<const T*>(a.qkv.v) + token * a.qkv.v_token + a.kv_head(head) * a.qkv.v_head + lane * n;
    if (a.aligned) {
      own_value = *reinterpret_cast<const uint4*>(v);
    } else {
      Packed<T, n> value;
#pragma unroll
      for (int i = 0; i < n; ++i) value.x[i] = lane * n + i < hd ? v[i] : from_float<T>(0);
      own_value = reinterpret_cast<const uint4&>(value);
    }
  }
  const auto q = [&](int h) {
    return static_cast<const T*>(a.qkv.q) + token * a.qkv.q_token + (first_head + h) * a.qkv.q_head;
  };
  const auto k = [&](int h) {
    return static_cast<const T*>(a.qkv.k) + token * a.qkv.k_token + a.kv_head(first_head + h) * a.qkv.k_head;
  };
  if (rotates) {
    const int h = tid / a.num_pairs, i = a.first_of_pair(pair), j = a.second_of_pair(pair);
    const T *this_q = q(h), *this_k = k(h);
    const T q_i = this_q[i], q_j = this_q[j], k_i = this_k[i], k_j = this_k[j];
    const float2 r = rotation(turns_per_token, position);
    const float2 rotated_q = rotate(to_float(q_i), to_float(q_j), r.x, r.y);
    const float2 rotated_k = rotate(to_float(k_i), to_float(k_j), r.x, r.y);
    rotated[0][h * width + i] = from_float<T>(rotated_q.x);
    rotated[0][h * width + j] = from_float<T>(rotated_q.y);
    rotated[1][h * width + i] = from_float<T>(rotated_k.x);
    rotated[1][h * width + j] = from_float<T>(rotated_k.y);
  }
  const int rest = width - 2 * a.num_pairs;
#pragma unroll 1
  for (int i = tid; i < heads * rest; i += num_threads) {
    const int h = i / rest, d = 2 * a.num_pairs + i % rest;
    rotated[0][h * width + d] = d < hd ? q(h)[d] : from_float<T>(0);
    rotated[1][h * width + d] = d < hd ? k(h)[d] : from_float<T>(0);
  }
  __syncthreads();

  float query[n], sum[n], m, l, own_score = 0;
  uint4 own_query{}, own_key{};
  if (active) {
    own_query = *reinterpret_cast<const uint4*>(&rotated[0][local_head * width + lane * n]);
    own_key = *reinterpret_cast<const uint4*>(&rotated[1][local_head * width + lane * n]);
  }
  unpack<T>(own_query, query);
  unpack<T>(own_key, sum);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    query[i] *= a.scale;
    own_score += query[i] * sum[i];
  }
  for (int step = lanes / 2; step > 0; step /= 2) own_score += __shfl_xor_sync(0xffffffffu, own_score, step);

#pragma unroll 1
  for (;;) {
    m = -kInfinity;
    l = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] = 0;
    if (split == 0 && chunk == own_chunk) {
      m = own_score;
      l = 1;
      unpack<T>(own_value, sum);
      if (active && head % (a.num_heads / a.num_kv_heads) == 0) {
        const std::int64_t row = a.ring_row<where != Keys::ring>(own_row);
        *reinterpret_cast<uint4*>(ring_keys + row) = own_key;
        *reinterpret_cast<uint4*>(ring_values + row) = own_value;
      }
    }

    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      if (shape.stages == kStages) {
        wait_for_copies<kStages - 1>();
      } else {
        wait_for_copies<kStagesAlone - 1>();
      }
      const std::byte* from = mine + stage * 2 * kLoads * hop;
      const auto read = [&](int j) {
        return active ? *reinterpret_cast<const uint4*>(from + j * hop) : make_uint4(0, 0, 0, 0);
      };
      float score[kLoads], next = m;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        float key[n];
        unpack<T>(read(j), key);
        score[j] = 0;
#pragma unroll
        for (int i = 0; i < n; ++i) score[j] += query[i] * key[i];
      }
      for (int across = lanes / 2; across > 0; across /= 2) {
#pragma unroll
        for (int j = 0; j < kLoads; ++j) score[j] += __shfl_xor_sync(0xffffffffu, score[j], across);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if ((step * kLoads + j) * splits + split >= count) score[j] = -kInfinity;
        next = fmaxf(next, score[j]);
      }
      const float reference = finite_maximum(next), factor = fast_exp2(m - reference);
      m = next;
      l *= factor;
#pragma unroll
      for (int i = 0; i < n; ++i) sum[i] *= factor;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        float value[n];
        unpack<T>(read(kLoads + j), value);
        const float p = fast_exp2(score[j] - reference);
        l += p;
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] += p * value[i];
      }
      fetch(step + shape.stages, stage);
      if (++stage == shape.stages) stage = 0;
    }

    const int this_chunk = chunk;
    chunk += chunk_hop;
    if constexpr (where == Keys::context) {
      if (chunk <= own_chunk) {
        begin_chunk();
        fetch_first();
      }
    }
    __syncthreads();  // room for the sums: the ring, or that of the chunk before
    float* const partial =
        reinterpret_cast<float*>(where == Keys::context ? ring + shape.ring_bytes(width * sizeof(T)) : ring);
    float* const maxima = partial + num_groups * width;
    float* const totals = maxima + num_groups;
    if (active) {
      float4* to = reinterpret_cast<float4*>(partial + group * width + lane * n);
#pragma unroll
      for (int i = 0; i < n; i += 4) to[i / 4] = {sum[i], sum[i + 1], sum[i + 2], sum[i + 3]};
    }
    if (lane == 0) {
      maxima[group] = m;
      totals[group] = l;
    }
    __syncthreads();
    T* out = static_cast<T*>(a.out) + token * a.out_token + first_head * hd;
    for (int i = 4 * tid; i < heads * width; i += 4 * num_threads) {
      const int h = i / width, d = i % width;
      float greatest = -kInfinity, denominator = 0;
      float4 numerator{};
#pragma unroll 8
      for (int s = 0; s < splits; ++s) greatest = fmaxf(greatest, maxima[s * heads + h]);
#pragma unroll 4
      for (int s = 0; s < splits; ++s) {
        const float factor = fast_exp2(maxima[s * heads + h] - greatest);
        const float4 part = *reinterpret_cast<const float4*>(partial + s * heads * width + i);
        denominator += factor * totals[s * heads + h];
        numerator.x += factor * part.x;
        numerator.y += factor * part.y;
        numerator.z += factor * part.z;
        numerator.w += factor * part.w;
      }
      if (own_chunk > 0) {  // for join_kernel
        const std::int64_t row =
            (std::int64_t{blockIdx.x / parts} * a.num_heads + first_head + h) * chunks.room + this_chunk;
        *reinterpret_cast<float4*>(chunks.values + row * width + d) = numerator;
        if (d == 0) *reinterpret_cast<float2*>(chunks.totals + 2 * row) = {greatest, denominator};
      } else {
        store_quotient(a, out + h * hd, d, numerator, denominator);
      }
    }
    if (chunk > own_chunk) return;
  }
}

constexpr int kJoinThreads = 128;

// One block per single and head of a context of several chunks: their sums, in the order of the chunks.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) join_kernel(const AttentionArguments a, const ChunkSums chunks) {
  __shared__ __align__(16) float4 numerators[kJoinThreads];
  __shared__ float denominators[kJoinThreads], maxima[kJoinThreads / 32];
  wait_for_predecessors();
  release_successors();
  const unsigned num_heads = static_cast<unsigned>(a.num_heads), single = blockIdx.x / num_heads;
  const std::int32_t sequence = sequence_of_single(a.batch, single);
  const int count = num_chunks(a.batch.positions[sequence] + 1);
  if (a.batch.slots[sequence] < 0 || count == 1) return;
  const int tid = static_cast<int>(threadIdx.x), width = static_cast<int>(a.ring.head);
  const int vectors = width / 4, num_groups = kJoinThreads / vectors;
  const float2* totals = reinterpret_cast<const float2*>(chunks.totals) + std::int64_t{blockIdx.x} * chunks.room;
  const float* values = chunks.values + std::int64_t{blockIdx.x} * chunks.room * width;

  float greatest = -kInfinity;
  for (int i = tid; i < count; i += kJoinThreads) greatest = fmaxf(greatest, totals[i].x);
  greatest = warp_max(greatest);
  if (tid % 32 == 0) maxima[tid / 32] = greatest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kJoinThreads / 32; ++i) greatest = fmaxf(greatest, maxima[i]);

  const int vector = tid % vectors, group = tid / vectors;
  float denominator = 0;
  float4 numerator{};
  if (group < num_groups) {
#pragma unroll 4
    for (int i = group; i < count; i += num_groups) {
      const float2 total = totals[i];
      const float4 part = *reinterpret_cast<const float4*>(values + std::int64_t{i} * width + 4 * vector);
      const float factor = fast_exp2(total.x - greatest);
      denominator += factor * total.y;
      numerator.x += factor * part.x;
      numerator.y += factor * part.y;
      numerator.z += factor * part.z;
      numerator.w += factor * part.w;
    }
  }
  numerators[tid] = numerator;
  denominators[tid] = denominator;
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < num_groups; ++g) {
    const float4 part = numerators[g * vectors + vector];
    denominator += denominators[g * vectors + vector];
    numerator.x += part.x;
    numerator.y += part.y;
    numerator.z += part.z;
    numerator.w += part.w;
  }
  T* out = static_cast<T*>(a.out) + a.batch.offsets[sequence] * a.out_token +
           static_cast<int>(blockIdx.x % num_heads) * a.head_dim;
  store_quotient(a, out, 4 * vector, numerator, denominator);
}

// ---- keys of several tokens ----------------------------------------------------------------------------------------

// Keys and values of a sequence and kv head by their index, which counts from the call's first token: those from before
// (index ≥ 1 − window) lie in the ring, the others in the call. A context has them all: it does not overwrite one that
// is still needed, so the call's are written first.
template <typename T, Keys where>
struct KeySource {
  const AttentionArguments& a;
  const T *ring_keys, *ring_values, *keys, *values;
  std::int64_t k_token, v_token;
  int start_row;

  __device__ KeySource(const AttentionArguments& arguments, std::int32_t sequence, int kv_head)
      : a(arguments),
        ring_keys(reinterpret_cast<const T*>(a.ring_keys(sequence)) + kv_head * a.ring.head),
        ring_values(ring_keys + a.ring.values),
        keys(static_cast<const T*>(a.qkv.k) + a.batch.offsets[sequence] * a.qkv.k_token + kv_head * a.qkv.k_head),
        values(static_cast<const T*>(a.qkv.v) + a.batch.offsets[sequence] * a.qkv.v_token + kv_head * a.qkv.v_head),
        k_token(a.qkv.k_token),
        v_token(a.qkv.v_token),
        start_row(static_cast<int>(a.batch.positions[sequence] % a.window)) {}

  __device__ std::int64_t in_ring(int index) const {
    const int row = start_row + index;
    return a.ring_row<where != Keys::ring>(row < 0 ? row + a.window : row);
  }
  __device__ static bool is_in_ring(int index) { return where == Keys::context || index < 0; }
  __device__ const T* key(int index) const {
    return is_in_ring(index) ? ring_keys + in_ring(index) : keys + index * k_token;
  }
  __device__ const T* value(int index) const {
    return is_in_ring(index) ? ring_values + in_ring(index) : values + index * v_token;
  }
};

// Index of the first key that query `index` sees.
__device__ __forceinline__ int first_key(const AttentionArguments& a, std::int32_t sequence, int index) {
  return static_cast<int>(max(static_cast<std::int64_t>(index) - a.window + 1, -a.batch.positions[sequence]));
}

constexpr int kAnyWarps = 4;
constexpr int kAnyKeys = 4;  // taken at a time

// Any dtype, head_dim and alignment, after rotate_kernel: a warp per token and head, which keeps its query and sum in
// shared memory (warps, 2, head_dim). Grid: (items · kTileTokens / kAnyWarps, heads).
template <typename T, Keys where>
__global__ void __launch_bounds__(kAnyWarps * 32) attend_any_kernel(const AttentionArguments a) {
  constexpr unsigned kParts = kTileTokens / kAnyWarps;
  extern __shared__ __align__(32) float rows[];
  wait_for_predecessors();
  release_successors();
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32), hd = a.head_dim;
  const int head = static_cast<int>(blockIdx.y);
  const Tile item = item_of(a.batch, blockIdx.x / kParts);
  const int in_item = static_cast<int>(blockIdx.x % kParts) * kAnyWarps + warp;
  if (in_item >= item.count || a.batch.slots[item.sequence] < 0) return;
  const std::int64_t token = item.first + in_item;
  const int index = static_cast<int>(token - a.batch.offsets[item.sequence]);
  const KeySource<T, where> source(a, item.sequence, a.kv_head(head));
  float* query = rows + warp * 2 * hd;
  float* sum = query + hd;
  const T* q = static_cast<const T*>(a.qkv.q) + token * a.qkv.q_token + head * a.qkv.q_head;
  for (int d = lane; d < hd; d += 32) {
    query[d] = to_float(q[d]) * a.scale;
    sum[d] = 0;
  }
  float m = -kInfinity, l = 0;
  for (int base = first_key(a, item.sequence, index); base <= index; base += kAnyKeys) {
    const T* rows_of[kAnyKeys];
    float p[kAnyKeys], next = m;
#pragma unroll
    for (int j = 0; j < kAnyKeys; ++j) {
      rows_of[j] = source.key(min(base + j, index));
      p[j] = 0;
    }
    for (int d = lane; d < hd; d += 32) {
      const float x = query[d];
#pragma unroll
      for (int j = 0; j < kAnyKeys; ++j) p[j] += x * to_float(rows_of[j][d]);
    }
#pragma unroll
    for (int j = 0; j < kAnyKeys; ++j) {
      p[j] = warp_sum(p[j]);
      if (base + j > index) p[j] = -kInfinity;
      next = fmaxf(next, p[j]);
      rows_of[j] = source.value(min(base + j, index));
    }
    const float reference = finite_maximum(next), factor = exp2f(m - reference);
    m = next;
    l *= factor;
#pragma unroll
    for (int j = 0; j < kAnyKeys; ++j) {
      p[j] = exp2f(p[j] - reference);
      l += p[j];
    }
    for (int d = lane; d < hd; d += 32) {
      float x = sum[d] * factor;
#pragma unroll
      for (int j = 0; j < kAnyKeys; ++j) x += p[j] * to_float(rows_of[j][d]);
      sum[d] = x;
    }
  }
  T* out = static_cast<T*>(a.out) + token * a.out_token + head * hd;
  for (int d = lane; d < hd; d += 32) out[d] = from_float<T>(sum[d] / l);
}

// ---- tensor cores --------------------------------------------------------------------------------------------------

constexpr int kFlashThreads = 128;
constexpr int kKeys = 64;  // of a step
constexpr int kMaxFlashDim = 128;
constexpr int kLeastPieceShift = 6;  // of a context: its steps begin at multiples of kKeys rows
static_assert(kKeys == 1 << kLeastPieceShift);

// Elements from a row in shared memory to the next: head_dim rounded up to the tensor cores' 16, and an odd number of
// 16-byte pieces so that eight rows lie in different banks.
__device__ __host__ __forceinline__ int flash_stride(int head_dim) { return (head_dim + 15) / 16 * 16 + 8; }

// Tiles of a block. What a warp reads of keys and values in shared memory serves 16 queries of each: two tiles halve
// that traffic, which is the limit where there are many keys. A window has few, and its blocks are better many.
template <Keys where>
constexpr int kFlashTiles = where == Keys::context ? 2 : 1;
template <Keys where>
constexpr int kFlashRows = kFlashTiles<where> * (kTileTokens + 2 * kKeys);  // in shared memory; buffers are as many

// One block per head and kFlashTiles tiles, after rotate_kernel; its warps share the tiles' queries. Keys and values of
// a context have two buffers each, and one barrier a step. Those of a window have one, so that three blocks fit: the
// next keys are copied behind softmax and PV, the next values behind QKᵀ. Dimensions above head_dim are zeros and cost
// a branch, not an instance. The last tiles of a sequence, which may have the most keys, begin first. Shared memory:
// queries (kQueries, stride), then keys and values (kKeys, stride) by buffer.
template <typename T, Keys where>
__global__ void __launch_bounds__(kFlashThreads, kFlashTiles<where> == 1 ? 3 : 2)
    flash_kernel(const AttentionArguments a) {
  constexpr int kTiles = kFlashTiles<where>, kWarpRows = 16 * kTiles, kQueries = kTiles * kTileTokens;
  static_assert(kQueries == kFlashThreads / 32 * kWarpRows);
  extern __shared__ __align__(32) float flash_shared[];
  wait_for_predecessors();
  release_successors();
  const int hd = a.head_dim, width = static_cast<int>(a.ring.head);
  const int padded = (hd + 15) / 16 * 16, stride = flash_stride(hd);
  T* const queries = reinterpret_cast<T*>(flash_shared);
  T* const keys = queries + kQueries * stride;
  T* const values = keys + kKeys * stride;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.num_heads));
  const Tile tile =
      a.batch.tiles[static_cast<unsigned>(a.batch.num_tiles) - 1 - blockIdx.x / static_cast<unsigned>(a.num_heads)];
  const int tile_index = tile.first - a.batch.offsets[tile.sequence];
  if (a.batch.slots[tile.sequence] < 0 || tile_index / kTileTokens % kTiles != 0) return;
  const int num_queries = min(kQueries, a.batch.offsets[tile.sequence + 1] - tile.first);
  const KeySource<T, where> source(a, tile.sequence, a.kv_head(head));
  const int last = tile_index + num_queries - 1;
  const int first = first_key(a, tile.sequence, tile_index);

  constexpr int kRowThreads = kMaxFlashDim / 8, kPass = kFlashThreads / kRowThreads;  // a row's 16-byte pieces
  const int piece = tid % kRowThreads * 8, piece_row = tid / kRowThreads;
  const auto copy_rows = [&](T* to, bool of_values, int from) {
    if (piece >= padded || from > last) return;
    const auto pointer = [&](int index) { return (of_values ? source.value(index) : source.key(index)) + piece; };
    const T* x = where == Keys::context ? pointer(from) + piece_row * a.ring.row : nullptr;
    T* y = to + piece_row * stride + piece;
#pragma unroll
    for (int j = 0; j < kKeys / kPass; ++j, y += kPass * stride) {
      const int row = piece_row + j * kPass;
      const bool valid = from + row <= last && piece < width;
      if constexpr (where == Keys::context) {  // all of a step are in one piece: kLeastPieceShift
        copy_async_16(y, valid ? x : source.ring_keys, valid);
        x += kPass * a.ring.row;
      } else {
        copy_async_16(y, valid ? pointer(from + row) : source.ring_keys, valid);
      }
    }
  };
  const T* q = static_cast<const T*>(a.qkv.q) + tile.first * a.qkv.q_token + head * a.qkv.q_head;
  if (a.aligned) {
    if (piece < padded) {
#pragma unroll
      for (int j = 0; j < kQueries / kPass; ++j) {
        const int row = piece_row + j * kPass;
        const bool valid = row < num_queries && piece < hd;
        copy_async_16(queries + row * stride + piece, valid ? q + row * a.qkv.q_token + piece : q, valid);
      }
    }
  } else {
    for (int row = warp; row < kQueries; row += kFlashThreads / 32) {
      const T* x = q + row * a.qkv.q_token;
      T* const to = queries + row * stride;
      if (a.in_pairs) {
        for (int d = 2 * lane; d < padded; d += 64) {
          const bool valid = row < num_queries && d < hd;
          copy_async_4(to + d, valid ? x + d : q, valid);
        }
      } else {
        for (int d = lane; d < padded; d += 32) to[d] = row < num_queries && d < hd ? x[d] : from_float<T>(0);
      }
    }
  }

  // Of rows g and g + 8 of a tile's 16.
  float s[kTiles][kKeys / 8][4], o[kTiles][kMaxFlashDim / 8][4] = {}, m[kTiles][2], l[kTiles][2] = {};
#pragma unroll
  for (int u = 0; u < kTiles; ++u) m[u][0] = m[u][1] = -kInfinity;
  const int warp_first = tile_index + warp * kWarpRows, warp_last = warp_first + kWarpRows - 1;
  const auto is_needed = [&](int base) { return base <= warp_last && base + kKeys > warp_first - a.window + 1; };

  // s = Q Kᵀ.
  const auto score = [&](const T* from) {
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) s[u][i][0] = s[u][i][1] = s[u][i][2] = s[u][i][3] = 0;
    }
#pragma unroll
    for (int d = 0; d < kMaxFlashDim; d += 16) {
      if (d < padded) {
        std::uint32_t x[kTiles][4], k[4];
#pragma unroll
        for (int u = 0; u < kTiles; ++u)
          load_matrices(x[u], queries + (warp * kWarpRows + u * 16 + lane % 16) * stride + d + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < kKeys; i += 16) {
          load_matrices(k, from + (i + lane / 16 * 8 + lane % 8) * stride + d + lane / 8 % 2 * 8);
#pragma unroll
          for (int u = 0; u < kTiles; ++u) {
            mma_16x8x16<T>(s[u][i / 8], x[u], k[0], k[1]);
            mma_16x8x16<T>(s[u][i / 8 + 1], x[u], k[2], k[3]);
          }
        }
      }
    }
  };
  // s becomes the weights of keys `base` …; o and l are scaled to the new maximum.
  const auto weigh = [&](int base) {
    if (base + kKeys - 1 > warp_first || base <= warp_last - a.window) {
#pragma unroll
      for (int u = 0; u < kTiles; ++u) {
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int key = base + i * 8 + 2 * t + j % 2, query = warp_first + u * 16 + g + j / 2 * 8;
            if (key > query || key <= query - a.window) s[u][i][j] = -kInfinity;
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float next = -kInfinity;
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) next = fmaxf(next, fmaxf(s[u][i][2 * half], s[u][i][2 * half + 1]));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
        next = fmaxf(m[u][half], next * a.scale);
        const float reference = finite_maximum(next);
        if (__any_sync(0xffffffffu, next != m[u][half])) {  // seldom, once there are some keys
          const float factor = fast_exp2(m[u][half] - reference);
          l[u][half] *= factor;
#pragma unroll
          for (int i = 0; i < kMaxFlashDim / 8; ++i) {
            o[u][i][2 * half] *= factor;
            o[u][i][2 * half + 1] *= factor;
          }
          m[u][half] = next;
        }
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            s[u][i][j] = fast_exp2(fmaf(s[u][i][j], a.scale, -reference));
            l[u][half] += s[u][i][j];
          }
        }
      }
    }
  };
  // o += P V.
  const auto add_values = [&](const T* from) {
#pragma unroll
    for (int i = 0; i < kKeys; i += 16) {
      std::uint32_t p[kTiles][4];
#pragma unroll
      for (int u = 0; u < kTiles; ++u) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          p[u][j] = pack<T>(s[u][i / 8 + j / 2][j % 2 * 2], s[u][i / 8 + j / 2][j % 2 * 2 + 1]);
      }
#pragma unroll
      for (int d = 0; d < kMaxFlashDim; d += 16) {
        if (d < padded) {
          std::uint32_t v[4];
          load_matrices_transposed(v, from + (i + lane % 16) * stride + d + lane / 16 * 8);
#pragma unroll
          for (int u = 0; u < kTiles; ++u) {
            mma_16x8x16<T>(o[u][d / 8], p[u], v[0], v[1]);
            mma_16x8x16<T>(o[u][d / 8 + 1], p[u], v[2], v[3]);
          }
        }
      }
    }
  };

  if constexpr (where == Keys::context) {
    copy_rows(keys, false, first);
    copy_rows(values, true, first);
    commit_copies();
    int buffer = 0;
    for (int base = first; base <= last; base += kKeys, buffer ^= 1) {
      wait_for_copies<0>();
      __syncthreads();  // and all are done with the other buffer
      const int here = buffer * 2 * kKeys * stride, there = 2 * kKeys * stride - here;
      copy_rows(keys + there, false, base + kKeys);
      copy_rows(values + there, true, base + kKeys);
      commit_copies();
      if (is_needed(base)) {
        score(keys + here);
        weigh(base);
        add_values(values + here);
      }
    }
  } else {
    copy_rows(keys, false, first);
    commit_copies();
    copy_rows(values, true, first);
    commit_copies();
    for (int base = first; base <= last; base += kKeys) {
      const bool needed = is_needed(base);
      wait_for_copies<1>();  // the values' group came after the keys'
      __syncthreads();
      if (needed) score(keys);
      __syncthreads();
      copy_rows(keys, false, base + kKeys);
      commit_copies();
      if (needed) weigh(base);
      wait_for_copies<1>();  // the values
      __syncthreads();
      if (needed) add_values(values);
      __syncthreads();
      copy_rows(values, true, base + kKeys);
      commit_copies();
    }
  }

  // Through the warp's own rows of the queries, for whole 16-byte stores.
#pragma unroll
  for (int u = 0; u < kTiles; ++u) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[u][half] += __shfl_xor_sync(0xffffffffu, l[u][half], 1);
      l[u][half] += __shfl_xor_sync(0xffffffffu, l[u][half], 2);
      const float inverse = 1.0f / l[u][half];
      T* row = queries + (warp * kWarpRows + u * 16 + g + half * 8) * stride + 2 * t;
#pragma unroll
      for (int i = 0; i < kMaxFlashDim / 8; ++i) {
        if (i * 8 < hd)
          *reinterpret_cast<std::uint32_t*>(row + i * 8) =
              pack<T>(o[u][i][2 * half] * inverse, o[u][i][2 * half + 1] * inverse);
      }
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(a.out) + tile.first * a.out_token + head * hd;
  const int warp_rows = min(kWarpRows, num_queries - warp * kWarpRows);
  if (a.aligned) {
    const int out_piece = lane % kRowThreads * 8;
    if (out_piece < hd) {
#pragma unroll
      for (int i = lane / kRowThreads; i < kWarpRows; i += 32 / kRowThreads) {
        const int row = warp * kWarpRows + i;
        if (i < warp_rows)
          *reinterpret_cast<uint4*>(out + row * a.out_token + out_piece) =
              *reinterpret_cast<const uint4*>(queries + row * stride + out_piece);
      }
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < warp_rows; ++i) {
      const int row = warp * kWarpRows + i;
      if (a.in_pairs) {
        for (int d = 2 * lane; d < hd; d += 64)
          *reinterpret_cast<std::uint32_t*>(out + row * a.out_token + d) =
              *reinterpret_cast<const std::uint32_t*>(queries + row * stride + d);
      } else {
        for (int d = lane; d < hd; d += 32) out[row * a.out_token + d] = queries[row * stride + d];
      }
    }
  }
}

// ---- ring ----------------------------------------------------------------------------------------------------------

constexpr int kRingThreads = 256;
constexpr int kRingTokens = 4;  // of a block

// Writes the last `window` keys and values of every item's sequence: to a ring after all attention has read the older
// ones, to a context before. A Word is `n` elements. Grid: (items · kTileTokens / kRingTokens).
template <typename Word, bool in_pieces>
__global__ void __launch_bounds__(kRingThreads) ring_kernel(const AttentionArguments a, const int n) {
  constexpr unsigned kParts = kTileTokens / kRingTokens;
  wait_for_predecessors();
  release_successors();
  const Tile item = item_of(a.batch, blockIdx.x / kParts);
  const int begin = static_cast<int>(blockIdx.x % kParts) * kRingTokens;
  if (begin >= item.count || a.batch.slots[item.sequence] < 0) return;
  const std::int64_t offset = a.batch.offsets[item.sequence], end = a.batch.offsets[item.sequence + 1];
  Word* const ring_keys = reinterpret_cast<Word*>(a.ring_keys(item.sequence));
  Word* const ring_values = ring_keys + a.ring.values / n;
  const int words = a.head_dim / n, row_words = static_cast<int>(a.ring.head) / n;
  for (int i = 0; i < kRingTokens && begin + i < item.count; ++i) {
    const std::int64_t token = item.first + begin + i;
    if (token < end - a.window) continue;
    const auto index = static_cast<int>((a.batch.positions[item.sequence] + token - offset) % a.window);
    const std::int64_t row = a.ring_row<in_pieces>(index) / n;
    const Word* keys = static_cast<const Word*>(a.qkv.k) + token * a.qkv.k_token / n;
    const Word* values = static_cast<const Word*>(a.qkv.v) + token * a.qkv.v_token / n;
    for (int j = static_cast<int>(threadIdx.x); j < a.num_kv_heads * row_words; j += kRingThreads) {
      const int head = j / row_words, word = j % row_words;
      ring_keys[row + j] = word < words ? keys[head * a.qkv.k_head / n + word] : Word{};
      ring_values[row + j] = word < words ? values[head * a.qkv.v_head / n + word] : Word{};
    }
  }
}

// Few blocks: one per head, with more on their way; many: as many heads a block as it has threads for.
DecodeShape decode_shape(const AttentionArguments& a, std::size_t row_bytes) {
  DecodeShape shape{1, 0, 1, kStagesAlone};
  while (static_cast<std::size_t>(shape.lanes) * 16 < row_bytes) shape.lanes *= 2;
  shape.splits = std::max(8, 32 / shape.lanes);
  const DeviceInfo& device = device_info();
  const bool many = std::int64_t{a.batch.num_singles} * a.num_heads > 3 * std::int64_t{device.num_sms};
  while (many && a.num_heads % (2 * shape.heads) == 0 && 2 * shape.threads() <= kDecodeThreads) shape.heads *= 2;
  const std::size_t most =
      shape.ring_bytes(row_bytes) + shape.sum_bytes(static_cast<std::size_t>(a.head_dim)) + 2 * kMaxRowBytes;
  if (many || most > static_cast<std::size_t>(device.max_shared_bytes)) shape.stages = kStages;
  return shape;
}

// Blocks that share the chunks of a sequence's heads: for some waves on the card, however long its sequences are.
unsigned chunk_blocks(unsigned blocks, int room) {
  const unsigned wanted = 8 * static_cast<unsigned>(device_info().num_sms);
  return std::clamp((wanted + blocks - 1) / std::max(blocks, 1u), 1u, static_cast<unsigned>(room));
}

// Whether q, k, v, and out, can be moved in words of n elements of T.
template <typename T>
bool in_words(const AttentionArguments& a, int n) {
  const auto is_in_words = [n](const void* data, std::int64_t token, std::int64_t head) {
    return is_aligned(data, static_cast<std::size_t>(n) * sizeof(T)) && token % n == 0 && head % n == 0;
  };
  return a.head_dim % n == 0 && is_in_words(a.qkv.q, a.qkv.q_token, a.qkv.q_head) &&
         is_in_words(a.qkv.k, a.qkv.k_token, a.qkv.k_head) && is_in_words(a.qkv.v, a.qkv.v_token, a.qkv.v_head) &&
         is_in_words(a.out, a.out_token, 0);
}

template <typename T, Keys where>
void enqueue(cudaStream_t stream, const char* name, AttentionArguments a, const ChunkSums& chunks) {
  constexpr int n = 16 / sizeof(T);
  constexpr bool in_pieces = where != Keys::ring, context = where == Keys::context;
  const unsigned num_heads = static_cast<unsigned>(a.num_heads), singles = static_cast<unsigned>(a.batch.num_singles);
  a.aligned = in_words<T>(a, n);
  a.in_pairs = in_words<T>(a, 2);
  const KeyValueView& ring = a.ring;
  const bool ring_aligned = is_aligned(ring.keys.data, 16) && ring.keys.slot_stride % 16 == 0 && ring.head % n == 0 &&
                            ring.row % n == 0 && ring.values % n == 0 && ring.piece % n == 0;
  const std::size_t row_bytes = static_cast<std::size_t>(ring.head) * sizeof(T);
  if (ring_aligned && (a.aligned || context) && row_bytes <= kMaxRowBytes) {
    const DecodeShape shape = decode_shape(a, row_bytes);
    const std::size_t ring_bytes = shape.ring_bytes(row_bytes);
    const std::size_t sum_bytes = shape.sum_bytes(static_cast<std::size_t>(ring.head));
    dim3 grid(singles * (num_heads / static_cast<unsigned>(shape.heads)));
    if (context) grid.y = chunk_blocks(grid.x, chunks.room);
    launch(stream, name, decode_kernel<T, where>, grid, static_cast<unsigned>(shape.threads()),
           context ? ring_bytes + sum_bytes : std::max(ring_bytes, sum_bytes), a, shape, chunks);
    if (context && chunks.room > 1)
      launch(stream, name, join_kernel<T>, singles * num_heads, kJoinThreads, 0, a, chunks);
    a.batch.num_singles = 0;
  }

  const unsigned items = static_cast<unsigned>(a.batch.num_singles + a.batch.num_tiles);
  if (a.num_pairs > 0) {
    const std::size_t shared_bytes =
        std::size_t{2} * kRotateTokens * static_cast<std::size_t>(a.num_pairs) * sizeof(float);
    const auto rotate = [&](auto kernel) {
      launch(stream, name, kernel, items * (kTileTokens / kRotateTokens), kRotateThreads, shared_bytes, a);
    };
    if (a.aligned && a.num_pairs % n == 0) {
      rotate(rotate_kernel<T, n>);
    } else if (a.in_pairs && a.num_pairs % 2 == 0) {
      rotate(rotate_kernel<T, 2>);
    } else {
      rotate(rotate_kernel<T, 1>);
    }
  }
  const auto write_ring = [&] {
    const unsigned ring_blocks = items * (kTileTokens / kRingTokens);
    const bool in_words_of_4 = sizeof(T) == 4 || (ring_aligned && a.in_pairs);
    if (a.aligned && ring_aligned) {
      launch(stream, name, ring_kernel<uint4, in_pieces>, ring_blocks, kRingThreads, 0, a, n);
    } else if (in_words_of_4) {
      launch(stream, name, ring_kernel<std::uint32_t, in_pieces>, ring_blocks, kRingThreads, 0, a, 4 / sizeof(T));
    } else {
      launch(stream, name, ring_kernel<std::uint16_t, in_pieces>, ring_blocks, kRingThreads, 0, a, 1);
    }
  };
  if (context) write_ring();
  bool attended = false;
  if constexpr (sizeof(T) == 2) {
    if (ring_aligned && (context ? ring.piece_shift >= kLeastPieceShift : a.aligned) &&
        ring.head <= kMaxFlashDim) {  // the singles are done
      attended = context && attend_by_wgmma<T>(stream, name, a);
      if (!attended)
        launch(stream, name, flash_kernel<T, where>, static_cast<unsigned>(a.batch.num_tiles) * num_heads,
               kFlashThreads, static_cast<std::size_t>(kFlashRows<where> * flash_stride(a.head_dim)) * sizeof(T), a);
      attended = true;
    }
  }
  if (!attended)
    launch(stream, name, attend_any_kernel<T, where>, dim3(items * (kTileTokens / kAnyWarps), num_heads),
           kAnyWarps * 32, kAnyWarps * 2 * static_cast<std::size_t>(a.head_dim) * sizeof(float), a);
  if (!context) write_ring();
}

// `Config`: SlidingWindowConfig or FullAttentionConfig.
template <class Config>
AttentionArguments arguments_of(const Config& config, const DeviceBatch& batch, const QkvView& qkv,
                                const KeyValueView& ring, std::int64_t window, void* out, std::int64_t out_token) {
  AttentionArguments a{};
  a.batch = batch;
  a.qkv = qkv;
  a.ring = ring;
  a.out = out;
  a.out_token = out_token;
  a.num_heads = static_cast<int>(config.num_heads);
  a.num_kv_heads = static_cast<int>(config.num_kv_heads);
  a.head_dim = static_cast<int>(config.head_dim);
  a.window = static_cast<int>(window);
  a.num_pairs = static_cast<int>((config.rotary_dim + 1) / 2);
  a.interleaved = config.rotary_interleaved;
  a.scale = static_cast<float>(config.scale * 1.4426950408889634);
  if (config.rotary_dim > 0)
    a.log2_step = -2.0 / static_cast<double>(config.rotary_dim) * std::log2(config.rotary_base);
  return a;
}

}  // namespace

void sliding_window(cudaStream_t stream, const SlidingWindowConfig& config, DType dtype, const DeviceBatch& batch,
                    const QkvView& qkv, const KeyValueView& ring, void* out, std::int64_t out_token) {
  const AttentionArguments a = arguments_of(config, batch, qkv, ring, config.window, out, out_token);
  for_dtype(dtype, [&]<typename T>(T) {
    if (ring.piece == 0)
      enqueue<T, Keys::ring>(stream, "sliding_window", a, {});
    else
      enqueue<T, Keys::pieces>(stream, "sliding_window", a, {});
  });
}

std::size_t full_attention_scratch(const FullAttentionConfig& config, const DeviceBatch& batch, std::int64_t max_keys) {
  const auto rows = static_cast<std::size_t>(batch.num_singles) * static_cast<std::size_t>(config.num_heads) *
                    static_cast<std::size_t>(num_chunks(max_keys));
  return rows * static_cast<std::size_t>(config.head_dim + kMostPadding + 2) * sizeof(float);
}

void full_attention(cudaStream_t stream, const FullAttentionConfig& config, DType dtype, const DeviceBatch& batch,
                    const QkvView& qkv, const KeyValueView& context, void* out, std::int64_t out_token, void* scratch,
                    std::int64_t max_keys) {
  const AttentionArguments a = arguments_of(config, batch, qkv, context, kAllKeys, out, out_token);
  ChunkSums chunks{static_cast<float*>(scratch), nullptr, num_chunks(max_keys)};
  chunks.totals = chunks.values + std::int64_t{batch.num_singles} * config.num_heads * chunks.room * context.head;
  for_dtype(dtype, [&]<typename T>(T) { enqueue<T, Keys::context>(stream, "full_attention", a, chunks); });
}

KeyValueView contiguous_ring(const SlidingWindowConfig& config, StateView state) {
  const std::int64_t row = config.num_kv_heads * config.head_dim;
  return {state, config.head_dim, row, config.window * row};
}

}  // namespace based::cuda
