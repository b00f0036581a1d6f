// Choosing tokens: one block per sequence. A pass over the row of logits costs its bytes; greedy needs one, drawing
// with a temperature two (statistics, weights by span) and a look at one span, top_k and top_p about four more each.
// Rows pay for what their parameters use, decided in the kernel, so that one recorded launch serves any parameters.

#include "kernels/sampling.h"

#include <cfloat>
#include <climits>

#include "kernels/common.cuh"

namespace based::cuda {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = 32 * kWarps;
constexpr int kVectors = 4;  // of 4 logits, loaded ahead by each thread
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr float kBinsPerOctave = 46;  // of weight: a weight of 2^−kWeightBits still has a bin of its own
constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_huge_valf();
static_assert(kBinsPerThread == 2 && kBinsPerOctave * (kWeightBits + 2) < kBins);

using u32 = std::uint32_t;
using u64 = unsigned long long;

static_assert(sizeof(SamplerRow) % 4 == 0 && sizeof(SamplerRow) / 4 <= kThreads);

struct Shared {
  alignas(SamplerRow) u32 row[sizeof(SamplerRow) / 4];  // as bytes: shared memory cannot be initialised
  float warp_max[kWarps], warp_sum[kWarps];
  int warp_first[kWarps];
  u64 warp_total[kWarps];
  u32 low[kBins], high[kBins];  // words of the bins' sums; or ids and logits of the likeliest tokens
  u64 found_before, found_sum;
  int found, count;
};
__shared__ Shared shared;

__device__ __forceinline__ const SamplerRow& this_row() { return *reinterpret_cast<const SamplerRow*>(shared.row); }

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// ---- a row ---------------------------------------------------------------------------------------------------------

struct Row {
  const float* x;
  int size;
  bool aligned;  // to 16 bytes
};

__device__ __forceinline__ Row make_row(const float* x, int size) {
  return {x, size, reinterpret_cast<std::uintptr_t>(x) % 16 == 0};
}

// Warp w owns the w-th span of this many tokens.
__device__ __forceinline__ int span_of(int size) { return (size + kThreads * 4 - 1) / (kThreads * 4) * 128; }

// f(logits i … i + 3, i) for this thread's part of the row, i rising; NaN beyond the row's end.
template <typename F>
__device__ __forceinline__ void for_each_vector(const Row& row, F&& f) {
  const int span = span_of(row.size), begin = warp() * span, end = min(begin + span, row.size);
  for (int base = begin; base < end; base += kVectors * 128) {
    float4 v[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = base + j * 128 + lane() * 4;
      if (row.aligned && i + 4 <= end) {
        v[j] = *reinterpret_cast<const float4*>(row.x + i);
      } else {
        const float none = __int_as_float(0x7fffffff);
        v[j].x = i < end ? row.x[i] : none;
        v[j].y = i + 1 < end ? row.x[i + 1] : none;
        v[j].z = i + 2 < end ? row.x[i + 2] : none;
        v[j].w = i + 3 < end ? row.x[i + 3] : none;
      }
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (base + j * 128 < end) f(v[j], base + j * 128 + lane() * 4);
  }
}

template <typename F>
__device__ __forceinline__ void for_each(const Row& row, F&& f) {
  for_each_vector(row, [&](const float4& v, int i) {
    f(v.x, i);
    f(v.y, i + 1);
    f(v.z, i + 2);
    f(v.w, i + 3);
  });
}

__device__ __forceinline__ float exp2_approximate(float x) {  // 2 units in the last place; 0 for −∞
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// +∞ made finite; NaN stays.
__device__ __forceinline__ float finite(float x) { return x > FLT_MAX ? FLT_MAX : x; }

// ---- statistics ----------------------------------------------------------------------------------------------------

// NaN counts as −∞, +∞ as the largest float.
struct Stats {
  float max, sum;  // Σ e^(x − max)
  int first;       // lowest id of max; −1 when no logit is above −∞
};

__device__ __noinline__ Stats statistics(const Row& row) {
  const auto logit = [](float x) { return fminf(fmaxf(x, -kInfinity), FLT_MAX); };
  float max = -kInfinity, base = 0, sum = 0;  // Σ 2^((x − base) log₂e), base = max once that is finite
  float4 best{};                              // where max stood first
  int best_at = -1;
  for_each_vector(row, [&](const float4& raw, int i) {
    const float4 v{logit(raw.x), logit(raw.y), logit(raw.z), logit(raw.w)};
    const float highest = fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
    if (highest > max) {
      sum *= exp2_approximate((max - highest) * kLog2E);
      max = base = highest;
      best = v;
      best_at = i;
    }
    sum += (exp2_approximate((v.x - base) * kLog2E) + exp2_approximate((v.y - base) * kLog2E)) +
           (exp2_approximate((v.z - base) * kLog2E) + exp2_approximate((v.w - base) * kLog2E));
  });
  const int first = best_at < 0 ? INT_MAX : best_at + (best.x == max ? 0 : best.y == max ? 1 : best.z == max ? 2 : 3);

  // Of a warp, then, by every warp, of all warps. −FLT_MAX in place of −∞ keeps −∞ − −∞ away.
  const auto combine = [](float& m, float& s, int& f) {
    const float top = warp_max(m);
    s = warp_sum(s * exp2_approximate((m - fmaxf(top, -FLT_MAX)) * kLog2E));
    f = __reduce_min_sync(0xffffffffu, m == top ? f : INT_MAX);
    m = top;
  };
  int at = first;
  combine(max, sum, at);
  __syncthreads();
  if (lane() == 0) {
    shared.warp_max[warp()] = max;
    shared.warp_sum[warp()] = sum;
    shared.warp_first[warp()] = at;
  }
  __syncthreads();
  max = shared.warp_max[lane()];
  sum = shared.warp_sum[lane()];
  at = shared.warp_first[lane()];
  combine(max, sum, at);
  return {max, sum, at == INT_MAX ? -1 : at};
}

__device__ __forceinline__ float log_softmax(float logit, float max, double log_sum) {
  return static_cast<float>(static_cast<double>(finite(logit)) - static_cast<double>(max) - log_sum);
}

// ---- sums over the block -------------------------------------------------------------------------------------------

__device__ __forceinline__ u64 warp_inclusive_sum(u64 x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 below = __shfl_up_sync(0xffffffffu, x, step);
    if (lane() >= step) x += below;
  }
  return x;
}

// Sum of x over the threads before this one; the sum over all in `total`.
__device__ __forceinline__ u64 block_exclusive_sum(u64 x, u64& total) {
  const u64 inclusive = warp_inclusive_sum(x);
  __syncthreads();
  if (lane() == 31) shared.warp_total[warp()] = inclusive;
  __syncthreads();
  const u64 warps = warp_inclusive_sum(shared.warp_total[lane()]);
  total = __shfl_sync(0xffffffffu, warps, 31);
  const u64 before = __shfl_sync(0xffffffffu, warps, (warp() + 31) % 32);
  return (warp() == 0 ? 0 : before) + inclusive - x;
}

// ---- the tokens that take part
// ---------------------------------------------------------------------------------------

// A place in the order by falling logit, then rising id: right behind (logit, id).
struct Cut {
  float logit;
  int id;
  __device__ bool is_behind(float x, int i) const { return x > logit || (x == logit && i <= id); }
};

enum class Measure { count, weight, equal };

// The tokens between two cuts. Logits given to its functions are finite() ones.
struct Selection {
  float max;
  float scale;  // of base 2: weight = 2^((x − max) · scale)
  float least_weight = 0;
  Cut first{kInfinity, -1};
  Cut last{-kInfinity, INT_MAX};
  float equal = 0;

  // Measure::count: 1. Measure::weight: the weight in units of 2^−kWeightBits, 0 below least_weight.
  // Measure::equal: 1 for logits of value `equal`. 0 for tokens outside and NaN.
  __device__ __forceinline__ u64 measure(Measure what, float x, int i) const {
    if (!last.is_behind(x, i) || first.is_behind(x, i)) return 0;
    if (what == Measure::count) return 1;
    if (what == Measure::equal) return x == equal ? 1 : 0;
    return weight(x);
  }
  __device__ __forceinline__ u64 weight(float x) const {
    const float octaves = (x - max) * scale;
    if (!(octaves > -(kWeightBits + 1.0f))) return 0;  // NaN: −∞ and a scale of 0
    const float w = exp2_approximate(octaves);
    const u32 bits = __float_as_uint(w);
    if (w < least_weight) return 0;
    return static_cast<u64>((bits & 0x7fffffu) | 0x800000u) << (kWeightBits - 23) >> (127 - (bits >> 23));
  }
  __device__ __forceinline__ int bin(float x, float bins_per_unit) const {
    return static_cast<int>(fminf((max - x) * bins_per_unit, kBins - 1));
  }
};

// The id of the token at which the running sum of a measure, by rising id, passes `aim`; Measure::weight: passes
// aim / 2⁶⁴ of the total. There must be one.
__device__ __noinline__ int locate(const Row& row, const Selection& selection, Measure what, u64 aim) {
  const Selection s = selection;
  u64 sum = 0, total;
  for_each(row, [&](float x, int i) { sum += s.measure(what, finite(x), i); });
  u64 before = block_exclusive_sum(sum, total);
  if (what == Measure::weight) aim = __umul64hi(aim, total);
  const u64 span_before = __shfl_sync(0xffffffffu, before, 0);
  const u64 span_after = __shfl_sync(0xffffffffu, before + sum, 31);
  if (lane() == 0 && span_before <= aim && aim < span_after) {
    shared.found = warp();
    shared.found_before = span_before;
  }
  __syncthreads();
  aim -= shared.found_before;

  const int span = span_of(row.size), per_thread = (span + kThreads - 1) / kThreads;
  const int span_begin = shared.found * span, span_end = min(span_begin + span, row.size);
  const int begin = span_begin + static_cast<int>(threadIdx.x) * per_thread, end = min(begin + per_thread, span_end);
  sum = 0;
  for (int i = begin; i < end; ++i) sum += s.measure(what, finite(row.x[i]), i);
  before = block_exclusive_sum(sum, total);
  if (before <= aim && aim < before + sum) {
    int i = begin;
    while (aim >= (before += s.measure(what, finite(row.x[i]), i))) ++i;
    shared.count = i;
  }
  __syncthreads();
  const int id = shared.count;
  __syncthreads();
  return id;
}

// ---- cuts ----------------------------------------------------------------------------------------------------------

// Rises with x; of +0 for −0.
__device__ __forceinline__ u32 key_of(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// shared.{high, low}[bin] += x, whatever the order.
__device__ __forceinline__ void add_to_bin(u32 bin, u64 x) {
  const u32 low = static_cast<u32>(x), old = atomicAdd(&shared.low[bin], low);
  const u32 high = static_cast<u32>(x >> 32) + (old + low < old ? 1u : 0u);
  if (high > 0) atomicAdd(&shared.high[bin], high);
}

// Moves selection.last up so that the fewest tokens stay that have `share` of the total weight, or, for
// Measure::count, so that `count` tokens stay; nothing moves when that takes all.
// First into bins of equal width in the logit, down from the maximum, then the bin that the cut falls into by the
// digits of the keys, which tell any two logits apart.
__device__ __noinline__ void cut(const Row& row, Selection& selection, Measure what, double share, u64 count) {
  const Selection s = selection;
  const float bins_per_unit = s.scale * kBinsPerOctave;
  int bin = -1;
  u32 low = 0, high = 0;  // keys that the cut lies among
  int shift = 0;
  u64 goal = 0;  // measure to keep of the tokens in the bins not yet decided
  do {
    shift = max(0, 32 - __clz(static_cast<int>(high - low)) - kBinBits);
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      shared.low[threadIdx.x * kBinsPerThread + j] = 0;
      shared.high[threadIdx.x * kBinsPerThread + j] = 0;
    }
    __syncthreads();
    for_each(row, [&](float raw, int i) {
      const float x = finite(raw);
      u32 digit;
      if (bin < 0) {
        digit = static_cast<u32>(s.bin(x, bins_per_unit));
      } else {
        const u32 below = high - key_of(x);
        if (s.bin(x, bins_per_unit) != bin || below > high - low) return;
        digit = below >> shift;
      }
      const u64 m = s.measure(what, x, i);
      if (m > 0) add_to_bin(digit, m);
    });
    __syncthreads();
    u64 sums[kBinsPerThread], total;
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      const u32 at = threadIdx.x * kBinsPerThread + j;
      sums[j] = static_cast<u64>(shared.high[at]) << 32 | shared.low[at];
    }
    const u64 before = block_exclusive_sum(sums[0] + sums[1], total);
    if (bin < 0) {
      goal = what == Measure::weight ? max(u64{1}, static_cast<u64>(ceil(share * static_cast<double>(total)))) : count;
      if (goal >= total) return;
    }
    if (before < goal && goal <= before + sums[0] + sums[1]) {
      const int second = goal > before + sums[0] ? 1 : 0;
      shared.found = static_cast<int>(threadIdx.x) * kBinsPerThread + second;
      shared.found_before = before + (second ? sums[0] : 0);
      shared.found_sum = sums[second];
    }
    __syncthreads();
    const int found = shared.found;
    goal -= shared.found_before;
    if (bin < 0) {
      bin = found;
      // Its logits, by a little more than rounding in s.bin() can amount to.
      const double width = 1.0 / static_cast<double>(bins_per_unit), slack = 1e-6;
      high = key_of(bin == 0 ? s.max : __double2float_ru(s.max - bin * width * (1 - slack)));
      low = key_of(bin == kBins - 1 || bins_per_unit == 0 ? -kInfinity
                                                          : __double2float_rd(s.max - (bin + 1) * width * (1 + slack)));
      shift = 1;
    } else {
      high -= static_cast<u32>(found) << shift;
      low = high - min((1u << shift) - 1, high - low);
    }
  } while (shift > 0);

  const float logit = logit_of(high);
  const u64 each = what == Measure::weight ? s.weight(logit) : 1;
  const u64 keep = (goal + each - 1) / each;
  int id = logit == s.last.logit ? s.last.id : INT_MAX;
  if (keep * each < shared.found_sum) {  // not all of these equal logits: those with the lowest ids
    Selection ties = s;
    ties.equal = logit;
    id = locate(row, ties, Measure::equal, keep - 1);
  }
  __syncthreads();
  selection.last = {logit, id};
}

// ---- what parameters do --------------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (position, sequence): 53 bits at the top of 64.
__device__ u64 random_bits(std::uint64_t seed, u32 sequence, std::uint64_t position) {
  u32 c0 = static_cast<u32>(position), c1 = static_cast<u32>(position >> 32), c2 = sequence, c3 = 0;
  u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
    const u32 a = __umulhi(0xD2511F53u, c0), b = __umulhi(0xCD9E8D57u, c2);
    const u32 a_low = 0xD2511F53u * c0, b_low = 0xCD9E8D57u * c2;
    c0 = b ^ c1 ^ k0;
    c1 = b_low;
    c2 = a ^ c3 ^ k1;
    c3 = a_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (static_cast<u64>(c0 >> 5) << 26 | (c1 >> 6)) << 11;
}

__device__ __forceinline__ float penalised(float logit, u32 seen, const SamplerRow& p) {
  if (seen == 0) return logit;
  double x = logit;
  x = x > 0 ? x / p.repetition_penalty : x * p.repetition_penalty;
  const u32 count = seen & ~kInPrompt;
  if (count > 0) x -= p.presence_penalty + p.frequency_penalty * count;
  return static_cast<float>(x);
}

// logit_bias, then stop ids, then penalties: p.changed_logits of `row`.
__device__ __noinline__ void change_logits(const Row& row, const SamplerRow& p) {
  for_each_vector(row, [&](const float4& v, int i) {
    if (i >= row.size) return;
    const uint4 seen = p.seen != nullptr ? *reinterpret_cast<const uint4*>(p.seen + i) : uint4{};
    *reinterpret_cast<float4*>(p.changed_logits + i) = float4{penalised(v.x, seen.x, p), penalised(v.y, seen.y, p),
                                                              penalised(v.z, seen.z, p), penalised(v.w, seen.w, p)};
  });
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.num_bias; i += kThreads) {
    const int token = p.bias[i].token;
    if (i > 0 && p.bias[i - 1].token == token) continue;
    float x = row.x[token];
    for (int j = i; j < p.num_bias && p.bias[j].token == token; ++j) x += p.bias[j].bias;
    p.changed_logits[token] = penalised(x, p.seen != nullptr ? p.seen[token] : 0, p);
  }
  __syncthreads();
  if (p.num_output < p.min_tokens)
    for (int i = static_cast<int>(threadIdx.x); i < p.num_stop; i += kThreads) p.changed_logits[p.stop[i]] = -kInfinity;
  __syncthreads();
}

