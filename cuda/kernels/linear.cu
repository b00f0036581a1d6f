// y = act(x Wᵀ + b): the streaming kernel of decode steps, the general fallback, and what a matrix library leaves to
// do.

#include <algorithm>
#include <type_traits>

#include "kernels/common.cuh"

namespace based::cuda {
namespace {

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::gelu:
      return x * normcdff(x);
    case Activation::gelu_tanh:  // ½ x (1 + tanh u) = x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
      return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::relu:
      return fmaxf(x, 0.0f);
    case Activation::relu_squared:
      return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    case Activation::identity:
      break;
  }
  return x;
}

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bfloat16) return to_float(static_cast<const bf16*>(data)[i]);
  return to_float(static_cast<const fp16*>(data)[i]);
}

__device__ __forceinline__ void store_as(void* data, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::float32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == DType::bfloat16) {
    static_cast<bf16*>(data)[i] = from_float<bf16>(value);
  } else {
    static_cast<fp16*>(data)[i] = from_float<fp16>(value);
  }
}

/// Columns of y.
__host__ __device__ __forceinline__ std::int64_t outputs_of(const LinearArguments& a) {
  return a.gated ? a.rows / 2 : a.rows;
}

/// One element of y, or what is added to it, from its row of W's sum and, when gated, that of the gate's row.
__device__ __forceinline__ float combine(const LinearArguments& a, float value, float gate) {
  return a.gated ? value * activate(a.activation, gate) : activate(a.activation, value);
}

/// The same from sums without bias.
__device__ __forceinline__ float finish(const LinearArguments& a, std::int64_t column, float value, float gate) {
  if (a.bias != nullptr) {
    value += a.bias[column];
    if (a.gated) gate += a.bias[a.rows / 2 + column];
  }
  return combine(a, value, gate);
}

// ---- skinny: a stream over the weights -----------------------------------------------------------------------------

// A block takes tiles of 16 rows of W (gated: 8 value rows and their 8 gate rows); its warps split K. A warp moves
// chunks of 16 rows × 64 bytes through a ring of shared memory by asynchronous copies: 64 KiB under way per block, of
// which the first are requested before the kernel's predecessor has ended. Lane (g, t) copies, and alone reads, bytes
// 16t … 16t + 15 of rows g and g + 8. As k may be permuted freely, these 8 elements and the same 8 of x are the
// fragments of two tensor-core steps. A row's order of summation depends on K alone.
constexpr int kWarps = 8;
constexpr int kStages = 8;
constexpr int kChunkBytes = 64;  // of one row
constexpr int kStageBytes = 16 * kChunkBytes;
constexpr int kRingBytes = kWarps * kStages * kStageBytes;
constexpr int kBlocksPerSm = 2;     // enough bytes under way; where K is small, a block of the successor has room too
constexpr int kPartialStride = 20;  // floats between tokens: 16 rows, stored without bank conflicts

/// Rows of x up to which the stream was chosen over the matrix library. x must fit into shared memory besides.
constexpr int kMaxSkinnyRows = 8;

/// Bytes between rows of x in shared memory: room for whole chunks, and ≡ 64 mod 128, which spares bank conflicts.
__host__ __device__ __forceinline__ int x_stride_bytes(std::int64_t k, int element_bytes) {
  return static_cast<int>((k * element_bytes + 127) / 128 * 128 + 64);
}

std::int64_t skinny_shared_bytes(const LinearArguments& a) {
  const std::int64_t partial = 2 * kWarps * kMaxSkinnyRows * kPartialStride * 4;
  return kRingBytes + partial + a.m * x_stride_bytes(a.k, static_cast<int>(size_of(a.dtype)));
}

/// 16 bytes of a row that is read on. Zeros when not valid.
__device__ __forceinline__ void stream_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

