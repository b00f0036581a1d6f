#include "kernels/common.cuh"

// The selective scan walks a sequence from its first token to its last. Of a channel, N numbers of state lie in the
// registers of several lanes, and 16 · 4,096 recurrences are enough for all of a card, so that time is not cut: the
// usual three passes (the state that each piece leaves, a scan over pieces, outputs) make every exponential twice, and
// exponentials are what the kernel waits for.
//
//   1 × 8,192 tokens, e = 4,096, N = 16, bfloat16, on an H200 (132 SMs, 1.75 GHz):
//     bytes    x, z, dt read and out written: 268 MB                     63 µs at 4.25 TB/s
//     MUFU     5.4e8 decays and 4 for each of 3.4e7 (t, c), 16 a clock and SM   182 µs: the floor
//     issue    29 instructions of a lane and token, and 8 to prepare it  170 µs
//   A step of B sequences reads and writes B · N · e floats: 16 µs for 128 sequences.
//
// Every kernel for N ≤ 64 adds up Σ_n C[n] h[n] in one order: chains of ⌈N / 8⌉ (rounded up to a power of two)
// consecutive n, then these eight sums in pairs; scan_any_kernel, which alone takes more, adds n by n. So cuts of a
// prompt, single tokens and the number of blocks change no bit.

namespace based::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kEighths = 8;     // chains of a channel
constexpr int kMostPart = 8;    // numbers of state in a chain; scan_any_kernel takes more
constexpr int kVectorPart = 4;  // up to here a step's lane holds its states of 4 channels

struct ScanArguments {
  ScanInputs in;
  std::int64_t e;
  std::int64_t n;  // N
  DeviceBatch batch;
  StateView state;
  void* out;  // (tokens, e)
};

// ---- arithmetic ----------------------------------------------------------------------------------------------------

/// 2^x for x ≤ 0, at least 2^−126. A slow decay is a number just below 1 whose error is raised to the power of all
/// tokens that it lasts: float32 makes it to half a unit; ex2.approx (2 units) is far below the rounding of 16-bit x.
template <typename T>
__device__ __forceinline__ float power_of_two(float x) {
  if constexpr (std::is_same_v<T, float>) {
    constexpr float kRound = 12582912.0f;  // 1.5 · 2²³: the integer nearest to x lands in the low bits
    x = fmaxf(x, -126.0f);
    const float shifted = __fadd_rn(x, kRound);
    const float f = __fsub_rn(x, __fsub_rn(shifted, kRound));  // −½ … ½
    float p = 1.5353362e-4f;
    p = fmaf(p, f, 1.3398874e-3f);
    p = fmaf(p, f, 9.6184369e-3f);
    p = fmaf(p, f, 5.5503324e-2f);
    p = fmaf(p, f, 2.4022648e-1f);
    p = fmaf(p, f, 6.9314718e-1f);
    p = fmaf(p, f, 1.0f);
    return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
  } else {
    return fast_exp2(x);
  }
}

/// max(v, 0) + log(1 + u), u = exp(−|v|) ≤ 1, whose logarithm is 2 atanh(s), s = u / (2 + u) ≤ ⅓.
template <typename T>
__device__ __forceinline__ float softplus(float v) {
  const float u = exp_for<T>(-fabsf(v));
  const float s = __fmul_rn(u, fast_reciprocal(__fadd_rn(2.0f, u))), square = __fmul_rn(s, s);
  float p = 1.0f / 13;
  p = fmaf(p, square, 1.0f / 11);
  p = fmaf(p, square, 1.0f / 9);
  p = fmaf(p, square, 1.0f / 7);
  p = fmaf(p, square, 1.0f / 5);
  p = fmaf(p, square, 1.0f / 3);
  p = fmaf(p, square, 1.0f);
  return fmaf(__fmul_rn(2.0f, s), p, fmaxf(v, 0.0f));
}

