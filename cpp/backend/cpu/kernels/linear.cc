#include "backend/cpu/kernels/linear.h"

#include "backend/cpu/kernels/simd.h"

namespace based::cpu {
namespace BASED_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kDot = true;  // VDPBF16PS: bfloat16 weights times bfloat16 rows
#else
constexpr bool kDot = false;
#endif

// R rows × V vectors of accumulators live in registers: 32 of them with AVX-512, else 16 (AArch64 has 32).
constexpr int kMaxRows = kLanes == 16 ? 12 : 6;
constexpr int vectors_for(int rows) { return kLanes == 16 ? 2 : rows <= 3 ? 4 : 2; }

// Bytes of a row of x: K is cut into blocks of this size when there is more than one panel, so that the tile of x
// stays in L1 from panel to panel. The partial sums are kept exactly: cutting changes no bit.
constexpr std::int64_t kBlockBytes = 2048;

// Rows of a panel (128 bytes) that stay in L1 while it is read twice.
constexpr std::int64_t kHalvesBlock = 128;

std::int64_t round_up_even(std::int64_t k) { return (k + 1) / 2 * 2; }

// ---- elements ---------------------------------------------------------------------------------------------------

BASED_INLINE float read_bf16(const std::byte* p) {
  std::uint16_t h;
  __builtin_memcpy(&h, p, 2);
  return io::float_from_bf16(h);
}

BASED_INLINE float read_f16(const std::byte* p) {
  std::uint16_t h;
  __builtin_memcpy(&h, p, 2);
  return io::float_from_f16(h);
}

void to_float32(const std::byte* from, DType dtype, std::int64_t n, float* out) {
  if (dtype == DType::bfloat16) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = read_bf16(from + 2 * i);
  } else if (dtype == DType::float16) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = read_f16(from + 2 * i);
  } else {
    __builtin_memcpy(out, from, static_cast<std::size_t>(n) * sizeof(float));
  }
}

