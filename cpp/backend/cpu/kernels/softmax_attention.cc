#include "backend/cpu/kernels/softmax_attention.h"

#include "backend/cpu/kernels/simd.h"

// Keys lie with positions in lanes, so a score is one chain over the dimensions; a lane is its position mod kKeyBlock,
// and sums over keys go block by block in time. A key outside a query's window adds an exact 0. Hence a query's result
// depends on its keys alone: not on where they lie, nor on the queries beside it.

namespace based::cpu {
namespace BASED_ISA {
namespace {

constexpr int kBlockVectors = static_cast<int>(kKeyBlock) / kLanes;
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // of values per row of a register block
#else
constexpr int kVectors = 2;
#endif

BASED_INLINE f32v load_as(const float* p) { return load(p); }
BASED_INLINE f32v load_as(const std::uint16_t* p) { return load_bf16(p); }
BASED_INLINE float round_bf16(float x) { return io::float_from_bf16(io::bf16_from_float(x)); }

void rotate(const RotaryTask& t) {
  const std::int64_t n = t.num_pairs;
  if (t.interleaved) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float a = t.x[2 * i], b = t.x[2 * i + 1];
      t.y[2 * i] = fnmadd(b, t.sine[i], a * t.cosine[i]);
      t.y[2 * i + 1] = fmadd(a, t.sine[i], b * t.cosine[i]);
    }
  } else {
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const std::int64_t count = n - i < kLanes ? n - i : kLanes;
      const auto get = [count](const float* p) { return count == kLanes ? load(p) : load_n(p, count); };
      const f32v a = get(t.x + i), b = get(t.x + i + n), c = get(t.cosine + i), s = get(t.sine + i);
      store_as(t.y, i, fnmadd(b, s, a * c), count, false);
      store_as(t.y, i + n, fmadd(a, s, b * c), count, false);
    }
  }
  for (std::int64_t i = 2 * n; i < t.head_dim; ++i) t.y[i] = t.x[i];
  for (std::int64_t i = 0; i < t.head_dim; ++i) {
    const float y = t.y[i] * t.scale;
    t.y[i] = t.round_to_bf16 ? round_bf16(y) : y;
  }
}

// scores[q, b · kKeyBlock + lane] = q[q] · key for kQ queries and kB blocks.
template <int kQ, int kB, typename T>
BASED_INLINE void score_blocks(const float* q, std::int64_t head_dim, const T* const* keys, float* scores,
                               std::int64_t stride) {
  constexpr int kN = kB * kBlockVectors;
  f32v acc[kQ][kN] = {};
  for (std::int64_t d = 0; d < head_dim; ++d) {
    f32v key[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) key[n] = load_as(keys[n / kBlockVectors] + d * kKeyBlock + n % kBlockVectors * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kQ; ++i) {
      const f32v x = splat(q[i * head_dim + d]);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) acc[i][n] = fmadd(x, key[n], acc[i][n]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQ; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) store(scores + i * stride + n * kLanes, acc[i][n]);
}

template <typename T>
BASED_INLINE const T* key_block(const KeyBlocks& w, std::int64_t block) {
  return static_cast<const T*>(w.keys) + (block - w.first_block) % w.num_blocks * w.key_stride;
}

// As many blocks at a time as registers hold, then 2, then 1.
template <int kQ, int kB, typename T>
BASED_INLINE void score(const AttendTask& task, std::int64_t& block, std::int64_t begin_block, std::int64_t end_block,
                        std::int64_t stride) {
  for (; block + kB <= end_block; block += kB) {
    const T* keys[kB];
    for (int b = 0; b < kB; ++b) keys[b] = key_block<T>(task.window, block + b);
    score_blocks<kQ, kB>(task.q, task.window.head_dim, keys, task.scratch + (block - begin_block) * kKeyBlock, stride);
  }
}

// out[i] = Σ_j p[i, j] v_j for kN vectors of columns from `col`; rows of V `begin` … `end` − 1 as counted in scores.
template <int kQ, int kN, typename T>
BASED_INLINE void mix(const AttendTask& task, std::int64_t begin_block, std::int64_t begin, std::int64_t end,
                      std::int64_t stride, std::int64_t col, const float* sums) {
  const KeyBlocks& w = task.window;
  f32v acc[kQ][kN] = {};
  for (std::int64_t j = begin; j < end;) {
    const std::int64_t block = j / kKeyBlock;
    const std::int64_t block_end = (block + 1) * kKeyBlock < end ? (block + 1) * kKeyBlock : end;
    const T* v = static_cast<const T*>(w.values) +
                 (begin_block + block - w.first_block) % w.num_blocks * w.value_stride + j % kKeyBlock * w.value_cols +
                 col;
    for (; j < block_end; ++j, v += w.value_cols) {
      f32v row[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) row[n] = load_as(v + n * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kQ; ++i) {
        const f32v p = splat(task.scratch[i * stride + j]);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) acc[i][n] = fmadd(p, row[n], acc[i][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQ; ++i) {
    if (i >= task.num_queries) break;
    if (task.partial) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) store(static_cast<float*>(task.out[i]) + col + n * kLanes, acc[i][n]);
      continue;
    }
    const f32v sum = splat(sums[i]);
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const std::int64_t c = col + n * kLanes;
      const std::int64_t count = w.head_dim - c < kLanes ? w.head_dim - c : kLanes;
      if (count > 0) store_as(task.out[i], c, acc[i][n] / sum, count, task.out_bf16);
    }
  }
}

struct MaxAndSum {
  float max, sum;
};

// scores → e^(score − max), 0 outside [first, last]. Positions count from that of scores[0].
MaxAndSum exponentiate(float* scores, std::int64_t count, std::int32_t first, std::int32_t last) {
  i32v lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const f32v lowest = splat(-__FLT_MAX__);
  f32v max = lowest;
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const i32v at = lane + static_cast<std::int32_t>(j);
    const f32v s = ((at >= first) & (at <= last)) ? load(scores + j) : lowest;
    store(scores + j, s);
    max = vmax(max, s);
  }
  const float greatest = hmax(max);
  const f32v m = splat(greatest);
  f32v sum{};
  for (std::int64_t j = 0; j < count; j += kLanes) {
    const i32v at = lane + static_cast<std::int32_t>(j);
    const f32v e = ((at >= first) & (at <= last)) ? vexp(load(scores + j) - m) : f32v{};
    store(scores + j, e);
    sum += e;
  }
  return {greatest, hsum(sum)};
}