/// h ← 2^(Δ a₂) h + (Δ x) B.
template <typename T>
__device__ __forceinline__ float advanced(float h, float delta, float dx, float a2, float b) {
  return fmaf(power_of_two<T>(__fmul_rn(delta, a2)), h, __fmul_rn(dx, b));
}

template <typename T>
__device__ __forceinline__ float gated(float y, float d, float x, float z) {
  return __fmul_rn(fmaf(d, x, y), silu<T>(z));
}

/// Of lane g of kLanes that are kStride apart: Σ over these lanes of their v[g], added in pairs.
template <int kLanes, int kStride>
__device__ __forceinline__ float transposed_sum(float (&v)[kLanes], int g) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const bool odd = (g & step) != 0;
#pragma unroll
    for (int i = 0; i < kLanes / step / 2; ++i) {
      const float keep = odd ? v[2 * i + 1] : v[2 * i], send = odd ? v[2 * i] : v[2 * i + 1];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, step * kStride);
    }
  }
  return v[0];
}

// ---- one token per sequence ----------------------------------------------------------------------------------------

// Grid: singles · `blocks` of kThreads / 4 · kVec channels. A warp has 8 · kVec channels, lane g · 8 + i the states
// n = 2 g kPart … 2 (g + 1) kPart − 1 of channels i · kVec …: rows of a warp are 128 bytes when kVec is 4. The state is
// read and written once.
template <typename T, int kPart, int kVec>
__global__ void __launch_bounds__(kThreads) scan_single_kernel(const ScanArguments a, unsigned blocks) {
  constexpr int kLanes = 4, kStates = kEighths / kLanes * kPart;
  using Floats = Packed<float, kVec>;
  const int lane = threadIdx.x % 32, g = lane / 8, first = g * kStates;
  const std::int64_t channel =
      (static_cast<std::int64_t>(blockIdx.x % blocks) * (kThreads / kLanes) + threadIdx.x / 32 * 8 + lane % 8) * kVec;
  const bool inside = channel < a.e;
  Floats a2[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    a2[i] = {};
    if (!inside || first + i >= a.n) continue;
    a2[i] = *reinterpret_cast<const Floats*>(a.in.a + (first + i) * a.e + channel);
#pragma unroll
    for (int c = 0; c < kVec; ++c) a2[i].x[c] *= kLog2E;
  }
  wait_for_predecessors();
  release_successors();
  const std::int32_t sequence = sequence_of_single(a.batch, blockIdx.x / blocks);
  const std::int32_t slot = a.batch.slots[sequence];
  if (slot < 0) return;  // all of the block
  const std::int64_t token = a.batch.offsets[sequence];
  float* state = slot_data<float>(a.state, slot) + channel;
  const T* bc = static_cast<const T*>(a.in.bc) + token * 2 * a.n;
  Floats h[kStates];
  float b[kStates], c[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    h[i] = {};
    b[i] = c[i] = 0;
    if (first + i >= a.n) continue;
    if (inside) h[i] = *reinterpret_cast<const Floats*>(state + (first + i) * a.e);
    b[i] = to_float(bc[first + i]);
    c[i] = to_float(bc[a.n + first + i]);
  }
  Packed<T, kVec> x{}, dt{};
  if (inside) {
    x = *reinterpret_cast<const Packed<T, kVec>*>(static_cast<const T*>(a.in.x) + token * a.e + channel);
    dt = *reinterpret_cast<const Packed<T, kVec>*>(static_cast<const T*>(a.in.dt) + token * a.e + channel);
  }
  float sums[kVec];
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    const float delta = softplus<T>(to_float(dt.x[k])), dx = __fmul_rn(delta, to_float(x.x[k]));
    float part[2];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      h[i].x[k] = advanced<T>(h[i].x[k], delta, dx, a2[i].x[k], b[i]);
      float& sum = part[i / kPart];
      sum = i % kPart == 0 ? __fmul_rn(c[i], h[i].x[k]) : fmaf(c[i], h[i].x[k], sum);
    }
    sums[k] = part[0] + part[1];
  }
  if (inside) {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (first + i < a.n) *reinterpret_cast<Floats*>(state + (first + i) * a.e) = h[i];
  }
  // Lane g goes on with channel g of its kVec.
  float y;
  T x_of = x.x[0];
  if constexpr (kVec == kLanes) {
    y = transposed_sum<kLanes, 8>(sums, g);
#pragma unroll
    for (int k = 1; k < kVec; ++k)
      if (g == k) x_of = x.x[k];
  } else {
    static_assert(kVec == 1);
    y = sums[0] + __shfl_xor_sync(0xffffffffu, sums[0], 8);
    y = y + __shfl_xor_sync(0xffffffffu, y, 16);
    if (g > 0) return;
  }
  const std::int64_t mine = channel + g;
  if (!inside) return;
  const T z = static_cast<const T*>(a.in.xz)[(token * 2 + 1) * a.e + mine];
  static_cast<T*>(a.out)[token * a.e + mine] = from_float<T>(gated<T>(y, a.in.d[mine], to_float(x_of), to_float(z)));
}