void to_bfloat16(const std::byte* from, DType dtype, std::int64_t n, std::uint16_t* out) {
  if (dtype == DType::bfloat16) {
    __builtin_memcpy(out, from, static_cast<std::size_t>(n) * 2);
  } else if (dtype == DType::float16) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = io::bf16_from_float(read_f16(from + 2 * i));
  } else {
    for (std::int64_t i = 0; i < n; ++i) {
      float f;
      __builtin_memcpy(&f, from + 4 * i, 4);
      out[i] = io::bf16_from_float(f);
    }
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------

// Words of 4 bytes: a float32 or a pair of bfloat16. 16 words of each row at a time: a cache line is read once.
constexpr int kTileWords = 16;

void pack_panel(const PanelSource& source, std::int64_t in_features, DType to, void* panel) {
  const int per_word = to == DType::bfloat16 ? 2 : 1;
  const std::int64_t num_words = (in_features + per_word - 1) / per_word;
  auto* out = static_cast<std::uint32_t*>(panel);
  alignas(64) std::uint32_t tile[kPanelColumns][kTileWords];
  for (std::int64_t word = 0; word < num_words; word += kTileWords) {
    const int words = static_cast<int>(num_words - word < kTileWords ? num_words - word : kTileWords);
    const std::int64_t k = word * per_word;
    const std::int64_t left = in_features - k;
    const std::int64_t n = left < kTileWords * per_word ? left : kTileWords * per_word;
    for (int c = 0; c < kPanelColumns; ++c) {
      if (n < kTileWords * per_word || source.rows[c] == nullptr) __builtin_memset(tile[c], 0, sizeof tile[c]);
      if (source.rows[c] == nullptr) continue;
      const DType from = source.dtypes[c];
      const std::byte* row = source.rows[c] + k * (from == DType::float32 ? 4 : 2);
      if (to == DType::bfloat16) {
        to_bfloat16(row, from, n, reinterpret_cast<std::uint16_t*>(tile[c]));
      } else {
        to_float32(row, from, n, reinterpret_cast<float*>(tile[c]));
      }
    }
    for (int w = 0; w < words; ++w)
      for (int c = 0; c < kPanelColumns; ++c) out[(word + w) * kPanelColumns + c] = tile[c][w];
  }
}

void unpack_column(const void* panel, DType dtype, std::int64_t in_features, int c, float* out) {
  if (dtype == DType::bfloat16) {
    const auto* p = static_cast<const std::uint16_t*>(panel) + 2 * c;
    for (std::int64_t k = 0; k < in_features; ++k) out[k] = io::float_from_bf16(p[k / 2 * 2 * kPanelColumns + k % 2]);
  } else {
    const auto* p = static_cast<const float*>(panel) + c;
    for (std::int64_t k = 0; k < in_features; ++k) out[k] = p[k * kPanelColumns];
  }
}

DType row_dtype(DType weights) { return kDot && weights == DType::bfloat16 ? DType::bfloat16 : DType::float32; }

void pack_rows(const void* x, DType dtype, int num_rows, std::int64_t in_features, DType weights, void* packed) {
  const auto* from = static_cast<const std::byte*>(x);
  const std::int64_t row_bytes = in_features * (dtype == DType::float32 ? 4 : 2);
  if (row_dtype(weights) == DType::bfloat16) {
    auto* out = static_cast<std::uint32_t*>(packed);
    for (int r = 0; r < num_rows; ++r) {
      const std::byte* row = from + r * row_bytes;
      const std::int64_t pairs = in_features / 2;
      if (dtype == DType::bfloat16) {
        for (std::int64_t i = 0; i < pairs; ++i) __builtin_memcpy(&out[i * num_rows + r], row + 4 * i, 4);
      } else {
        for (std::int64_t i = 0; i < pairs; ++i) {
          std::uint16_t pair[2];
          to_bfloat16(row + 8 * i, dtype, 2, pair);
          __builtin_memcpy(&out[i * num_rows + r], pair, 4);
        }
      }
      if (in_features % 2 != 0) {
        std::uint16_t pair[2] = {0, 0};
        to_bfloat16(row + (in_features - 1) * (dtype == DType::float32 ? 4 : 2), dtype, 1, pair);
        __builtin_memcpy(&out[pairs * num_rows + r], pair, 4);
      }
    }
  } else {
    auto* out = static_cast<float*>(packed);
    const std::int64_t padded = weights == DType::bfloat16 ? round_up_even(in_features) : in_features;
    for (int r = 0; r < num_rows; ++r) {
      const std::byte* row = from + r * row_bytes;
      if (dtype == DType::bfloat16) {
        for (std::int64_t k = 0; k < in_features; ++k) out[k * num_rows + r] = read_bf16(row + 2 * k);
      } else {
        for (std::int64_t k = 0; k < in_features; ++k) __builtin_memcpy(&out[k * num_rows + r], row + 4 * k, 4);
      }
      if (padded != in_features) out[in_features * num_rows + r] = 0;
    }
  }
}

// ---- products ---------------------------------------------------------------------------------------------------

// sums (R, 32) += x (K words, R) · w (K words, 32), where a word of w is a float32 or a pair of bfloat16.
template <int R, bool kBf16>
void multiply_panel(const void* x, const void* w, std::int64_t num_words, const char* ahead, int step, float* sums) {
  constexpr int V = vectors_for(R);
  for (int c = 0; c < kPanelColumns; c += V * kLanes) {
    f32v acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * kPanelColumns + c + v * kLanes);
    const float* wp = static_cast<const float*>(w) + c;
    const float* xp = static_cast<const float*>(x);
    for (std::int64_t k = 0; k < num_words; ++k) {
      if (c == 0) {
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + 64);
        ahead += step;
      }
      f32v weight[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weight[v] = load(wp + v * kLanes);
      if constexpr (!kBf16) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[r][v] = fmadd(splat(xp[r]), weight[v], acc[r][v]);
        xp += R;
      } else if constexpr (kDot) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int bits;
          __builtin_memcpy(&bits, xp + r, 4);
          __m512i pair = _mm512_set1_epi32(bits);
#if defined(__clang__)
          asm("" : "+v"(pair));  // Clang 16 crashes on a broadcast that it takes for one of bfloat16
#endif
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            acc[r][v] = (f32v)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)pair, (__m512bh)weight[v]);
        }
        xp += R;
#endif
      } else {
        // A bfloat16 is the upper half of a float32.
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          f32v half[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            half[v] =
                (f32v)(parity == 0 ? (i32v)weight[v] << 16 : (i32v)weight[v] & static_cast<std::int32_t>(0xffff0000u));
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[r][v] = fmadd(splat(xp[parity * R + r]), half[v], acc[r][v]);
        }
        xp += 2 * R;
      }
      wp += kPanelColumns;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(sums + r * kPanelColumns + c + v * kLanes, acc[r][v]);
  }
}

template <int R>
void multiply_panel_rows(int rows, bool bf16, const void* x, const void* w, std::int64_t num_words, const char* ahead,
                         int step, float* sums) {
  if constexpr (R > 0) {
    if (rows != R) return multiply_panel_rows<R - 1>(rows, bf16, x, w, num_words, ahead, step, sums);
    if (bf16) {
      multiply_panel<R, true>(x, w, num_words, ahead, step, sums);
    } else {
      multiply_panel<R, false>(x, w, num_words, ahead, step, sums);
    }
  }
}