template <int kQ, int kMaxBlocks, typename T>
void attend_queries(const AttendTask& task) {
  std::int64_t first = task.first[0], last = task.last[0];
  for (int i = 1; i < task.num_queries; ++i) {
    first = task.first[i] < first ? task.first[i] : first;
    last = task.last[i] > last ? task.last[i] : last;
  }
  const std::int64_t begin_block = first / kKeyBlock, end_block = last / kKeyBlock + 1;
  const std::int64_t stride = (end_block - begin_block) * kKeyBlock, base = begin_block * kKeyBlock;

  std::int64_t block = begin_block;
  score<kQ, kMaxBlocks, T>(task, block, begin_block, end_block, stride);
  if constexpr (kMaxBlocks > 4) score<kQ, 4, T>(task, block, begin_block, end_block, stride);
  if constexpr (kMaxBlocks > 2) score<kQ, 2, T>(task, block, begin_block, end_block, stride);
  if constexpr (kMaxBlocks > 1) score<kQ, 1, T>(task, block, begin_block, end_block, stride);

  const std::int64_t cols = task.window.value_cols;
  float sums[kQ] = {};
  for (int i = 0; i < task.num_queries; ++i) {
    const auto [max, sum] =
        exponentiate(task.scratch + i * stride, stride, static_cast<std::int32_t>(task.first[i] - base),
                     static_cast<std::int32_t>(task.last[i] - base));
    sums[i] = sum;
    if (task.partial) {
      static_cast<float*>(task.out[i])[cols] = max;
      static_cast<float*>(task.out[i])[cols + 1] = sum;
    }
  }

  std::int64_t col = 0;
  for (; col + kVectors * kLanes <= cols; col += kVectors * kLanes)
    mix<kQ, kVectors, T>(task, begin_block, first - base, last - base + 1, stride, col, sums);
  for (; col < cols; col += kLanes) mix<kQ, 1, T>(task, begin_block, first - base, last - base + 1, stride, col, sums);
}

template <typename T>
void attend_as(const AttendTask& task) {
  // Register blocks: kQ · (vectors of keys) accumulators, 16 with AVX-512, else 8.
  constexpr int kAccumulators = kVectors * 4;
  constexpr int kAlone = kAccumulators / 2 / kBlockVectors > 0 ? kAccumulators / 2 / kBlockVectors : 1;
  constexpr int kTogether =
      kAccumulators / kQueryBlock / kBlockVectors > 0 ? kAccumulators / kQueryBlock / kBlockVectors : 1;
  if (task.num_queries == 1) {
    attend_queries<1, kAlone, T>(task);
  } else {
    attend_queries<kQueryBlock, kTogether, T>(task);
  }
}

void attend(const AttendTask& task) { task.window.bf16 ? attend_as<std::uint16_t>(task) : attend_as<float>(task); }

void add(float* sum, const float* more, std::int64_t cols) {
  const float max = sum[cols] > more[cols] ? sum[cols] : more[cols];
  const f32v a = vexp(splat(sum[cols] - max)), b = vexp(splat(more[cols] - max));
  for (std::int64_t c = 0; c < cols; c += kLanes) store(sum + c, fmadd(load(more + c), b, load(sum + c) * a));
  sum[cols] = max;
  sum[cols + 1] = fmadd(more[cols + 1], b[0], sum[cols + 1] * a[0]);
}

void finish(const float* sum, std::int64_t cols, std::int64_t head_dim, void* out, bool bf16) {
  const f32v total = splat(sum[cols + 1]);
  for (std::int64_t c = 0; c < head_dim; c += kLanes)
    store_as(out, c, load(sum + c) / total, head_dim - c < kLanes ? head_dim - c : kLanes, bf16);
}

}  // namespace
}  // namespace BASED_ISA

const SoftmaxAttentionKernels& softmax_attention_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr SoftmaxAttentionKernels kernels{BASED_ISA::rotate, BASED_ISA::attend, BASED_ISA::add,
                                                   BASED_ISA::finish};
  return kernels;
}

}  // namespace based::cpu