// ---- many tokens ---------------------------------------------------------------------------------------------------

// A block walks the channels that it has from tile to tile of kTokens. Before a tile, its threads make Δ and Δ x of two
// channels at a time and put them, B and C into shared memory; then lane g of the kLanes of kWide channels advances the
// states n = g · kStates … (g + 1) · kStates − 1 through the tile; then the threads of the first part finish the
// outputs. The next tile's numbers are on their way to registers meanwhile.
template <int kPart, int kLanes, int kWide>
struct ScanShape {
  static constexpr int kChannels = kThreads / kLanes * kWide;
  static constexpr int kStates = kEighths / kLanes * kPart;
  static constexpr int kTokens = (kWide > 1 ? 16 : 32) / (kPart > 4 ? kPart / 4 : 1);
  static constexpr int kRowThreads = kChannels / 2;
  static constexpr int kRows = kThreads / kRowThreads;  // of a pass over a tile
  static constexpr int kPasses = kTokens / kRows;
  static constexpr int kMostN = kEighths * kPart;
  static constexpr int kBcPairs = kTokens * kMostN / kThreads;  // of a thread
  static constexpr int kBcTokens = kThreads / kMostN;           // between two pairs of a thread
  static_assert(kTokens % kRows == 0 && kTokens % 8 == 0 && kThreads % kMostN == 0 && kTokens % kBcTokens == 0);
};

/// Two numbers as they lie in memory: the compiler would take a Packed<T, 2> apart and put it together again.
template <typename T>
struct Pair {
  std::conditional_t<sizeof(T) == 2, std::uint32_t, float2> bits;

  __device__ __forceinline__ float2 floats() const {
    if constexpr (std::is_same_v<T, float>) {
      return bits;
    } else if constexpr (std::is_same_v<T, bf16>) {
      return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
    } else {
      return __half22float2(reinterpret_cast<const __half2&>(bits));
    }
  }
  static __device__ __forceinline__ Pair of(float first, float second) {
    if constexpr (std::is_same_v<T, float>) {
      return {{first, second}};
    } else {
      return {pack<T>(first, second)};
    }
  }
  /// Of a row that has `left` more, at least one; `other` for the second where there is none. kPairs: `left` is even.
  template <bool kPairs>
  static __device__ __forceinline__ Pair load(const T* from, std::int64_t left, float other) {
    if constexpr (kPairs) {
      return *reinterpret_cast<const Pair*>(from);
    } else {
      return of(to_float(from[0]), left > 1 ? to_float(from[1]) : other);
    }
  }
  template <bool kPairs>
  __device__ __forceinline__ void store(T* to, std::int64_t left) const {
    if constexpr (kPairs) {
      *reinterpret_cast<Pair*>(to) = *this;
    } else {
      to[0] = from_float<T>(floats().x);
      if (left > 1) to[1] = from_float<T>(floats().y);
    }
  }
};