/// 16 bytes of T at element i of a row of x, past L1: each row is read once.
template <typename T>
__device__ __forceinline__ uint4 load_x(const void* row, DType dtype, int i) {
  if constexpr (!std::is_same_v<T, float>) {
    if (dtype == DType::float32) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(row) + i);
      const float4 a = __ldcg(from), b = __ldcg(from + 1);
      return {pack<T>(a.x, a.y), pack<T>(a.z, a.w), pack<T>(b.x, b.y), pack<T>(b.z, b.w)};
    }
  }
  return __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(row) + i));
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    skinny_kernel(const __grid_constant__ LinearArguments a, const int num_tiles) {
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  constexpr int kTokens = kMaxSkinnyRows;                   // the 8 columns of a tensor-core step
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes
  extern __shared__ __align__(128) std::byte shared[];
  release_successors();

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int k = static_cast<int>(a.k), m = static_cast<int>(a.m);
  const int outputs = static_cast<int>(outputs_of(a)), tile_rows = a.gated ? 8 : 16;
  const int num_chunks = (k + 4 * kPiece - 1) / (4 * kPiece);
  const int first = warp * num_chunks / kWarps, count = (warp + 1) * num_chunks / kWarps - first;
  std::byte* const ring = shared + warp * kStages * kStageBytes + lane * 16;
  float* const partials = reinterpret_cast<float*>(shared + kRingBytes);
  std::byte* const xs = reinterpret_cast<std::byte*>(partials + 2 * kWarps * kTokens * kPartialStride);
  const int x_stride = x_stride_bytes(k, sizeof(T));

  int fetch_tile = count > 0 ? static_cast<int>(blockIdx.x) : num_tiles, fetch_chunk = 0;
  const auto fetch = [&](int stage) {
    if (fetch_tile < num_tiles) {
      const int low = fetch_tile * tile_rows + g, high = a.gated ? outputs + low : low + 8;
      const int column = (first + fetch_chunk) * 4 * kPiece + t * kPiece;
      const bool low_valid = low < outputs && column < k;
      const bool high_valid = (a.gated ? low : high) < outputs && column < k;
      const T* weight = static_cast<const T*>(a.weight);
      std::byte* to = ring + stage * kStageBytes;
      stream_16(to, low_valid ? weight + static_cast<std::int64_t>(low) * k + column : weight, low_valid);
      stream_16(to + kStageBytes / 2, high_valid ? weight + static_cast<std::int64_t>(high) * k + column : weight,
                high_valid);
      if (++fetch_chunk == count) {
        fetch_chunk = 0;
        fetch_tile += static_cast<int>(gridDim.x);
      }
    }
    commit_copies();  // empty at the end, so that the count of groups stays that of stages
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);

  wait_for_predecessors();

  // The warp's own columns of x, four pieces of 16 bytes per lane at a time; zeros behind K.
  const int pieces = count * 4, total = m * pieces;
  for (int base = lane; base < total; base += 4 * 32) {
    uint4 held[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = base + j * 32, token = i / max(pieces, 1), column = (first * 4 + i - token * pieces) * kPiece;
      held[j] = {};
      if (i < total && column < k) {
        const std::int64_t row = static_cast<std::int64_t>(token) * k;
        const int x_bytes = !kIsFloat && a.x_dtype != DType::float32 ? 2 : 4;
        held[j] = load_x<T>(static_cast<const std::byte*>(a.x) + row * x_bytes, a.x_dtype, column);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = base + j * 32, token = i / max(pieces, 1);
      if (i < total) *reinterpret_cast<uint4*>(xs + token * x_stride + (first * 4 + i - token * pieces) * 16) = held[j];
    }
  }
  __syncwarp();

  int stage = 0, parity = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles; tile += static_cast<int>(gridDim.x), parity ^= 1) {
    float* const partial = partials + (parity * kWarps + warp) * kTokens * kPartialStride;
    const std::byte* x_piece = xs + first * kChunkBytes + t * 16;
    if constexpr (kIsFloat) {
      float sums[kTokens][2] = {};
      for (int chunk = 0; chunk < count; ++chunk, x_piece += kChunkBytes) {
        wait_for_copies<kStages - 1>();
        const float4 low = *reinterpret_cast<const float4*>(ring + stage * kStageBytes);
        const float4 high = *reinterpret_cast<const float4*>(ring + stage * kStageBytes + kStageBytes / 2);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          if (token >= m) break;
          const float4 x = *reinterpret_cast<const float4*>(x_piece + token * x_stride);
          sums[token][0] += low.x * x.x + low.y * x.y + low.z * x.z + low.w * x.w;
          sums[token][1] += high.x * x.x + high.y * x.y + high.z * x.z + high.w * x.w;
        }
        fetch(stage);
        if (++stage == kStages) stage = 0;
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = sums[token][half];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (t == token % 4) partial[token * kPartialStride + half * 8 + g] = sum;
        }
      }
    } else {
      float sums[4] = {};
      for (int chunk = 0; chunk < count; ++chunk, x_piece += kChunkBytes) {
        wait_for_copies<kStages - 1>();
        const uint4 low = *reinterpret_cast<const uint4*>(ring + stage * kStageBytes);
        const uint4 high = *reinterpret_cast<const uint4*>(ring + stage * kStageBytes + kStageBytes / 2);
        uint4 x = {};
        if (g < m) x = *reinterpret_cast<const uint4*>(x_piece + g * x_stride);
        mma_16x8x16<T>(sums, {low.x, high.x, low.y, high.y}, x.x, x.y);
        mma_16x8x16<T>(sums, {low.z, high.z, low.w, high.w}, x.z, x.w);
        fetch(stage);
        if (++stage == kStages) stage = 0;
      }
      float* to = partial + 2 * t * kPartialStride + g;
      to[0] = sums[0];
      to[kPartialStride] = sums[1];
      to[8] = sums[2];
      to[kPartialStride + 8] = sums[3];
    }

    // At most two outputs per thread; bias and y are asked for before the warps meet.
    constexpr int kOutputs = (kTokens * 16 + kWarps * 32 - 1) / (kWarps * 32);
    float before[kOutputs] = {}, value[kOutputs] = {}, gate[kOutputs] = {};
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * kWarps * 32;
      const int token = i / tile_rows, column = tile * tile_rows + i % tile_rows;
      if (token >= m || column >= outputs) continue;
      if (a.accumulate)
        before[j] = __ldcg(static_cast<const float*>(a.y) + static_cast<std::int64_t>(token) * outputs + column);
      if (a.bias != nullptr) value[j] = a.bias[column];
      if (a.bias != nullptr && a.gated) gate[j] = a.bias[outputs + column];
    }
    __syncthreads();  // partials alternate, so that one barrier per tile is enough
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * kWarps * 32;
      const int token = i / tile_rows, row = i % tile_rows, column = tile * tile_rows + row;
      if (token >= m || column >= outputs) continue;
      const float* from = partials + (parity * kWarps * kTokens + token) * kPartialStride + row;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value[j] += from[w * kTokens * kPartialStride];
      if (a.gated) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) gate[j] += from[w * kTokens * kPartialStride + 8];
      }
      store_as(a.y, a.y_dtype, static_cast<std::int64_t>(token) * outputs + column,
               before[j] + combine(a, value[j], gate[j]));
    }
  }
}

