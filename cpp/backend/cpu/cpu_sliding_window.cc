// Sliding-window attention: rotary, rings, and how the work is cut into tasks. The arithmetic is in kernels/.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/sliding_window.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

static_assert(kKeyBlock == kStateLanes);

constexpr std::int64_t kTaskTokens = 32;

struct WindowSequence {
  std::int64_t start, tokens;
  std::int64_t row;                      // of its first token
  std::int64_t first_block, num_blocks;  // of all keys that it sees in this call
  float* copy;                           // of a sequence of several tokens, see SlidingWindow::run
};

struct WindowTask {
  std::int64_t sequence, kv_head, token;
};

struct WindowPlan {
  std::int64_t num_pairs;     // of dimensions that are rotated
  double* frequencies;        // (num_pairs)
  std::int64_t* positions;    // (N)
  float *cosine, *sine;       // (N, num_pairs) of every token's angles
  WindowSequence* sequences;  // (B)
  WindowTask *fills, *tasks;
  std::int64_t q_size;   // floats
  ThreadFloats scratch;  // q_size for queries, then what the kernel wants
  float* copies = nullptr;

  WindowPlan(Carver& carver, const SlidingWindowConfig& config, const Lengths& lengths, int num_threads)
      : num_pairs((config.rotary_dim + 1) / 2),
        frequencies(carver.take<double>(num_pairs)),
        positions(carver.take<std::int64_t>(lengths.num_tokens())),
        cosine(carver.take<float>(lengths.num_tokens() * num_pairs)),
        sine(carver.take<float>(lengths.num_tokens() * num_pairs)),
        sequences(carver.take<WindowSequence>(lengths.num_sequences())),
        fills(carver.take<WindowTask>(count_fills(config, lengths))),
        tasks(carver.take<WindowTask>(count_tasks(config, lengths))),
        q_size(round_up(kQueryBlock * config.head_dim, kStateLanes)),
        scratch(carver, num_threads, q_size + kQueryBlock * kKeyBlock * blocks_seen(config)) {
    std::int64_t copied = 0;
    for (std::int64_t b = 0; b < lengths.num_sequences(); ++b)
      if (lengths.tokens(b) > 1)
        copied += config.num_kv_heads * copy_size(config, blocks(config, lengths.start(b), lengths.tokens(b)));
    copies = carver.take<float>(copied);
  }

  static std::int64_t first_key(const SlidingWindowConfig& config, std::int64_t position) {
    return std::max<std::int64_t>(0, position - config.window + 1);
  }
  // Of the keys that tokens start … start + tokens − 1 see.
  static std::int64_t blocks(const SlidingWindowConfig& config, std::int64_t start, std::int64_t tokens) {
    return (start + tokens - 1) / kKeyBlock + 1 - first_key(config, start) / kKeyBlock;
  }
  // At most, by kQueryBlock queries, wherever they stand.
  static std::int64_t blocks_seen(const SlidingWindowConfig& config) {
    return ceil_div(config.window + kQueryBlock, kKeyBlock) + 1;
  }
  // Floats of the keys and values of one kv head.
  static std::int64_t copy_size(const SlidingWindowConfig& config, std::int64_t num_blocks) {
    return num_blocks * kKeyBlock * (config.head_dim + RingLayout(config.ring()).cols);
  }
  static std::int64_t count_fills(const SlidingWindowConfig& config, const Lengths& lengths) {
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < lengths.num_sequences(); ++b) count += lengths.tokens(b) > 1 ? 1 : 0;
    return count * config.num_kv_heads;
  }
  static std::int64_t count_tasks(const SlidingWindowConfig& config, const Lengths& lengths) {
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < lengths.num_sequences(); ++b) count += ceil_div(lengths.tokens(b), kTaskTokens);
    return count * config.num_kv_heads;
  }
};

template <typename T>
T to_ring(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return bf16_from_float(x);
  }
}