template <typename T, typename Shape>
struct ScanTile {
  Pair<T> x[Shape::kPasses], z[Shape::kPasses], dt[Shape::kPasses], bc[Shape::kBcPairs];
};

// Grid: longs · `blocks` of channels.
template <typename T, int kPart, int kLanes, int kWide, bool kPairs>
__global__ void __launch_bounds__(kThreads, kPart > 2   ? 2
                                            : kWide > 1 ? 4
                                                        : 3) scan_kernel(const ScanArguments a, unsigned blocks) {
  using Shape = ScanShape<kPart, kLanes, kWide>;
  constexpr int kStates = Shape::kStates, kTokens = Shape::kTokens, kLoad = 2 * kStates < 4 ? 2 * kStates : 4;
  using Steps = Packed<float, 2 * kWide>;
  // Behind a tile there is room for what is read and not used; sums that stand for nothing are written before `ys`.
  __shared__ alignas(16) float steps[kTokens + kLanes][Shape::kChannels][2];          // Δ, Δ x
  __shared__ alignas(16) float bc[kTokens + kLanes][kEighths][2][kPart];              // B, C
  __shared__ alignas(16) float ys[kLanes + kTokens][Shape::kChannels + 32 / kLanes];  // lanes g store at distinct banks
  const int lane = threadIdx.x % 32, g = lane % kLanes;
  const std::int64_t block_channel = static_cast<std::int64_t>(blockIdx.x % blocks) * Shape::kChannels;
  const int column = static_cast<int>(threadIdx.x) / kLanes * kWide;  // of the walk
  const int pair = static_cast<int>(threadIdx.x) % Shape::kRowThreads * 2,
            row = static_cast<int>(threadIdx.x) / Shape::kRowThreads;
  const std::int64_t channel = block_channel + pair, left = a.e - channel;  // of what is before and after it
  float h[kWide][kStates], a2[kWide][kStates];
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const std::int64_t n = g * kStates + i, c = block_channel + column + w;
      a2[w][i] = n < a.n && c < a.e ? a.in.a[n * a.e + c] * kLog2E : 0.0f;
    }
  }
  float d[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) d[i] = i < left ? a.in.d[channel + i] : 0.0f;
  wait_for_predecessors();
  release_successors();
  const std::int32_t sequence = a.batch.longs[blockIdx.x / blocks];
  const std::int32_t slot = a.batch.slots[sequence];
  if (slot < 0) return;
  const std::int64_t begin = a.batch.offsets[sequence];
  const int length = static_cast<int>(a.batch.offsets[sequence + 1] - begin);
  float* const state = slot_data<float>(a.state, slot);
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const std::int64_t n = g * kStates + i, c = block_channel + column + w;
      h[w][i] = n < a.n && c < a.e ? state[n * a.e + c] : 0.0f;
    }
  }

  // Where this thread's numbers of the next tile begin. Its pairs of B or C: at n and n + 1 of every kBcTokens-th
  // token.
  const int bc_token = static_cast<int>(threadIdx.x) / Shape::kMostN;
  const int bc_at = static_cast<int>(threadIdx.x) % Shape::kMostN * 2, which = bc_at / Shape::kMostN,
            bc_n = bc_at % Shape::kMostN;
  const std::int64_t place = (begin + row) * a.e + channel;
  const T *x = static_cast<const T*>(a.in.x) + place, *dt = static_cast<const T*>(a.in.dt) + place;
  const T* z = static_cast<const T*>(a.in.xz) + ((begin + row) * 2 + 1) * a.e + channel;
  const T* bc_from = static_cast<const T*>(a.in.bc) + ((begin + bc_token) * 2 + which) * a.n + bc_n;
  T* out = static_cast<T*>(a.out) + place;
  // Behind the last token Δ = softplus(−∞) = 0 and x = −0: h ← 1 · h + (−0) · 0 changes no bit.
  const Pair<T> no_x = Pair<T>::of(-0.0f, -0.0f), no_dt = Pair<T>::of(-INFINITY, -INFINITY), zeros = Pair<T>::of(0, 0);
  const auto load = [&](int count) {
    ScanTile<T, Shape> tile;
#pragma unroll
    for (int p = 0; p < Shape::kPasses; ++p) {
      const bool valid = p * Shape::kRows + row < count && left > 0;
      const std::int64_t at = p * Shape::kRows * a.e;
      tile.x[p] = valid ? Pair<T>::template load<kPairs>(x + at, left, -0.0f) : no_x;
      tile.dt[p] = valid ? Pair<T>::template load<kPairs>(dt + at, left, -INFINITY) : no_dt;
      tile.z[p] = valid ? Pair<T>::template load<kPairs>(z + 2 * at, left, 0.0f) : zeros;
    }
#pragma unroll
    for (int i = 0; i < Shape::kBcPairs; ++i)
      tile.bc[i] = i * Shape::kBcTokens + bc_token < count && bc_n < a.n
                       ? Pair<T>::template load<kPairs>(bc_from + i * Shape::kBcTokens * 2 * a.n, a.n - bc_n, 0.0f)
                       : zeros;
    x += kTokens * a.e;
    dt += kTokens * a.e;
    z += kTokens * 2 * a.e;
    bc_from += kTokens * 2 * a.n;
    return tile;
  };

  // The walk through a tile, kLanes tokens at a time.
  struct Operands {
    Steps steps[kLanes];
    float bc[kLanes][2 * kStates];  // B, C of a chain, of the next one
  };
  const auto read = [&](int t) {
    Operands operands;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      operands.steps[k] = *reinterpret_cast<const Steps*>(steps[t + k][column]);
#pragma unroll
      for (int i = 0; i < 2 * kStates; i += kLoad) {
        const auto some = *reinterpret_cast<const Packed<float, kLoad>*>(&bc[t + k][0][0][0] + g * 2 * kStates + i);
#pragma unroll
        for (int j = 0; j < kLoad; ++j) operands.bc[k][i + j] = some.x[j];
      }
    }
    return operands;
  };
  const auto advance = [&](const Operands& operands, float (&sums)[kWide][kLanes]) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        float part[kStates / kPart];
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const int chain = i / kPart, at = chain * 2 * kPart + i % kPart;
          const float b = operands.bc[k][at], c = operands.bc[k][at + kPart];
          h[w][i] = advanced<T>(h[w][i], operands.steps[k].x[2 * w], operands.steps[k].x[2 * w + 1], a2[w][i], b);
          part[chain] = i % kPart == 0 ? __fmul_rn(c, h[w][i]) : fmaf(c, h[w][i], part[chain]);
        }
        sums[w][k] = kStates / kPart == 2 ? part[0] + part[kStates / kPart - 1] : part[0];
      }
    }
  };
  const auto finish = [&](float (&sums)[kWide][kLanes], int t) {
#pragma unroll
    for (int w = 0; w < kWide; ++w) ys[kLanes + t + g][column + w] = transposed_sum<kLanes, 1>(sums[w], g);
  };

  ScanTile<T, Shape> next = load(length);
  for (int count = length; count > 0; count -= kTokens) {
    const ScanTile<T, Shape> tile = next;
#pragma unroll
    for (int p = 0; p < Shape::kPasses; ++p) {
      const float2 of_x = tile.x[p].floats(), of_dt = tile.dt[p].floats();
      const float first = softplus<T>(of_dt.x), second = softplus<T>(of_dt.y);
      *reinterpret_cast<float4*>(steps[p * Shape::kRows + row][pair]) = {first, __fmul_rn(first, of_x.x), second,
                                                                         __fmul_rn(second, of_x.y)};
    }
#pragma unroll
    for (int i = 0; i < Shape::kBcPairs; ++i) {
      const float2 both = tile.bc[i].floats();
      float (&of_token)[kEighths][2][kPart] = bc[i * Shape::kBcTokens + bc_token];
      of_token[bc_n / kPart][which][bc_n % kPart] = both.x;
      of_token[(bc_n + 1) / kPart][which][(bc_n + 1) % kPart] = both.y;
    }
    __syncthreads();
    next = load(count - kTokens);
    const int in_tile = min(count, kTokens);
    if constexpr (kWide > 1 || kPart > 4) {  // other warps, or states, fill the wait
#pragma unroll 1
      for (int t = 0; t < in_tile; t += kLanes) {
        float sums[kWide][kLanes];
        advance(read(t), sums);
        finish(sums, t);
      }
    } else {  // few warps: the next tokens are read, and the last ones summed up, between exponentials
      Operands now = read(0);
      float sums[kWide][kLanes]{};
      int t = 0;
#pragma unroll 2
      for (; t < in_tile; t += kLanes) {
        const Operands then = read(t + kLanes);
        float last[kWide][kLanes];
#pragma unroll
        for (int k = 0; k < kLanes; ++k) last[0][k] = sums[0][k];
        advance(now, sums);
        finish(last, t - kLanes);
        now = then;
      }
      finish(sums, t - kLanes);
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < Shape::kPasses; ++p) {
      const int t = p * Shape::kRows + row;
      const auto y = *reinterpret_cast<const float2*>(&ys[kLanes + t][pair]);
      const float2 of_x = tile.x[p].floats(), of_z = tile.z[p].floats();
      const float first = gated<T>(y.x, d[0], of_x.x, of_z.x), second = gated<T>(y.y, d[1], of_x.y, of_z.y);
      if (t < in_tile && left > 0)
        Pair<T>::of(first, second).template store<kPairs>(out + p * Shape::kRows * a.e, left);
    }
    out += kTokens * a.e;
  }
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const std::int64_t n = g * kStates + i, c = block_channel + column + w;
      if (n < a.n && c < a.e) state[n * a.e + c] = h[w][i];
    }
  }
}