// ---- general -------------------------------------------------------------------------------------------------------

constexpr int kTile = 64, kDepth = 16;

/// 64 tokens × 64 outputs per block of 256 threads, each 4 × 4; float32 products and sums.
__global__ void __launch_bounds__(256) general_kernel(const __grid_constant__ LinearArguments a) {
  __shared__ __align__(16) float xs[kDepth][kTile + 4];
  __shared__ __align__(16) float ws[2][kDepth][kTile + 4];
  release_successors();
  wait_for_predecessors();
  const std::int64_t outputs = outputs_of(a);
  const std::int64_t first_output = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int output = thread % 16 * 4, token = thread / 16 * 4;
  const int halves = a.gated ? 2 : 1;
  float sums[2][4][4] = {};
  for (std::int64_t k0 = 0; k0 < a.k; k0 += kDepth) {
#pragma unroll
    for (int j = 0; j < kTile * kDepth / 256; ++j) {
      const int row = thread / kDepth + j * (256 / kDepth), depth = thread % kDepth;
      const std::int64_t column = k0 + depth;
      const std::int64_t x_row = first_token + row, w_row = first_output + row;
      const bool inside = column < a.k;
      xs[depth][row] = inside && x_row < a.m ? load_as_float(a.x, a.x_dtype, x_row * a.k + column) : 0.0f;
      for (int half = 0; half < halves; ++half)
        ws[half][depth][row] = inside && w_row < outputs
                                   ? load_as_float(a.weight, a.dtype, (half * outputs + w_row) * a.k + column)
                                   : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const float4 x4 = *reinterpret_cast<const float4*>(&xs[depth][token]);
      const float x[4] = {x4.x, x4.y, x4.z, x4.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == halves) break;
        const float4 w4 = *reinterpret_cast<const float4*>(&ws[half][depth][output]);
        const float w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[half][i][j] += x[i] * w[j];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t row = first_token + token + i, column = first_output + output + j;
      if (row >= a.m || column >= outputs) continue;
      const std::int64_t at = row * outputs + column;
      const float before = a.accumulate ? static_cast<const float*>(a.y)[at] : 0.0f;
      store_as(a.y, a.y_dtype, at, before + finish(a, column, sums[0][i][j], sums[1][i][j]));
    }
  }
}

