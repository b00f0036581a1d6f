#include "backend/cpu/kernels/linear_attention.h"

#include "backend/cpu/kernels/simd.h"

// φ(x) = [1, y_i, y_i y_j (i < j), y_i²/√2] with y = x / f^¼, pairs row by row: φ(q)·φ(k) = 1 + s + s²/2, s = q·k/√f.
//
// A chunk of C tokens after the state (S, z) of all before it:
//   P = mask(1 + QKᵀ + (QKᵀ)²/2)    O = P V + φ(Q) S    D = P 1 + φ(Q) z    out = O / (D + eps)
//   S += φ(K)ᵀ V                    z += φ(K)ᵀ 1
// Q, K and φ are kept transposed, tokens in lanes, so that φ is made by whole vectors for any f, and it is made
// kFeatureBlock features at a time, so that everything stays in the first caches for any f.
// A few tokens go one by one: one pass over S updates it and reads it.

namespace based::cpu {
namespace BASED_ISA {
namespace {

constexpr int kC = kTaylorChunk;
constexpr int kRows = 4;  // rows of a register block
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;  // and its vectors per row
#else
constexpr int kVectors = 2;
#endif
constexpr std::int64_t kFeatureBlock = 64;
constexpr std::int64_t kRecurrentBelow = 16;  // tokens
constexpr float kHalfSqrt = 0.70710678118654752f;

BASED_INLINE std::int64_t up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
BASED_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

BASED_INLINE void clear(float* p, std::int64_t n) {
  __builtin_memset(p, 0, static_cast<std::size_t>(n) * sizeof(float));
}

// ---- small products -------------------------------------------------------------------------------------------------

// c[m, n] += Σ_k a[m · kAm + k · kAk] b[k, n] for kRows rows and kN vectors of columns.
template <int kN, int kAm, int kAk>
BASED_INLINE void multiply_block(const float* a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                 std::int64_t depth) {
  f32v acc[kRows][kN];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) acc[m][n] = load(c + m * ldc + n * kLanes);
  for (std::int64_t k = 0; k < depth; ++k, a += kAk, b += ldb) {
    f32v row[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      const f32v x = splat(a[m * kAm]);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) acc[m][n] = fmadd(x, row[n], acc[m][n]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
}

// The same for any number of columns, a multiple of kLanes. Every element is one chain over k, in order.
template <int kAm, int kAk>
BASED_INLINE void multiply(const float* a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                           std::int64_t depth, std::int64_t cols) {
  std::int64_t n = 0;
  for (; n + kVectors * kLanes <= cols; n += kVectors * kLanes)
    multiply_block<kVectors, kAm, kAk>(a, b + n, ldb, c + n, ldc, depth);
  if constexpr (kVectors > 2) {
    for (; n + 2 * kLanes <= cols; n += 2 * kLanes) multiply_block<2, kAm, kAk>(a, b + n, ldb, c + n, ldc, depth);
  }
  for (; n < cols; n += kLanes) multiply_block<1, kAm, kAk>(a, b + n, ldb, c + n, ldc, depth);
}

// ---- the chunk ------------------------------------------------------------------------------------------------------

// One past the feature last made.
struct FeatureIndex {
  std::int64_t feature = 0, i = 0, j = 0;
};

// phi (count, kC): the next features of all tokens. y (f, kC).
BASED_INLINE void make_features(FeatureIndex& at, const float* y, std::int64_t f, std::int64_t count, float* phi) {
  for (std::int64_t row = 0; row < count; ++row, ++at.feature, phi += kC) {
    if (at.feature == 0) {
      for (int c = 0; c < kC; c += kLanes) store(phi + c, splat(1.0f));
    } else if (at.feature <= f) {
      __builtin_memcpy(phi, y + (at.feature - 1) * kC, kC * sizeof(float));
    } else {
      const float* a = y + at.i * kC;
      const float* b = y + at.j * kC;
      const f32v scale = splat(at.i == at.j ? kHalfSqrt : 1.0f);
      for (int c = 0; c < kC; c += kLanes) store(phi + c, load(a + c) * load(b + c) * scale);
      if (++at.j == f) at.j = ++at.i;
    }
  }
}

// y (f, kC) = x (num_tokens, f) transposed and scaled, zeros beyond num_tokens.
BASED_INLINE void transpose(const float* x, std::int64_t stride, std::int64_t num_tokens, std::int64_t f, float scale,
                            float* y) {
  for (std::int64_t c = 0; c < num_tokens; ++c)
    for (std::int64_t i = 0; i < f; ++i) y[i * kC + c] = x[c * stride + i] * scale;
  for (std::int64_t i = 0; i < f; ++i) clear(y + i * kC + num_tokens, kC - num_tokens);
}

struct ChunkScratch {
  float *q, *k;          // (f, kC)
  float *phi_q, *phi_k;  // (kFeatureBlock, kC)
  float* p;              // (kC, kC)
  float* v;              // (kC, cols)
  float* o;              // (kC, cols)
};

BASED_INLINE std::int64_t chunk_scratch_size(std::int64_t f, std::int64_t cols) {
  return (2 * f + 2 * kFeatureBlock + kC + 2 * cols) * kC;
}

// Keys of the chunk, transposed, and values.
BASED_INLINE void load_keys(const LinearAttentionTask& task, std::int64_t begin, std::int64_t num_tokens, float scale,
                            const ChunkScratch& s) {
  const std::int64_t cols = task.cols;
  transpose(task.k + begin * task.stride, task.stride, num_tokens, task.feature_dim, scale, s.k);
  for (std::int64_t c = 0; c < num_tokens; ++c) {
    __builtin_memcpy(s.v + c * cols, task.v + (begin + c) * task.stride,
                     static_cast<std::size_t>(task.head_dim) * sizeof(float));
    clear(s.v + c * cols + task.head_dim, cols - task.head_dim);
  }
  clear(s.v + num_tokens * cols, (up(num_tokens, kRows) - num_tokens) * cols);
}

// S += φ(K)ᵀ V and z += φ(K)ᵀ 1 for `count` features from begin_feature on, which phi_k holds.
BASED_INLINE void add_keys(const LinearAttentionTask& task, std::int64_t num_tokens, std::int64_t begin_feature,
                           std::int64_t count, const ChunkScratch& s) {
  const std::int64_t rows = up(num_tokens, kRows), padded = up(count, kRows);
  float* state = task.state + begin_feature * task.state_cols;
  float* z = task.z + begin_feature;
  clear(s.phi_k + count * kC, (padded - count) * kC);
  if (begin_feature == 0)  // the feature 1 of tokens that are not there
    clear(s.phi_k + num_tokens, kC - num_tokens);
  for (std::int64_t p = 0; p < padded; p += kRows)
    multiply<kC, 1>(s.phi_k + p * kC, s.v, task.cols, state + p * task.state_cols, task.state_cols, rows, task.cols);
  for (std::int64_t p = 0; p < count; ++p) {
    f32v sum{};
    for (int c = 0; c < kC; c += kLanes) sum += load(s.phi_k + p * kC + c);
    z[p] += hsum(sum);
  }
}

BASED_INLINE ChunkScratch carve(const LinearAttentionTask& task) {
  const std::int64_t f = task.feature_dim;
  ChunkScratch s;
  s.q = task.scratch;
  s.k = s.q + f * kC;
  s.phi_q = s.k + f * kC;
  s.phi_k = s.phi_q + kFeatureBlock * kC;
  s.p = s.phi_k + kFeatureBlock * kC;
  s.v = s.p + kC * kC;
  s.o = s.v + kC * task.cols;
  return s;
}

void add_chunk(const LinearAttentionTask& task, std::int64_t begin, std::int64_t num_tokens, float scale) {
  const ChunkScratch s = carve(task);
  load_keys(task, begin, num_tokens, scale, s);
  FeatureIndex k_at;
  for (std::int64_t begin_feature = 0; begin_feature < task.num_features; begin_feature += kFeatureBlock) {
    const std::int64_t count = least(kFeatureBlock, task.num_features - begin_feature);
    make_features(k_at, s.k, task.feature_dim, count, s.phi_k);
    add_keys(task, num_tokens, begin_feature, count, s);
  }
}

void attend_chunk(const LinearAttentionTask& task, std::int64_t begin, std::int64_t num_tokens, float scale) {
  const std::int64_t f = task.feature_dim, cols = task.cols;
  const ChunkScratch s = carve(task);
  f32v denominator[kC / kLanes] = {};

  transpose(task.q + begin * task.stride, task.stride, num_tokens, f, scale, s.q);
  load_keys(task, begin, num_tokens, scale, s);
  const std::int64_t rows = up(num_tokens, kRows);
  clear(s.o, rows * cols);

  // Inside the chunk.
  i32v lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (std::int64_t c = 0; c < rows; c += kRows) {
    const std::int64_t keys = up(c + kRows, kLanes);
    float* p = s.p + c * kC;
    for (int m = 0; m < kRows; ++m) clear(p + m * kC, keys);
    multiply<1, kC>(s.q + c, s.k, kC, p, kC, f, keys);
    for (int m = 0; m < kRows; ++m) {
      f32v sum{};
      for (std::int64_t j = 0; j < keys; j += kLanes) {
        const f32v x = load(p + m * kC + j);
        const f32v y = fmadd(x, fmadd(x, splat(0.5f), splat(1.0f)), splat(1.0f));
        const i32v seen = lane + static_cast<std::int32_t>(j) <= static_cast<std::int32_t>(c + m);
        const f32v masked = seen ? y : f32v{};
        store(p + m * kC + j, masked);
        sum += masked;
      }
      denominator[(c + m) / kLanes][(c + m) % kLanes] = hsum(sum);
    }
    multiply<kC, 1>(p, s.v, cols, s.o + c * cols, cols, c + kRows, cols);
  }

  // What came before it, and the state after it.
  FeatureIndex q_at, k_at;
  for (std::int64_t begin_feature = 0; begin_feature < task.num_features; begin_feature += kFeatureBlock) {
    const std::int64_t count = least(kFeatureBlock, task.num_features - begin_feature);
    float* state = task.state + begin_feature * task.state_cols;
    float* z = task.z + begin_feature;
    make_features(q_at, s.q, f, count, s.phi_q);
    make_features(k_at, s.k, f, count, s.phi_k);
    for (std::int64_t c = 0; c < rows; c += kRows)
      multiply<1, kC>(s.phi_q + c, state, task.state_cols, s.o + c * cols, cols, count, cols);
    for (std::int64_t p = 0; p < count; ++p) {
      const f32v zp = splat(z[p]);
      for (int c = 0; c < kC / kLanes; ++c)
        denominator[c] = fmadd(load(s.phi_q + p * kC + c * kLanes), zp, denominator[c]);
    }
    add_keys(task, num_tokens, begin_feature, count, s);
  }

  for (std::int64_t c = 0; c < num_tokens; ++c) {
    const f32v d = splat(static_cast<float>(denominator[c / kLanes][c % kLanes] + task.eps));
    for (std::int64_t i = 0; i < task.head_dim; i += kLanes)
      store_as(task.out, (begin + c) * task.out_stride + i, load(s.o + c * cols + i) / d,
               least(kLanes, task.head_dim - i), task.out_bf16);
  }
}

// ---- one token ------------------------------------------------------------------------------------------------------

// phi (F + kLanes), zeros behind F up to a multiple of 16. y (f + kLanes): x scaled, zeros behind.
BASED_INLINE void make_features(const float* x, std::int64_t f, float scale, float* y, float* phi) {
  for (std::int64_t i = 0; i < f; ++i) y[i] = x[i] * scale;
  clear(y + f, kLanes);
  phi[0] = 1.0f;
  __builtin_memcpy(phi + 1, y, static_cast<std::size_t>(f) * sizeof(float));
  float* row = phi + 1 + f;
  for (std::int64_t i = 0; i < f; row += f - i, ++i) {
    const f32v yi = splat(y[i]);
    for (std::int64_t j = i; j < f; j += kLanes)
      store(row + (j - i), yi * load(y + j));  // the next row hides the excess
    row[0] *= kHalfSqrt;
  }
  clear(row, kLanes);
}

// S += φ(k) vᵀ and o = φ(q)ᵀ S, kN vectors of columns.
template <int kN>
BASED_INLINE void advance_columns(const float* phi_q, const float* phi_k, std::int64_t num_features, float* state,
                                  std::int64_t state_cols, const float* v, float* o) {
  f32v x[kN], acc[kN] = {};
#pragma GCC unroll 4
  for (int n = 0; n < kN; ++n) x[n] = load(v + n * kLanes);
  for (std::int64_t p = 0; p < num_features; ++p, state += state_cols) {
    const f32v k = splat(phi_k[p]), q = splat(phi_q[p]);
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const f32v s = fmadd(k, x[n], load(state + n * kLanes));
      store(state + n * kLanes, s);
      acc[n] = fmadd(q, s, acc[n]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kN; ++n) store(o + n * kLanes, acc[n]);
}

BASED_INLINE std::int64_t token_scratch_size(std::int64_t f, std::int64_t num_features, std::int64_t cols) {
  return up(f + kLanes, 16) + 2 * up(num_features + kLanes, 16) + 2 * cols;
}

void attend_token(const LinearAttentionTask& task, std::int64_t token, float scale) {
  const std::int64_t f = task.feature_dim, features = task.num_features;
  float* y = task.scratch;
  float* phi_q = y + up(f + kLanes, 16);
  float* phi_k = phi_q + up(features + kLanes, 16);
  float* v = phi_k + up(features + kLanes, 16);
  float* o = v + task.cols;
  make_features(task.q + token * task.stride, f, scale, y, phi_q);
  make_features(task.k + token * task.stride, f, scale, y, phi_k);
  __builtin_memcpy(v, task.v + token * task.stride, static_cast<std::size_t>(task.head_dim) * sizeof(float));
  clear(v + task.head_dim, task.cols - task.head_dim);

  f32v sum{};
  for (std::int64_t p = 0; p < features; p += kLanes) {  // zeros behind the features
    const f32v z = load(task.z + p) + load(phi_k + p);
    store(task.z + p, z);
    sum = fmadd(load(phi_q + p), z, sum);
  }
  std::int64_t n = 0;
  for (; n + 4 * kLanes <= task.cols; n += 4 * kLanes)
    advance_columns<4>(phi_q, phi_k, features, task.state + n, task.state_cols, v + n, o + n);
  for (; n < task.cols; n += kLanes)
    advance_columns<1>(phi_q, phi_k, features, task.state + n, task.state_cols, v + n, o + n);

  const f32v d = splat(static_cast<float>(hsum(sum) + task.eps));
  for (std::int64_t i = 0; i < task.head_dim; i += kLanes)
    store_as(task.out, token * task.out_stride + i, load(o + i) / d, least(kLanes, task.head_dim - i), task.out_bf16);
}

// ---------------------------------------------------------------------------------------------------------------------

// z[0] before token `token`.
BASED_INLINE void renew_count(const LinearAttentionTask& task, std::int64_t token) {
  if (task.count + token >= kExactCounts) task.z[0] = static_cast<float>(task.count + token);
}

// The choice depends on a chunk's own tokens: cutting at a multiple of kC leaves it.
void attend(const LinearAttentionTask& task) {
  const float scale = static_cast<float>(1.0 / __builtin_sqrt(__builtin_sqrt(static_cast<double>(task.feature_dim))));
  for (std::int64_t begin = 0; begin < task.num_tokens; begin += kC) {
    const std::int64_t n = least(kC, task.num_tokens - begin);
    if (n >= kRecurrentBelow) {
      renew_count(task, begin);
      attend_chunk(task, begin, n, scale);
    } else {
      for (std::int64_t t = 0; t < n; ++t) {
        renew_count(task, begin + t);
        attend_token(task, begin + t, scale);
      }
    }
  }
}

void add(const LinearAttentionTask& task) {
  const float scale = static_cast<float>(1.0 / __builtin_sqrt(__builtin_sqrt(static_cast<double>(task.feature_dim))));
  for (std::int64_t begin = 0; begin < task.num_tokens; begin += kC)
    add_chunk(task, begin, least(kC, task.num_tokens - begin), scale);
}

std::int64_t scratch_size(std::int64_t feature_dim, std::int64_t num_features, std::int64_t cols) {
  const std::int64_t chunk = chunk_scratch_size(feature_dim, cols);
  const std::int64_t token = token_scratch_size(feature_dim, num_features, cols);
  return chunk > token ? chunk : token;
}

}  // namespace
}  // namespace BASED_ISA

const LinearAttentionKernels& linear_attention_kernels(IsaTag<BASED_ISA::kIsa>) {
  static constexpr LinearAttentionKernels kernels{BASED_ISA::attend, BASED_ISA::add, BASED_ISA::scratch_size};
  return kernels;
}

}  // namespace based::cpu