// ---- any number of states ------------------------------------------------------------------------------------------

// Grid: sequences · `blocks` of kThreads channels, singles first. A thread walks a channel, whose state stays in
// memory.
template <typename T>
__global__ void __launch_bounds__(kThreads) scan_any_kernel(const ScanArguments a, unsigned blocks) {
  wait_for_predecessors();
  release_successors();
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (c >= a.e) return;
  const unsigned index = blockIdx.x / blocks, num_singles = static_cast<unsigned>(a.batch.num_singles);
  const std::int32_t sequence =
      index < num_singles ? sequence_of_single(a.batch, index) : a.batch.longs[index - num_singles];
  if (a.batch.slots[sequence] < 0) return;
  float* state = slot_data<float>(a.state, a.batch.slots[sequence]) + c;
  for (std::int64_t token = a.batch.offsets[sequence]; token < a.batch.offsets[sequence + 1]; ++token) {
    const T* bc = static_cast<const T*>(a.in.bc) + token * 2 * a.n;
    const T x = static_cast<const T*>(a.in.x)[token * a.e + c];
    const float delta = softplus<T>(to_float(static_cast<const T*>(a.in.dt)[token * a.e + c]));
    const float dx = __fmul_rn(delta, to_float(x));
    float y = 0;
    for (std::int64_t n = 0; n < a.n; ++n) {
      const float h = advanced<T>(state[n * a.e], delta, dx, a.in.a[n * a.e + c] * kLog2E, to_float(bc[n]));
      state[n * a.e] = h;
      y = fmaf(to_float(bc[a.n + n]), h, y);
    }
    const T z = static_cast<const T*>(a.in.xz)[(token * 2 + 1) * a.e + c];
    static_cast<T*>(a.out)[token * a.e + c] = from_float<T>(gated<T>(y, a.in.d[c], to_float(x), to_float(z)));
  }
}