// ---- epilogue ------------------------------------------------------------------------------------------------------

/// Eight elements, in the first half when they take 16 bits: loaded apart from their conversion, so that several loads
/// are on their way at once. 16-byte aligned.
struct Raw8 {
  uint4 low, high;
};

__device__ __forceinline__ Raw8 load_8(const void* data, DType dtype, std::int64_t i) {
  const bool is_float = dtype == DType::float32;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const std::byte*>(data) + i * (is_float ? 4 : 2));
  Raw8 raw{from[0], {}};
  if (is_float) raw.high = from[1];
  return raw;
}

__device__ __forceinline__ void unpack_8(const Raw8& raw, DType dtype, float (&out)[8]) {
  const std::uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                  raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  if (dtype == DType::float32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = __uint_as_float(words[j]);
    return;
  }
  const bool is_bf16 = dtype == DType::bfloat16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = is_bf16 ? __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words[j]))
                                : __half22float2(reinterpret_cast<const __half2&>(words[j]));
    out[2 * j] = pair.x, out[2 * j + 1] = pair.y;
  }
}

__device__ __forceinline__ void store_8(void* data, DType dtype, std::int64_t i, const float (&v)[8]) {
  if (dtype == DType::float32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + i);
    to[0] = {v[0], v[1], v[2], v[3]};
    to[1] = {v[4], v[5], v[6], v[7]};
    return;
  }
  const bool is_bf16 = dtype == DType::bfloat16;
  std::uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    words[j] = is_bf16 ? pack<bf16>(v[2 * j], v[2 * j + 1]) : pack<fp16>(v[2 * j], v[2 * j + 1]);
  *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(data) + i) = {words[0], words[1], words[2], words[3]};
}

/// act(x) of eight. What was rounded to 16 bits takes the device's approximations: their 2⁻²¹ disappears there.
__device__ __forceinline__ void activate_8(Activation activation, bool rounded, float (&x)[8]) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = function(x[j]);
  };
  switch (activation) {
    case Activation::silu:
      if (rounded) return each([](float v) { return __fdividef(v, 1.0f + __expf(-v)); });
      return each([](float v) { return activate(Activation::silu, v); });
    case Activation::gelu:
      return each([](float v) { return activate(Activation::gelu, v); });
    case Activation::gelu_tanh:
      return each([](float v) { return activate(Activation::gelu_tanh, v); });
    case Activation::sigmoid:
      return each([](float v) { return activate(Activation::sigmoid, v); });
    case Activation::relu:
      return each([](float v) { return activate(Activation::relu, v); });
    case Activation::relu_squared:
      return each([](float v) { return activate(Activation::relu_squared, v); });
    case Activation::identity:
      return;
  }
}

__device__ __forceinline__ void add_8(const float* data, std::int64_t i, float (&to)[8]) {
  float x[8];
  unpack_8(load_8(data, DType::float32, i), DType::float32, x);
#pragma unroll
  for (int j = 0; j < 8; ++j) to[j] += x[j];
}

constexpr int kEpilogueThreads = 128;
constexpr int kEpilogueBlocks = 8;  // of an SM

/// A thread makes 8 columns of every gridDim.y-th token, whose next one is on its way meanwhile.
__global__ void __launch_bounds__(kEpilogueThreads, kEpilogueBlocks)
    epilogue_kernel(const __grid_constant__ LinearArguments a, const DType h_dtype, const void* h) {
  release_successors();
  wait_for_predecessors();
  const std::int64_t outputs = outputs_of(a);
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.x) * kEpilogueThreads + threadIdx.x) * 8;
  if (column >= outputs) return;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * a.rows;
  std::int64_t from = blockIdx.y * a.rows + column, to = blockIdx.y * outputs + column;
  Raw8 raw_value = load_8(h, h_dtype, from), raw_gate{};
  if (a.gated) raw_gate = load_8(h, h_dtype, from + outputs);
  for (std::int64_t token = blockIdx.y; token < a.m; token += gridDim.y) {
    float value[8], gate[8];
    unpack_8(raw_value, h_dtype, value);
    unpack_8(raw_gate, h_dtype, gate);
    from += step;
    if (token + gridDim.y < a.m) {
      raw_value = load_8(h, h_dtype, from);
      if (a.gated) raw_gate = load_8(h, h_dtype, from + outputs);
    }
    if (a.bias != nullptr) {
      add_8(a.bias, column, value);
      if (a.gated) add_8(a.bias, outputs + column, gate);
    }
    const bool rounded = h_dtype != DType::float32;
    if (a.gated) {
      activate_8(a.activation, rounded, gate);
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] *= gate[j];
    } else {
      activate_8(a.activation, rounded, value);
    }
    if (a.accumulate) add_8(static_cast<const float*>(a.y), to, value);
    store_8(a.y, a.y_dtype, to, value);
    to += static_cast<std::int64_t>(gridDim.y) * outputs;
  }
}