__device__ __forceinline__ int draw(const Row& row, float max, const SamplerRow& p, std::int64_t position) {
  Selection selection{max, p.inverse_temperature, p.min_p};
  if (p.top_k > 0) {
    selection.scale = kLog2E;
    cut(row, selection, Measure::count, 0, static_cast<u64>(p.top_k));
    selection.scale = p.inverse_temperature;
  }
  if (p.top_p < 1) cut(row, selection, Measure::weight, p.top_p, 0);
  return locate(row, selection, Measure::weight, random_bits(p.seed, p.sequence, static_cast<std::uint64_t>(position)));
}

// The `wanted` likeliest tokens, best first; returns how many there are. As many at a time as shared memory holds.
__device__ __noinline__ int likeliest(const Row& row, const Stats& stats, int wanted, TokenLogprob* out) {
  const double log_sum = log(static_cast<double>(stats.sum));
  Selection selection{stats.max, kLog2E};
  int done = 0, found = kBins;
  for (; done < wanted && found == kBins; done += found) {
    selection.last = {-kInfinity, INT_MAX};
    const int most = min(wanted - done, kBins);
    cut(row, selection, Measure::count, 0, static_cast<u64>(most));
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    for_each(row, [&](float raw, int i) {
      const float x = finite(raw);
      if (selection.measure(Measure::count, x, i) == 0) return;
      const int at = atomicAdd(&shared.count, 1);
      shared.low[at] = static_cast<u32>(i);
      shared.high[at] = __float_as_uint(x);
    });
    __syncthreads();
    found = shared.count;
    for (int i = static_cast<int>(threadIdx.x); i < found; i += kThreads) {
      const Cut mine{__uint_as_float(shared.high[i]), static_cast<int>(shared.low[i])};
      int rank = -1;  // itself is not before itself
      for (int j = 0; j < found; ++j)
        rank += mine.is_behind(__uint_as_float(shared.high[j]), static_cast<int>(shared.low[j])) ? 1 : 0;
      out[done + rank] = {mine.id, log_softmax(mine.logit, stats.max, log_sum)};
    }
    __syncthreads();
    selection.first = selection.last;
  }
  return done;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

struct SampleArguments {
  SamplerView sampler;
  const std::int32_t *slots, *offsets, *logit_rows;
  const std::int64_t* positions;
  const float* logits;
  std::int64_t cols;
  int vocab_size;
};

// For this_row(), which the block has loaded and not waited for. The block's threads agree on the result but for
// num_top.
__device__ __forceinline__ SamplingResult choose(const Row& raw, std::int64_t position, u32 entry) {
  const SamplerRow& p = this_row();
  const Stats stats = statistics(raw);  // waits
  if (stats.first < 0) return {-1, 0, SamplingFailure::no_logit, 0};
  int num_top = 0;
  if (p.num_top > 0)
    num_top = likeliest(raw, stats, p.num_top, p.top_logprobs + static_cast<std::int64_t>(entry) * p.num_top);

  Row row = raw;
  float max = stats.max;
  int token = stats.first;
  if (p.seen != nullptr || p.num_bias > 0 || (p.num_stop > 0 && p.num_output < p.min_tokens)) {
    change_logits(raw, p);
    row = make_row(p.changed_logits, raw.size);
    const Stats changed = statistics(row);
    if (changed.first < 0) return {-1, 0, SamplingFailure::no_token, 0};
    max = changed.max;
    token = changed.first;
  }
  if (p.draws) token = draw(row, max, p, position);
  float logprob = 0;
  if (threadIdx.x == 0) logprob = log_softmax(raw.x[token], stats.max, log(static_cast<double>(stats.sum)));
  return {token, logprob, SamplingFailure::none, num_top};
}

__global__ __launch_bounds__(kThreads, 1) void sample_kernel(SampleArguments a) {
  release_successors();
  wait_for_predecessors();
  const int b = static_cast<int>(blockIdx.x), slot = a.slots[b];
  const u32 step = a.sampler.counters[0], entry = step % a.sampler.ring_size;
  SamplingResult* const results = a.sampler.ring + static_cast<std::int64_t>(entry) * a.sampler.num_rows;
  if (slot <= kSkippedSlot) {
    if (threadIdx.x == 0) results[kSkippedSlot - slot] = {-1, 0, SamplingFailure::skipped, 0};
  } else if (slot >= 0) {
    SamplerRow& state = a.sampler.rows[slot];
    if (threadIdx.x < sizeof(SamplerRow) / 4)
      shared.row[threadIdx.x] = reinterpret_cast<const u32*>(&state)[threadIdx.x];
    const std::int64_t logits_row = a.logit_rows != nullptr ? a.logit_rows[b] : b;
    const SamplingResult result = choose(make_row(a.logits + logits_row * a.cols, a.vocab_size),
                                         a.positions[b] + a.offsets[b + 1] - a.offsets[b], entry);
    if (threadIdx.x == 0) {
      results[slot] = result;
      a.sampler.chosen[slot] = result.token;
      if (result.failure == SamplingFailure::none) {
        state.num_output = this_row().num_output + 1;
        if (this_row().seen != nullptr) ++this_row().seen[result.token];
      }
    }
  }
  // The block that ends last counts the step: all have read the counter.
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&a.sampler.counters[1], 1) == gridDim.x - 1) {
      a.sampler.counters[1] = 0;
      a.sampler.counters[0] = step + 1;
    }
  }
}

