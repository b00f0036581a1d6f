#include "kernels/common.cuh"

namespace based::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChannels = 4;    // of a thread of the vector kernels
constexpr int kMaxTaps = 4;     // of the vector kernels
constexpr int kRunTokens = 16;  // of a thread, of a long sequence
constexpr int kLoadTokens = 4;  // loaded before the first is used
static_assert(kTileTokens % kRunTokens == 0 && kRunTokens % kLoadTokens == 0 && kRunTokens >= kMaxTaps);

// The gated convolution is SiLU(conv(u₁)) ⊙ u₂, the others are SiLU(conv(u₁) + bias): u₂ is not read (kGated).
struct ConvArguments {
  const float* taps;  // (e, K)
  const float* bias;  // (e) or null
  std::int64_t e;
  std::int64_t u_row;  // columns of u: [u₁ | u₂ | …]
  int num_taps;        // K
  DeviceBatch batch;
  StateView state;
  const void* u;  // (N, u_row)
  void* out;      // (N, e)

  template <typename T>
  __device__ T* state_of(std::int32_t sequence) const {
    return slot_data<T>(state, batch.slots[sequence]);
  }
};

using Floats = Packed<float, kChannels>;

template <typename T>
__device__ __forceinline__ Floats load_floats(const T* from) {
  const auto x = *reinterpret_cast<const Packed<T, kChannels>*>(from);
  Floats y;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) y.x[i] = to_float(x.x[i]);
  return y;
}

// What was loaded as T is stored as it was.
template <typename T>
__device__ __forceinline__ void store_floats(T* to, const Floats& x) {
  Packed<T, kChannels> y;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) y.x[i] = from_float<T>(x.x[i]);
  *reinterpret_cast<Packed<T, kChannels>*>(to) = y;
}

// Taps and the window of kChannels channels: K ≤ kMaxTaps taps are padded in front with zeros, so that row j of the
// window always stands kMaxTaps − 1 − j tokens back.
template <bool kGated>
struct Window {
  float taps[kMaxTaps][kChannels];
  Floats bias;
  Floats u[kMaxTaps];

  __device__ void load_taps(const ConvArguments& a, std::int64_t channel) {
    const float* from = a.taps + channel * a.num_taps;
    const int num_taps = a.num_taps;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) bias.x[i] = kGated || a.bias == nullptr ? 0.0f : a.bias[channel + i];
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      const int tap = j - (kMaxTaps - num_taps);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) taps[j][i] = tap >= 0 ? from[i * num_taps + tap] : 0.0f;
      u[j] = {};
    }
  }

  // out of the newest token; then makes room for the next.
  template <typename T>
  __device__ void write(const Packed<T, kChannels>& u2, T* out) {
    Packed<T, kChannels> y;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      float sum = bias.x[i];
#pragma unroll
      for (int j = 0; j < kMaxTaps; ++j) sum += taps[j][i] * u[j].x[i];
      y.x[i] = from_float<T>(kGated ? silu<T>(sum) * to_float(u2.x[i]) : silu<T>(sum));
    }
    *reinterpret_cast<Packed<T, kChannels>*>(out) = y;
#pragma unroll
    for (int j = 0; j + 1 < kMaxTaps; ++j) u[j] = u[j + 1];
  }
};

// Grid (singles, channels / (kThreads · kChannels)): one pass over state, u and out.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) conv_single_kernel(const ConvArguments a) {
  const std::int64_t channel = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kChannels;
  Window<kGated> window;
  if (channel < a.e) window.load_taps(a, channel);
  wait_for_predecessors();
  release_successors();
  if (channel >= a.e) return;
  const std::int32_t sequence = sequence_of_single(a.batch, blockIdx.x);
  if (a.batch.slots[sequence] < 0) return;
  const std::int64_t token = a.batch.offsets[sequence];
  const T* u = static_cast<const T*>(a.u) + token * a.u_row + channel;
  T* state = a.state_of<T>(sequence) + channel;
  Packed<T, kChannels> u2{};
  if constexpr (kGated) u2 = *reinterpret_cast<const Packed<T, kChannels>*>(u + a.e);
  window.u[kMaxTaps - 1] = load_floats(u);
#pragma unroll
  for (int j = 0; j + 1 < kMaxTaps; ++j) {
    const int row = j - (kMaxTaps - a.num_taps);
    if (row >= 0) window.u[j] = load_floats(state + row * a.e);
  }
  window.write(u2, static_cast<T*>(a.out) + token * a.e + channel);