// ---- launching -----------------------------------------------------------------------------------------------------

/// `kernel` on blocks of `channels` channels of each of so many sequences.
void launch_blocks(cudaStream_t stream, void (*kernel)(ScanArguments, unsigned), const ScanArguments& a, int sequences,
                   int channels) {
  const unsigned blocks = blocks_for(a.e, channels);
  launch(stream, "selective_scan", kernel, dim3(blocks * static_cast<unsigned>(sequences)), kThreads, 0, a, blocks);
}

template <typename T, int kPart>
void launch_singles(cudaStream_t stream, const ScanArguments& a) {
  if constexpr (kPart <= kVectorPart) {
    if (a.e % 4 == 0 && is_aligned(a.in.a, 16) && is_aligned(a.state.data, 16) && a.state.slot_stride % 16 == 0 &&
        is_aligned(a.in.x, 4 * sizeof(T)) && is_aligned(a.in.dt, 4 * sizeof(T)))
      return launch_blocks(stream, scan_single_kernel<T, kPart, 4>, a, a.batch.num_singles, kThreads);
  }
  launch_blocks(stream, scan_single_kernel<T, kPart, 1>, a, a.batch.num_singles, kThreads / 4);
}

template <typename T, int kPart, int kLanes, int kWide, bool kPairs>
void launch_walk(cudaStream_t stream, const ScanArguments& a) {
  launch_blocks(stream, scan_kernel<T, kPart, kLanes, kWide, kPairs>, a, a.batch.num_longs,
                ScanShape<kPart, kLanes, kWide>::kChannels);
}