/// The same one column at a time, for rows that are not aligned.
__global__ void __launch_bounds__(256)
    epilogue_any_kernel(const __grid_constant__ LinearArguments a, const DType h_dtype, const void* h) {
  release_successors();
  wait_for_predecessors();
  const std::int64_t outputs = outputs_of(a);
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (column >= outputs) return;
  for (std::int64_t token = blockIdx.y; token < a.m; token += gridDim.y) {
    const std::int64_t from = token * a.rows + column, to = token * outputs + column;
    const float gate = a.gated ? load_as_float(h, h_dtype, from + outputs) : 0.0f;
    const float before = a.accumulate ? static_cast<const float*>(a.y)[to] : 0.0f;
    store_as(a.y, a.y_dtype, to, before + finish(a, column, load_as_float(h, h_dtype, from), gate));
  }
}

}  // namespace

bool skinny_linear_takes(const LinearArguments& a) {
  constexpr std::int64_t kMaxExtent = 1 << 24;  // row and column numbers stay far inside int32
  return a.m <= kMaxSkinnyRows && a.k > 0 && a.k < kMaxExtent && a.rows < kMaxExtent &&
         a.k * static_cast<std::int64_t>(size_of(a.dtype)) % 16 == 0 && is_aligned(a.weight, 16) &&
         is_aligned(a.x, 16) && skinny_shared_bytes(a) <= device_info().max_shared_bytes;
}

void skinny_linear(cudaStream_t stream, const LinearArguments& a) {
  if (a.m == 0 || a.rows == 0) return;
  const std::int64_t shared = skinny_shared_bytes(a);
  const DeviceInfo& device = device_info();
  const std::int64_t per_sm =
      std::clamp<std::int64_t>((device.max_shared_bytes + 1024) / (shared + 1024), 1, kBlocksPerSm);
  const int tile_rows = a.gated ? 8 : 16;
  const unsigned tiles = blocks_for(outputs_of(a), tile_rows);
  const unsigned rounds = blocks_for(tiles, per_sm * device.num_sms);
  const unsigned blocks = blocks_for(tiles, rounds);
  for_dtype(a.dtype, [&]<typename T>(T) {
    launch(stream, "skinny_linear", skinny_kernel<T>, blocks, kWarps * 32, static_cast<std::size_t>(shared), a,
           static_cast<int>(tiles));
  });
}

void general_linear(cudaStream_t stream, const LinearArguments& a) {
  launch(stream, "general_linear", general_kernel, dim3(blocks_for(outputs_of(a), kTile), blocks_for(a.m, kTile)), 256,
         0, a);
}

void linear_epilogue(cudaStream_t stream, const LinearArguments& a, DType h_dtype, const void* h) {
  const std::int64_t outputs = outputs_of(a);
  const auto tokens = static_cast<unsigned>(std::min<std::int64_t>(a.m, 65535));
  // 16-byte loads where rows allow them; of the bias too.
  if (outputs % 8 == 0 && is_aligned(h, 16) && is_aligned(a.y, 16) && is_aligned(a.bias, 16)) {
    const unsigned columns = blocks_for(outputs, 8 * kEpilogueThreads);
    const unsigned resident = static_cast<unsigned>(kEpilogueBlocks * device_info().num_sms);
    const unsigned rounds = blocks_for(tokens, std::max(1u, resident / std::max(1u, columns)));
    launch(stream, "linear_epilogue", epilogue_kernel, dim3(columns, blocks_for(tokens, std::max(1u, rounds))),
           kEpilogueThreads, 0, a, h_dtype, h);
  } else {
    launch(stream, "linear_epilogue", epilogue_any_kernel, dim3(blocks_for(outputs, 256), tokens), 256, 0, a, h_dtype,
           h);
  }
}

}  // namespace based::cuda