float from_ring(float x) { return x; }
float from_ring(std::uint16_t x) { return float_from_bf16(x); }

// One call. T: element of the rings. Keys and values are rounded to T before any use, so that it does not matter
// whether a key comes from the ring or from the call.
template <typename T>
class SlidingWindow {
 public:
  SlidingWindow(ThreadPool& threads, const SlidingWindowKernels& kernels, const SlidingWindowConfig& config,
                const RaggedBatch& batch, const WindowPlan& plan, const Matrix& qkv, const CpuStatePool& states,
                int layer, const Matrix& out)
      : threads_(threads),
        kernels_(kernels),
        config_(config),
        batch_(batch),
        plan_(plan),
        qkv_(qkv),
        states_(states),
        layer_(layer),
        out_(out),
        ring_(config.ring()) {}

  void run() {
    make_rotary_table();
    // Sequences of several tokens read keys and values from a copy: those in the ring that any query sees, then the
    // call's. Of one head: keys by blocks, values by rows, as in a ring, float.
    float* copy = plan_.copies;
    WindowTask* fill_end = plan_.fills;
    WindowTask* task_end = plan_.tasks;
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b) {
      const std::int64_t start = batch_.positions[b], tokens = batch_.offsets[b + 1] - batch_.offsets[b];
      WindowSequence& s = plan_.sequences[b];
      s = {start,  tokens, batch_.offsets[b], first_key(start) / kKeyBlock, WindowPlan::blocks(config_, start, tokens),
           nullptr};
      for (std::int64_t kv = 0; kv < config_.num_kv_heads; ++kv) {
        if (s.tokens > 1) *fill_end++ = {b, kv, 0};
        for (std::int64_t t = 0; t < s.tokens; t += kTaskTokens) *task_end++ = {b, kv, t};
      }
      if (s.tokens > 1) {
        s.copy = copy;
        copy += config_.num_kv_heads * copy_size(s);
      }
    }
    threads_.run(fill_end - plan_.fills,
                 [&](std::int64_t i, int thread) { fill(plan_.fills[i], plan_.scratch.of(thread)); });
    threads_.run(task_end - plan_.tasks, [&](std::int64_t i, int thread) {
      const WindowTask& task = plan_.tasks[i];
      plan_.sequences[task.sequence].tokens > 1 ? attend_tokens(task, plan_.scratch.of(thread))
                                                : attend_token(task, plan_.scratch.of(thread));
    });
  }

 private:
  // In double: a position may be large.
  void make_rotary_table() const {
    const std::int64_t num_pairs = plan_.num_pairs, num_tokens = batch_.num_tokens();
    if (num_pairs == 0) return;
    for (std::int64_t i = 0; i < num_pairs; ++i)
      plan_.frequencies[i] =
          std::pow(config_.rotary_base, -2.0 * static_cast<double>(i) / static_cast<double>(config_.rotary_dim));
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b)
      for (std::int64_t t = batch_.offsets[b]; t < batch_.offsets[b + 1]; ++t)
        plan_.positions[t] = batch_.positions[b] + t - batch_.offsets[b];
    constexpr std::int64_t kTokens = 16;
    threads_.run(ceil_div(num_tokens, kTokens), [&](std::int64_t task, int) {
      for (std::int64_t t = task * kTokens; t < std::min(num_tokens, (task + 1) * kTokens); ++t) {
        for (std::int64_t i = 0; i < num_pairs; ++i) {
          const double angle = static_cast<double>(plan_.positions[t]) * plan_.frequencies[i];
          plan_.cosine[t * num_pairs + i] = static_cast<float>(std::cos(angle));
          plan_.sine[t * num_pairs + i] = static_cast<float>(std::sin(angle));
        }
      }
    });
  }

  std::int64_t first_key(std::int64_t position) const { return WindowPlan::first_key(config_, position); }
  std::int64_t group() const { return config_.num_heads / config_.num_kv_heads; }
  std::int64_t copy_size(const WindowSequence& s) const { return WindowPlan::copy_size(config_, s.num_blocks); }
  T* ring_of(const WindowTask& task) const {
    return states_.layer<T>(batch_.slots[task.sequence], layer_) + task.kv_head * ring_.head_size;
  }
  T* ring_key(T* ring, std::int64_t position) const {
    const std::int64_t slot = position % ring_.slots;
    return ring + slot / kKeyBlock * config_.head_dim * kKeyBlock + slot % kKeyBlock;
  }
  T* ring_value(T* ring, std::int64_t position) const {
    return ring + ring_.keys_size + position % ring_.slots * ring_.cols;
  }
  const float* input(std::int64_t token, std::int64_t head) const { return row(qkv_, token) + head * config_.head_dim; }

  void rotate(std::int64_t token, std::int64_t head, float scale, float* y) const {
    const bool is_key = head >= config_.num_heads;
    const std::int64_t n = plan_.num_pairs;
    kernels_.rotate({input(token, head), y, plan_.cosine + token * n, plan_.sine + token * n, n, config_.head_dim,
                     config_.rotary_interleaved, is_key && sizeof(T) == 2, scale});
  }

  // Copies what the queries see of the ring, adds the call's keys and values, and brings the ring up to date.
  void fill(const WindowTask& task, float* key) const {
    const WindowSequence& s = plan_.sequences[task.sequence];
    const std::int64_t hd = config_.head_dim;
    float* keys = s.copy + task.kv_head * copy_size(s);
    float* values = keys + s.num_blocks * kKeyBlock * hd;
    const std::int64_t base = s.first_block * kKeyBlock;
    T* ring = ring_of(task);
    for (std::int64_t position = base; position < s.start; position += kKeyBlock) {
      const T* from = ring_key(ring, position);
      float* to = keys + (position - base) * hd;
      for (std::int64_t i = 0; i < hd * kKeyBlock; ++i) to[i] = from_ring(from[i]);
    }
    for (std::int64_t position = first_key(s.start); position < s.start; ++position) {
      const T* from = ring_value(ring, position);
      float* to = values + (position - base) * ring_.cols;
      for (std::int64_t i = 0; i < ring_.cols; ++i) to[i] = from_ring(from[i]);
    }
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      const std::int64_t position = s.start + t, at = position - base;
      const bool kept = t + config_.window >= s.tokens;
      rotate(s.row + t, config_.num_heads + task.kv_head, 1.0f, key);
      float* key_to = keys + at / kKeyBlock * kKeyBlock * hd + at % kKeyBlock;
      for (std::int64_t d = 0; d < hd; ++d) key_to[d * kKeyBlock] = key[d];
      const float* value = input(s.row + t, config_.num_heads + config_.num_kv_heads + task.kv_head);
      float* value_to = values + at * ring_.cols;
      for (std::int64_t d = 0; d < hd; ++d) value_to[d] = from_ring(to_ring<T>(value[d]));
      std::fill(value_to + hd, value_to + ring_.cols, 0.0f);
      if (kept) keep(ring, position, key, value);
    }
  }

  void keep(T* ring, std::int64_t position, const float* key, const float* value) const {
    T* key_to = ring_key(ring, position);
    T* value_to = ring_value(ring, position);
    for (std::int64_t d = 0; d < config_.head_dim; ++d) {
      key_to[d * kKeyBlock] = to_ring<T>(key[d]);
      value_to[d] = to_ring<T>(value[d]);
    }
  }

  // kTaskTokens tokens from task.token on, all query heads of the kv head.
  void attend_tokens(const WindowTask& task, float* scratch) const {
    const WindowSequence& s = plan_.sequences[task.sequence];
    const float* keys = s.copy + task.kv_head * copy_size(s);
    WindowAttendTask attend;
    attend.window = {keys,         keys + s.num_blocks * kKeyBlock * config_.head_dim,
                     false,        s.first_block,
                     s.num_blocks, config_.head_dim,
                     ring_.cols};
    attend.q = scratch;
    attend.out_bf16 = is_bf16(out_);
    attend.scratch = scratch + plan_.q_size;
    const std::int64_t end = std::min(task.token + kTaskTokens, s.tokens);
    for (std::int64_t head = task.kv_head * group(); head < (task.kv_head + 1) * group(); ++head) {
      for (std::int64_t begin = task.token; begin < end; begin += kQueryBlock) {
        attend.num_queries = static_cast<int>(std::min<std::int64_t>(kQueryBlock, end - begin));
        for (int i = 0; i < attend.num_queries; ++i) {
          const std::int64_t token = s.row + begin + i;
          rotate(token, head, static_cast<float>(config_.scale), scratch + i * config_.head_dim);
          attend.last[i] = s.start + begin + i;
          attend.first[i] = first_key(attend.last[i]);
          attend.out[i] = element(out_, token, head * config_.head_dim);
        }
        kernels_.attend(attend);
      }
    }
  }

  // The only token of its sequence in the call: straight from the ring. What its key overwrites, no query sees.
  void attend_token(const WindowTask& task, float* scratch) const {
    const WindowSequence& s = plan_.sequences[task.sequence];
    T* ring = ring_of(task);
    rotate(s.row, config_.num_heads + task.kv_head, 1.0f, scratch);
    keep(ring, s.start, scratch, input(s.row, config_.num_heads + config_.num_kv_heads + task.kv_head));
    WindowAttendTask attend;
    attend.window = {ring,      ring + ring_.keys_size, sizeof(T) == 2, 0, ring_.slots / kKeyBlock, config_.head_dim,
                     ring_.cols};
    attend.q = scratch;
    attend.out_bf16 = is_bf16(out_);
    attend.scratch = scratch + plan_.q_size;
    const std::int64_t end = (task.kv_head + 1) * group();
    for (std::int64_t head = task.kv_head * group(); head < end; head += kQueryBlock) {
      attend.num_queries = static_cast<int>(std::min<std::int64_t>(kQueryBlock, end - head));
      for (int i = 0; i < attend.num_queries; ++i) {
        rotate(s.row, head + i, static_cast<float>(config_.scale), scratch + i * config_.head_dim);
        attend.last[i] = s.start;
        attend.first[i] = first_key(s.start);
        attend.out[i] = element(out_, s.row, (head + i) * config_.head_dim);
      }
      kernels_.attend(attend);
    }
  }

  ThreadPool& threads_;
  const SlidingWindowKernels& kernels_;
  const SlidingWindowConfig& config_;
  const RaggedBatch& batch_;
  const WindowPlan& plan_;
  const Matrix& qkv_;
  const CpuStatePool& states_;
  int layer_;
  const Matrix& out_;
  RingLayout ring_;
};

}  // namespace

std::size_t scratch_nbytes(const SlidingWindowConfig& config, const Lengths& lengths, Isa, int num_threads) {
  return plan_nbytes<WindowPlan>(config, lengths, num_threads);
}

void CpuBackend::sliding_window(const SlidingWindowConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                backend::StatePool& states, int layer, const Matrix& out) {
  const SlidingWindowKernels& kernels =
      for_isa(isa_, [](auto tag) -> const SlidingWindowKernels& { return sliding_window_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  const Lengths lengths(batch);
  Carver carver(scratch(scratch_nbytes(config, lengths, isa_, num_threads())));
  const WindowPlan plan(carver, config, lengths, num_threads());
  if (pool.ring_dtype() == DType::bfloat16) {
    SlidingWindow<std::uint16_t>(*pool_, kernels, config, batch, plan, qkv, pool, layer, out).run();
  } else {
    SlidingWindow<float>(*pool_, kernels, config, batch, plan, qkv, pool, layer, out).run();
  }
}

}  // namespace based::cpu