__global__ void store_row_kernel(SamplerRow* row, std::int32_t* chosen, SamplerRow state) {
  release_successors();
  wait_for_predecessors();
  *row = state;
  *chosen = -1;
}

__global__ void mark_prompt_kernel(const std::int32_t* tokens, std::int64_t n, u32* seen) {
  release_successors();
  wait_for_predecessors();
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) seen[tokens[i]] = kInPrompt;  // equal tokens write the same
}

__global__ __launch_bounds__(kThreads, 1) void token_log_probs_kernel(const float* logits, std::int64_t cols,
                                                                      int vocab_size, const std::int32_t* targets,
                                                                      float* out) {
  release_successors();
  wait_for_predecessors();
  const Row row = make_row(logits + static_cast<std::int64_t>(blockIdx.x) * cols, vocab_size);
  const Stats stats = statistics(row);
  if (threadIdx.x == 0)
    out[blockIdx.x] = log_softmax(row.x[targets[blockIdx.x]], stats.max, log(static_cast<double>(stats.sum)));
}

}  // namespace

void sample(cudaStream_t stream, const SamplerView& sampler, const DeviceBatch& batch, const float* logits,
            std::int64_t cols, std::int64_t vocab_size) {
  const SampleArguments arguments{sampler,         batch.slots, batch.offsets, batch.logit_rows,
                                  batch.positions, logits,      cols,          static_cast<int>(vocab_size)};
  launch(stream, "sample", sample_kernel, dim3(static_cast<unsigned>(batch.num_sequences)), dim3(kThreads), 0,
         arguments);
}

void store_row(cudaStream_t stream, const SamplerView& sampler, int row, const SamplerRow& state) {
  launch(stream, "store_row", store_row_kernel, dim3(1), dim3(1), 0, sampler.rows + row, sampler.chosen + row, state);
}

void mark_prompt(cudaStream_t stream, const std::int32_t* tokens, std::int64_t n, std::uint32_t* seen) {
  launch(stream, "mark_prompt", mark_prompt_kernel, dim3(blocks_for(n, 256)), dim3(256), 0, tokens, n, seen);
}

void token_log_probs(cudaStream_t stream, const float* logits, std::int64_t num_rows, std::int64_t cols,
                     std::int64_t vocab_size, const std::int32_t* targets, float* out) {
  launch(stream, "token_log_probs", token_log_probs_kernel, dim3(static_cast<unsigned>(num_rows)), dim3(kThreads), 0,
         logits, cols, static_cast<int>(vocab_size), targets, out);
}

}  // namespace based::cuda