#pragma unroll
  for (int j = 0; j + 1 < kMaxTaps; ++j) {
    const int row = j - (kMaxTaps - a.num_taps);
    if (row >= 0) store_floats(state + row * a.e, window.u[j]);
  }
}

// Grid (tiles · runs of a tile, channels / (kThreads · kChannels)). u₁ stays in registers from token to token; only the
// K − 1 tokens before a run are read again. Leaves the state alone: other blocks may still read it.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) conv_tile_kernel(const ConvArguments a) {
  constexpr int kRuns = kTileTokens / kRunTokens;
  const std::int64_t channel = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kChannels;
  Window<kGated> window;
  if (channel < a.e) window.load_taps(a, channel);
  wait_for_predecessors();
  release_successors();
  if (channel >= a.e) return;
  const Tile tile = a.batch.tiles[blockIdx.x / kRuns];
  const int begin = static_cast<int>(blockIdx.x % kRuns) * kRunTokens;
  const int count = min(kRunTokens, tile.count - begin);
  if (count <= 0 || a.batch.slots[tile.sequence] < 0) return;
  const std::int64_t token = tile.first + begin;
  const std::int64_t seen = token - a.batch.offsets[tile.sequence];  // tokens of the sequence before, in this call
  const T* u = static_cast<const T*>(a.u) + token * a.u_row + channel;
  T* out = static_cast<T*>(a.out) + token * a.e + channel;
#pragma unroll
  for (int j = 0; j + 1 < kMaxTaps; ++j) {
    const int row = j - (kMaxTaps - a.num_taps), back = kMaxTaps - 1 - j;
    if (row < 0) continue;
    if (back <= seen) {
      window.u[j] = load_floats(u - back * a.u_row);
    } else {  // row K − 1 stands at the call's first token
      window.u[j] = load_floats(a.state_of<T>(tile.sequence) + (row + seen) * a.e + channel);
    }
  }
  for (int t = 0; t < count; t += kLoadTokens) {
    Packed<T, kChannels> u1[kLoadTokens], u2[kLoadTokens]{};
#pragma unroll
    for (int i = 0; i < kLoadTokens; ++i) {
      if (t + i >= count) break;
      u1[i] = *reinterpret_cast<const Packed<T, kChannels>*>(u + (t + i) * a.u_row);
      if constexpr (kGated) u2[i] = *reinterpret_cast<const Packed<T, kChannels>*>(u + (t + i) * a.u_row + a.e);
    }
#pragma unroll
    for (int i = 0; i < kLoadTokens; ++i) {
      if (t + i >= count) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) window.u[kMaxTaps - 1].x[c] = to_float(u1[i].x[c]);
      window.write(u2[i], out + (t + i) * a.e);
    }
  }
}

// u₁ of a channel, `index` tokens behind the call's first one; negative: from the state.
template <typename T>
__device__ __forceinline__ T past(const ConvArguments& a, const T* u, const T* state, std::int64_t index) {
  return index >= 0 ? u[index * a.u_row] : state[(a.num_taps - 1 + index) * a.e];
}

// Any K, e and alignment: a thread per channel of a run of tokens. Grid x: singles, then runs of tiles; a sequence's
// last rows are left to conv_state_kernel.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) conv_any_kernel(const ConvArguments a) {
  constexpr int kRuns = kTileTokens / kRunTokens;
  wait_for_predecessors();
  release_successors();
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (channel >= a.e) return;
  Tile run;
  if (static_cast<int>(blockIdx.x) < a.batch.num_singles) {
    run.sequence = sequence_of_single(a.batch, blockIdx.x);
    run.first = a.batch.offsets[run.sequence];
    run.count = 1;
  } else {
    const unsigned index = blockIdx.x - static_cast<unsigned>(a.batch.num_singles);
    const int begin = static_cast<int>(index % kRuns) * kRunTokens;
    run = a.batch.tiles[index / kRuns];
    run.first += begin;
    run.count = min(kRunTokens, run.count - begin);
  }
  if (a.batch.slots[run.sequence] < 0) return;
  const std::int64_t offset = a.batch.offsets[run.sequence];
  const T* u = static_cast<const T*>(a.u) + offset * a.u_row + channel;
  const T* state = a.state_of<T>(run.sequence) + channel;
  const float* taps = a.taps + channel * a.num_taps;
  for (std::int64_t token = run.first; token < static_cast<std::int64_t>(run.first) + run.count; ++token) {
    float sum = a.bias == nullptr ? 0.0f : a.bias[channel];
    for (int j = 0; j < a.num_taps; ++j)
      sum += taps[j] * to_float(past(a, u, state, token - offset - a.num_taps + 1 + j));
    float y = silu<T>(sum);
    if constexpr (kGated) y *= to_float(u[(token - offset) * a.u_row + a.e]);
    static_cast<T*>(a.out)[token * a.e + channel] = from_float<T>(y);
  }
}