/// Two channels of a lane share B and C, and twice the lanes of a channel fill a card that has few sequences: all make
/// the same bits.
template <typename T, int kPart>
void launch_longs(cudaStream_t stream, const ScanArguments& a) {
  constexpr std::size_t kPair = 2 * sizeof(T);
  if (a.e % 2 != 0 || a.n % 2 != 0 || !is_aligned(a.in.x, kPair) || !is_aligned(a.in.dt, kPair) ||
      !is_aligned(a.in.xz, kPair) || !is_aligned(a.in.bc, kPair) || !is_aligned(a.out, kPair))
    return launch_walk<T, kPart, 4, 1, false>(stream, a);
  if constexpr (kPart <= 4) {
    const std::int64_t sms = device_info().num_sms, channels = a.e * a.batch.num_longs;
    if (channels >= 2 * sms * ScanShape<kPart, 4, 2>::kChannels) return launch_walk<T, kPart, 4, 2, true>(stream, a);
    if (4 * channels < 3 * sms * ScanShape<kPart, 4, 1>::kChannels) return launch_walk<T, kPart, 8, 1, true>(stream, a);
  }
  launch_walk<T, kPart, 4, 1, true>(stream, a);
}

}  // namespace

void selective_scan(cudaStream_t stream, const SelectiveScanConfig& config, DType dtype, const ScanInputs& in,
                    const DeviceBatch& batch, StateView state, void* out) {
  for_dtype(dtype, [&]<typename T>(T) {
    const ScanArguments a{in, config.inner_size, config.state_size, batch, state, out};
    const auto run = [&]<int kPart>(std::integral_constant<int, kPart>) {
      launch_singles<T, kPart>(stream, a);
      launch_longs<T, kPart>(stream, a);
    };
    if (a.n <= kEighths) return run(std::integral_constant<int, 1>{});
    if (a.n <= 2 * kEighths) return run(std::integral_constant<int, 2>{});
    if (a.n <= 4 * kEighths) return run(std::integral_constant<int, 4>{});
    if (a.n <= kMostPart * kEighths) return run(std::integral_constant<int, kMostPart>{});
    launch_blocks(stream, scan_any_kernel<T>, a, batch.num_singles + batch.num_longs, kThreads);
  });
}

}  // namespace based::cuda