// x Φ(x), Φ(−|x|) = ½ erfc(z), z = |x|/√2. erfc(z) = t q(t) exp(−z²), t = 1 / (1 + 0.4 z), where the polynomial q
// (a least-squares fit in relative error on 0 ≤ z ≤ 9.4) is good to 3e-7.
BASED_INLINE f32v gelu(f32v x) {
  const f32v z = vmax(x, -x) * splat(0.70710678f);
  const f32v t = splat(1.0f) / fmadd(splat(0.4f), z, splat(1.0f));
  f32v q = splat(0.0406845473f);
  q = fmadd(q, t, splat(-0.13743788f));
  q = fmadd(q, t, splat(0.0777627751f));
  q = fmadd(q, t, splat(0.0954304934f));
  q = fmadd(q, t, splat(0.0743333399f));
  q = fmadd(q, t, splat(0.195828468f));
  q = fmadd(q, t, splat(0.201229453f));
  q = fmadd(q, t, splat(0.226540685f));
  q = fmadd(q, t, splat(0.225628167f));
  const f32v tail = splat(0.5f) * t * q * vexp(splat(-0.5f) * x * x);
  return x * (x < f32v{} ? tail : splat(1.0f) - tail);
}

// ½ x (1 + tanh u) = x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³).
BASED_INLINE f32v gelu_tanh(f32v x) { return x * sigmoid(splat(1.59576912f) * fmadd(splat(0.044715f) * x * x, x, x)); }

BASED_INLINE f32v activate(Activation activation, f32v x) {
  switch (activation) {
    case Activation::silu:
      return silu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::relu:
      return vmax(x, f32v{});
    case Activation::relu_squared:
      return vmax(x, f32v{}) * vmax(x, f32v{});
    case Activation::identity:
      break;
  }
  return x;
}

// One vector of y from sums that lie in L1.
BASED_INLINE void finish(const LinearTask& task, const float* sums, const float* bias, std::int64_t r, std::int64_t c) {
  f32v value = load(sums);
  if (bias != nullptr) value += load(bias);
  if (task.gated) {
    f32v gate = load(sums + kPanelColumns / 2);
    if (bias != nullptr) gate += load(bias + kPanelColumns / 2);
    value *= activate(task.activation, gate);
  } else {
    value = activate(task.activation, value);
  }
  const std::int64_t n = task.num_columns - c < kLanes ? task.num_columns - c : kLanes;
  const std::int64_t at = r * task.y_stride + c;
  if (task.accumulate) {
    const float* y = static_cast<const float*>(task.y) + at;
    value += n == kLanes ? load(y) : load_n(y, n);
  }
  store_as(task.y, at, value, n, task.y_dtype == DType::bfloat16);
}

// Not inlined: every shape goes through the same instructions.
__attribute__((noinline)) void finish_panel(const LinearTask& task, int panel, const float* sums) {
  const int columns = task.gated ? kPanelColumns / 2 : kPanelColumns;
  const float* bias = task.bias == nullptr ? nullptr : task.bias + panel * kPanelColumns;
  for (int r = 0; r < task.num_rows; ++r) {
    for (int c = 0; c < columns; c += kLanes) {
      const std::int64_t column = static_cast<std::int64_t>(panel) * columns + c;
      if (column >= task.num_columns) break;
      finish(task, sums + r * kPanelColumns + c, bias == nullptr ? nullptr : bias + c, r, column);
    }
  }
}

void multiply(const LinearTask& task) {
  alignas(64) float sums[kMaxTaskPanels][kMaxRows * kPanelColumns];
  __builtin_memset(sums, 0, sizeof sums[0] * static_cast<std::size_t>(task.num_panels));
  const bool bf16 = task.weight_dtype == DType::bfloat16;
  const int per_word = bf16 ? 2 : 1;
  const std::int64_t num_words = (task.in_features + per_word - 1) / per_word;
  const std::int64_t x_word = row_dtype(task.weight_dtype) == DType::bfloat16 ? 4 : 4 * per_word;  // bytes of a row
  // A kernel that takes a panel in two halves of its columns reads each block twice: from L1.
  const bool halves = vectors_for(task.num_rows) * kLanes < kPanelColumns;
  const std::int64_t block = task.num_panels > 1 ? kBlockBytes / x_word : halves ? kHalvesBlock : num_words;
  const char* ahead = static_cast<const char*>(task.prefetch);
  for (std::int64_t word = 0; word < num_words; word += block) {
    const std::int64_t n = num_words - word < block ? num_words - word : block;
    const std::byte* x = static_cast<const std::byte*>(task.x) + word * x_word * task.num_rows;
    for (int panel = 0; panel < task.num_panels; ++panel) {
      const std::byte* w = static_cast<const std::byte*>(task.weights) + (panel * num_words + word) * kPanelColumns * 4;
      multiply_panel_rows<kMaxRows>(task.num_rows, bf16, x, w, n, ahead, task.prefetch_step, sums[panel]);
      ahead += n * task.prefetch_step;
      if (word + n == num_words) finish_panel(task, panel, sums[panel]);
    }
  }
}

}  // namespace
}  // namespace BASED_ISA

const LinearKernels& linear_kernels(IsaTag<BASED_ISA::kIsa>) {
  using namespace BASED_ISA;
  static constexpr LinearKernels kernels{kMaxRows, row_dtype,     pack_panel, pack_rows,
                                         multiply, unpack_column, to_float32};
  return kernels;
}

}  // namespace based::cpu