// State = the last K − 1 values of u₁, oldest first; a sequence of fewer tokens moves the older ones up: row i comes
// from a row behind it, so the thread of a channel goes upwards. Grid x: singles (when `singles`), then longs.
template <typename T>
__global__ void __launch_bounds__(kThreads) conv_state_kernel(const ConvArguments a) {
  wait_for_predecessors();
  release_successors();
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (channel >= a.e) return;
  const int num_singles = a.batch.num_singles;
  const std::int32_t sequence = static_cast<int>(blockIdx.x) < num_singles
                                    ? sequence_of_single(a.batch, blockIdx.x)
                                    : a.batch.longs[static_cast<int>(blockIdx.x) - num_singles];
  if (a.batch.slots[sequence] < 0) return;
  const std::int64_t offset = a.batch.offsets[sequence], length = a.batch.offsets[sequence + 1] - offset;
  const T* u = static_cast<const T*>(a.u) + offset * a.u_row + channel;
  T* state = a.state_of<T>(sequence) + channel;
  for (int i = 0; i + 1 < a.num_taps; ++i) state[i * a.e] = past<T>(a, u, state, length - a.num_taps + 1 + i);
}

template <bool kGated>
void convolve(cudaStream_t stream, const char* name, DType dtype, ConvArguments a) {
  const std::int64_t e = a.e;
  for_dtype(dtype, [&]<typename T>(T) {
    constexpr unsigned kRuns = kTileTokens / kRunTokens;
    const unsigned num_singles = static_cast<unsigned>(a.batch.num_singles);
    const unsigned num_runs = static_cast<unsigned>(a.batch.num_tiles) * kRuns;
    const unsigned num_longs = static_cast<unsigned>(a.batch.num_longs), by_channel = blocks_for(e, kThreads);
    constexpr std::size_t kBytes = kChannels * sizeof(T);
    if (a.num_taps <= kMaxTaps && (e | a.u_row) % kChannels == 0 && is_aligned(a.u, kBytes) &&
        is_aligned(a.out, kBytes) && is_aligned(a.state.data, 16) && a.state.slot_stride % 16 == 0) {
      const unsigned by_vector = blocks_for(e, kThreads * kChannels);
      launch(stream, name, conv_single_kernel<T, kGated>, dim3(num_singles, by_vector), kThreads, 0, a);
      launch(stream, name, conv_tile_kernel<T, kGated>, dim3(num_runs, by_vector), kThreads, 0, a);
      a.batch.num_singles = 0;
    } else {
      launch(stream, name, conv_any_kernel<T, kGated>, dim3(num_singles + num_runs, by_channel), kThreads, 0, a);
    }
    if (a.num_taps > 1)
      launch(stream, name, conv_state_kernel<T>,
             dim3(static_cast<unsigned>(a.batch.num_singles) + num_longs, by_channel), kThreads, 0, a);
  });
}

}  // namespace

void gated_conv(cudaStream_t stream, const GatedConvConfig& config, DType dtype, const float* taps,
                const DeviceBatch& batch, const void* u, StateView state, void* out) {
  convolve<true>(stream, "gated_conv", dtype,
                 {taps, nullptr, config.inner_size, 2 * config.inner_size, static_cast<int>(config.kernel_size), batch,
                  state, u, out});
}

void scan_conv(cudaStream_t stream, const SelectiveScanConfig& config, DType dtype, const float* taps,
               const float* bias, const DeviceBatch& batch, const void* xz, StateView state, void* x) {
  convolve<false>(stream, "scan_conv", dtype,
                  {taps, bias, config.inner_size, 2 * config.inner_size, static_cast<int>(config.kernel_size), batch,
                   state, xz, x});
}

void delta_conv(cudaStream_t stream, const GatedDeltaNetConfig& config, DType dtype, const float* taps,
                const DeviceBatch& batch, const void* u, std::int64_t u_row, StateView state, void* qkv) {
  convolve<false>(
      stream, "gated_delta_net", dtype,
      {taps, nullptr, config.channels(), u_row, static_cast<int>(config.kernel_size), batch, state, u, qkv});
}

}  // namespace based::cuda
