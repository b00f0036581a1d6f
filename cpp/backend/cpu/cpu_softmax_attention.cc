// Softmax attention, over a window or over all keys: rotary, where keys and values lie, and how the work is cut into
// tasks. The arithmetic is in kernels/.

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/softmax_attention.h"

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

// The angles of every token of a call.
struct RotaryTable {
  std::int64_t num_pairs;   // of dimensions that are rotated
  double* frequencies;      // (num_pairs)
  std::int64_t* positions;  // (N)
  float *cosine, *sine;     // (N, num_pairs)

  RotaryTable(Carver& carver, std::int64_t rotary_dim, const Lengths& lengths)
      : num_pairs((rotary_dim + 1) / 2),
        frequencies(carver.take<double>(num_pairs)),
        positions(carver.take<std::int64_t>(lengths.num_tokens())),
        cosine(carver.take<float>(lengths.num_tokens() * num_pairs)),
        sine(carver.take<float>(lengths.num_tokens() * num_pairs)) {}
};

struct WindowPlan {
  RotaryTable rotary;
  WindowSequence* sequences;  // (B)
  WindowTask *fills, *tasks;
  std::int64_t q_size;   // floats
  ThreadFloats scratch;  // q_size for queries, then what the kernel wants
  float* copies = nullptr;

  WindowPlan(Carver& carver, const SlidingWindowConfig& config, const Lengths& lengths, int num_threads)
      : rotary(carver, config.rotary_dim, lengths),
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

// One call. T: element of keys and values in the state. They are rounded to T before any use, so that it does not
// matter whether a key comes from the state or from the call.
template <typename T, typename Config>
class Attention {
 protected:
  Attention(ThreadPool& threads, const SoftmaxAttentionKernels& kernels, const Config& config, const RaggedBatch& batch,
            const RotaryTable& rotary, const Matrix& qkv, const CpuStatePool& states, int layer, const Matrix& out)
      : threads_(threads),
        kernels_(kernels),
        config_(config),
        batch_(batch),
        rotary_(rotary),
        qkv_(qkv),
        states_(states),
        layer_(layer),
        out_(out) {}

  // In double: a position may be large.
  void make_rotary_table() const {
    const std::int64_t num_pairs = rotary_.num_pairs, num_tokens = batch_.num_tokens();
    if (num_pairs == 0) return;
    for (std::int64_t i = 0; i < num_pairs; ++i)
      rotary_.frequencies[i] =
          std::pow(config_.rotary_base, -2.0 * static_cast<double>(i) / static_cast<double>(config_.rotary_dim));
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b)
      for (std::int64_t t = batch_.offsets[b]; t < batch_.offsets[b + 1]; ++t)
        rotary_.positions[t] = batch_.positions[b] + t - batch_.offsets[b];
    constexpr std::int64_t kTokens = 16;
    threads_.run(ceil_div(num_tokens, kTokens), [&](std::int64_t task, int) {
      for (std::int64_t t = task * kTokens; t < std::min(num_tokens, (task + 1) * kTokens); ++t) {
        for (std::int64_t i = 0; i < num_pairs; ++i) {
          const double angle = static_cast<double>(rotary_.positions[t]) * rotary_.frequencies[i];
          rotary_.cosine[t * num_pairs + i] = static_cast<float>(std::cos(angle));
          rotary_.sine[t * num_pairs + i] = static_cast<float>(std::sin(angle));
        }
      }
    });
  }

  std::int64_t group() const { return config_.num_heads / config_.num_kv_heads; }
  const float* input(std::int64_t token, std::int64_t head) const { return row(qkv_, token) + head * config_.head_dim; }
  const float* value(std::int64_t token, std::int64_t kv_head) const {
    return input(token, config_.num_heads + config_.num_kv_heads + kv_head);
  }

  void rotate(std::int64_t token, std::int64_t head, float scale, float* y) const {
    const bool is_key = head >= config_.num_heads;
    const std::int64_t n = rotary_.num_pairs;
    kernels_.rotate({input(token, head), y, rotary_.cosine + token * n, rotary_.sine + token * n, n, config_.head_dim,
                     config_.rotary_interleaved, is_key && sizeof(T) == 2, scale});
  }

  // Puts a key (every kKeyBlock-th number) and a value into the state.
  void keep(const float* key, const float* value, T* key_to, T* value_to) const {
    for (std::int64_t d = 0; d < config_.head_dim; ++d) {
      key_to[d * kKeyBlock] = to_ring<T>(key[d]);
      value_to[d] = to_ring<T>(value[d]);
    }
  }

  ThreadPool& threads_;
  const SoftmaxAttentionKernels& kernels_;
  const Config& config_;
  const RaggedBatch& batch_;
  const RotaryTable& rotary_;
  const Matrix& qkv_;
  const CpuStatePool& states_;
  int layer_;
  const Matrix& out_;
};

// ---- over a window --------------------------------------------------------------------------------------------------

template <typename T>
class SlidingWindow : Attention<T, SlidingWindowConfig> {
  using Base = Attention<T, SlidingWindowConfig>;
  using Base::batch_, Base::config_, Base::group, Base::input, Base::kernels_, Base::layer_, Base::out_, Base::rotate,
      Base::states_, Base::threads_;

 public:
  SlidingWindow(ThreadPool& threads, const SoftmaxAttentionKernels& kernels, const SlidingWindowConfig& config,
                const RaggedBatch& batch, const WindowPlan& plan, const Matrix& qkv, const CpuStatePool& states,
                int layer, const Matrix& out)
      : Base(threads, kernels, config, batch, plan.rotary, qkv, states, layer, out),
        plan_(plan),
        ring_(config.ring()) {}

  void run() {
    Base::make_rotary_table();
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
  std::int64_t first_key(std::int64_t position) const { return WindowPlan::first_key(config_, position); }
  std::int64_t copy_size(const WindowSequence& s) const { return WindowPlan::copy_size(config_, s.num_blocks); }
  T* ring_of(const WindowTask& task) const {
    return states_.template layer<T>(batch_.slots[task.sequence], layer_) + task.kv_head * ring_.head_size;
  }
  T* ring_key(T* ring, std::int64_t position) const {
    const std::int64_t slot = position % ring_.slots;
    return ring + slot / kKeyBlock * config_.head_dim * kKeyBlock + slot % kKeyBlock;
  }
  T* ring_value(T* ring, std::int64_t position) const {
    return ring + ring_.keys_size + position % ring_.slots * ring_.cols;
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
      const float* value = Base::value(s.row + t, task.kv_head);
      float* value_to = values + at * ring_.cols;
      for (std::int64_t d = 0; d < hd; ++d) value_to[d] = from_ring(to_ring<T>(value[d]));
      std::fill(value_to + hd, value_to + ring_.cols, 0.0f);
      if (kept) keep(ring, position, key, value);
    }
  }

  void keep(T* ring, std::int64_t position, const float* key, const float* value) const {
    Base::keep(key, value, ring_key(ring, position), ring_value(ring, position));
  }

  // kTaskTokens tokens from task.token on, all query heads of the kv head.
  void attend_tokens(const WindowTask& task, float* scratch) const {
    const WindowSequence& s = plan_.sequences[task.sequence];
    const float* keys = s.copy + task.kv_head * copy_size(s);
    AttendTask attend;
    attend.window = window_keys(keys, keys + s.num_blocks * kKeyBlock * config_.head_dim, s.first_block, s.num_blocks);
    begin(attend, scratch);
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
    keep(ring, s.start, scratch, Base::value(s.row, task.kv_head));
    AttendTask attend;
    attend.window = window_keys(ring, ring + ring_.keys_size, 0, ring_.slots / kKeyBlock);
    begin(attend, scratch);
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

  template <typename U>
  KeyBlocks window_keys(const U* keys, const U* values, std::int64_t first_block, std::int64_t num_blocks) const {
    return {keys,
            values,
            config_.head_dim * kKeyBlock,
            ring_.cols * kKeyBlock,
            sizeof(U) == 2,
            first_block,
            num_blocks,
            config_.head_dim,
            ring_.cols};
  }
  void begin(AttendTask& attend, float* scratch) const {
    attend.q = scratch;
    attend.out_bf16 = is_bf16(out_);
    attend.partial = false;
    attend.scratch = scratch + plan_.q_size;
  }

  const WindowPlan& plan_;
  RingLayout ring_;
};

// ---- over all keys --------------------------------------------------------------------------------------------------

// Sums are taken segment by segment, those of a span are added in order, and then the spans are, in order. All of them
// begin at fixed positions, so that a query's result depends neither on how its sequence was cut into calls nor on who
// computes a span.
constexpr std::int64_t kSegment = 128, kSpan = 512;
static_assert(kPieceTokens % kSegment == 0 && kSpan % kSegment == 0 && kSegment % kKeyBlock == 0);
constexpr std::int64_t kTaskQueries = 32;

// Queries of one kv head and sequence: `count` tokens of one head, or `count` heads of the only token.
struct FullTask {
  std::int64_t sequence, kv_head, head, token, count;
  bool heads;

  std::int64_t head_of(std::int64_t i) const { return heads ? head + i : head; }
  std::int64_t token_of(std::int64_t i) const { return heads ? token : token + i; }
};

// A step of few sequences has fewer tasks than threads: there the spans of a task are shared out, some at a time, so
// that memory does not grow with the context.
struct FullPlan {
  RotaryTable rotary;
  std::int64_t num_tasks;
  FullTask* tasks;
  std::int64_t spans;     // of a task that are computed at once; 0: all, by one thread
  std::int64_t sum_size;  // floats of a partial sum
  std::int64_t queries;   // of a task, at most
  float* totals;          // (num_tasks, queries, sum_size) of spans added so far; none if spans is 0
  float* partials;        // (num_tasks, spans, queries, sum_size)
  std::int64_t q_size;
  // Of a thread: queries (q_size), the sums of a task's spans and of one span (queries, sum_size each), of a segment
  // (kQueryBlock, sum_size), and scores.
  ThreadFloats scratch;

  FullPlan(Carver& carver, const FullAttentionConfig& config, const Lengths& lengths, int num_threads)
      : rotary(carver, config.rotary_dim, lengths),
        num_tasks(count_tasks(config, lengths)),
        tasks(carver.take<FullTask>(num_tasks)),
        spans(shared_spans(lengths, num_tasks, num_threads)),
        sum_size(ContextLayout(config.context()).cols + kStateLanes),
        queries(is_step(lengths) ? std::min(kTaskQueries, config.num_heads / config.num_kv_heads) : kTaskQueries),
        totals(carver.take<float>(spans > 0 ? num_tasks * queries * sum_size : 0)),
        partials(carver.take<float>(num_tasks * spans * queries * sum_size)),
        q_size(round_up((queries + kQueryBlock - 1) * config.head_dim, kStateLanes)),
        scratch(carver, num_threads, q_size + (2 * queries + kQueryBlock) * sum_size + kQueryBlock * kSegment) {}

  static bool is_step(const Lengths& lengths) { return lengths.num_tokens() == lengths.num_sequences(); }
  static std::int64_t count_tasks(const FullAttentionConfig& config, const Lengths& lengths) {
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < lengths.num_sequences(); ++b)
      count += lengths.tokens(b) > 1
                   ? config.num_heads * ceil_div(lengths.tokens(b), kTaskQueries)
                   : config.num_kv_heads * ceil_div(config.num_heads / config.num_kv_heads, kTaskQueries);
    return count;
  }
  static std::int64_t shared_spans(const Lengths& lengths, std::int64_t num_tasks, int num_threads) {
    if (num_threads == 1 || !is_step(lengths) || num_tasks >= 4 * num_threads) return 0;
    return ceil_div(16 * num_threads, num_tasks);
  }
};

template <typename T>
class FullAttention : Attention<T, FullAttentionConfig> {
  using Base = Attention<T, FullAttentionConfig>;
  using Base::batch_, Base::config_, Base::group, Base::kernels_, Base::layer_, Base::out_, Base::rotate, Base::states_,
      Base::threads_;

 public:
  FullAttention(ThreadPool& threads, const SoftmaxAttentionKernels& kernels, const FullAttentionConfig& config,
                const RaggedBatch& batch, const FullPlan& plan, const Matrix& qkv, const CpuStatePool& states,
                int layer, const Matrix& out)
      : Base(threads, kernels, config, batch, plan.rotary, qkv, states, layer, out),
        plan_(plan),
        context_(config.context()) {}

  void run() {
    Base::make_rotary_table();
    const std::int64_t longest = list_tasks();
    fill();
    if (plan_.spans > 0 && longest > kSpan)
      share_spans(longest);
    else
      threads_.run(plan_.num_tasks, [&](std::int64_t i, int thread) { attend(plan_.tasks[i], thread); });
  }

 private:
  // Returns the tokens of the longest sequence.
  std::int64_t list_tasks() const {
    FullTask* task = plan_.tasks;
    std::int64_t longest = 0;
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b) {
      const std::int64_t tokens = batch_.offsets[b + 1] - batch_.offsets[b], end = batch_.positions[b] + tokens;
      if (states_.room(batch_.slots[b]) < end)
        throw std::logic_error("full_attention: reserve_states() was not told of " + std::to_string(end) + " tokens");
      longest = std::max(longest, end);
      for (std::int64_t kv = 0; kv < config_.num_kv_heads; ++kv) {
        const std::int64_t first = kv * group(), last = first + group();
        if (tokens == 1) {
          for (std::int64_t head = first; head < last; head += kTaskQueries)
            *task++ = {b, kv, head, 0, std::min(kTaskQueries, last - head), true};
        } else {
          for (std::int64_t head = first; head < last; ++head)
            for (std::int64_t t = 0; t < tokens; t += kTaskQueries)
              *task++ = {b, kv, head, t, std::min(kTaskQueries, tokens - t), false};
        }
      }
    }
    return longest;
  }

  // The call's keys and values go into the state.
  void fill() const {
    constexpr std::int64_t kTokens = 16;
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b) {
      const std::int64_t row = batch_.offsets[b], tokens = batch_.offsets[b + 1] - row, start = batch_.positions[b];
      const std::int64_t parts = ceil_div(tokens, kTokens);
      auto fill_part = [&](std::int64_t i, int thread) {
        float* key = plan_.scratch.of(thread);
        const std::int64_t kv = i / parts, begin = i % parts * kTokens;
        for (std::int64_t t = begin; t < std::min(tokens, begin + kTokens); ++t) {
          rotate(row + t, config_.num_heads + kv, 1.0f, key);
          T* block = block_of(b, kv, start + t);
          const std::int64_t lane = (start + t) % kKeyBlock;
          Base::keep(key, Base::value(row + t, kv), block + lane,
                     block + config_.head_dim * kKeyBlock + lane * context_.cols);
        }
      };
      const std::int64_t count = config_.num_kv_heads * parts;
      if (tokens == 1)  // less work than waking a thread
        for (std::int64_t i = 0; i < count; ++i) fill_part(i, 0);
      else
        threads_.run(count, fill_part);
    }
  }

  T* block_of(std::int64_t sequence, std::int64_t kv_head, std::int64_t position) const {
    return states_.template context<T>(batch_.slots[sequence], layer_, position) + kv_head * context_.head_size +
           position % kPieceTokens / kKeyBlock * context_.block_size;
  }
  std::int64_t position(const FullTask& task, std::int64_t i) const {
    return batch_.positions[task.sequence] + task.token_of(i);
  }
  std::int64_t end(const FullTask& task) const { return position(task, task.count - 1) + 1; }
  // Queries that stand before a position.
  std::int64_t queries_before(const FullTask& task, std::int64_t begin) const {
    return task.heads ? 0 : std::clamp<std::int64_t>(begin - position(task, 0), 0, task.count);
  }

  void rotate_queries(const FullTask& task, float* q) const {
    const std::int64_t row = batch_.offsets[task.sequence];
    for (std::int64_t i = 0; i < task.count; ++i)
      rotate(row + task.token_of(i), task.head_of(i), static_cast<float>(config_.scale), q + i * config_.head_dim);
  }

  // sums[i] = the partial sum of query i over the keys of a span, for the queries that see any.
  void attend_span(const FullTask& task, std::int64_t begin, const float* q, float* sums, float* scratch) const {
    float* segment_sums = scratch;
    for (std::int64_t segment = begin; segment < std::min(begin + kSpan, end(task)); segment += kSegment) {
      T* block = block_of(task.sequence, task.kv_head, segment);
      AttendTask attend;
      attend.window = {block,
                       block + config_.head_dim * kKeyBlock,
                       context_.block_size,
                       context_.block_size,
                       sizeof(T) == 2,
                       segment / kKeyBlock,
                       kSegment / kKeyBlock,
                       config_.head_dim,
                       context_.cols};
      attend.out_bf16 = false;
      attend.partial = true;
      attend.scratch = segment_sums + kQueryBlock * plan_.sum_size;
      std::int64_t i = queries_before(task, segment);
      for (; i < task.count; i += kQueryBlock) {
        attend.q = q + i * config_.head_dim;
        attend.num_queries = static_cast<int>(std::min<std::int64_t>(kQueryBlock, task.count - i));
        for (int j = 0; j < attend.num_queries; ++j) {
          attend.first[j] = segment;
          attend.last[j] = std::min(position(task, i + j), segment + kSegment - 1);
          attend.out[j] = (segment == begin ? sums + i * plan_.sum_size : segment_sums) + j * plan_.sum_size;
        }
        kernels_.attend(attend);
        for (int j = 0; j < attend.num_queries && segment > begin; ++j)
          kernels_.add(sums + (i + j) * plan_.sum_size, segment_sums + j * plan_.sum_size, context_.cols);
      }
    }
  }

  // Adds the sums of the span that begins at `begin` to those of the spans before.
  void add_span(const FullTask& task, std::int64_t begin, const float* sums, float* totals) const {
    for (std::int64_t i = queries_before(task, begin); i < task.count; ++i)
      kernels_.add(totals + i * plan_.sum_size, sums + i * plan_.sum_size, context_.cols);
  }

  void finish(const FullTask& task, const float* totals) const {
    const std::int64_t row = batch_.offsets[task.sequence];
    for (std::int64_t i = 0; i < task.count; ++i)
      kernels_.finish(totals + i * plan_.sum_size, context_.cols, config_.head_dim,
                      element(out_, row + task.token_of(i), task.head_of(i) * config_.head_dim), is_bf16(out_));
  }

  void attend(const FullTask& task, int thread) const {
    float* q = plan_.scratch.of(thread);
    float* totals = q + plan_.q_size;
    float* sums = totals + plan_.queries * plan_.sum_size;
    float* scratch = sums + plan_.queries * plan_.sum_size;
    rotate_queries(task, q);
    for (std::int64_t begin = 0; begin < end(task); begin += kSpan) {
      attend_span(task, begin, q, begin == 0 ? totals : sums, scratch);
      if (begin > 0) add_span(task, begin, sums, totals);
    }
    finish(task, totals);
  }

  // The same, in rounds of plan_.spans spans of every task.
  void share_spans(std::int64_t longest) const {
    const std::int64_t size = plan_.queries * plan_.sum_size;
    for (std::int64_t round = 0; round < longest; round += plan_.spans * kSpan) {
      const std::int64_t count = std::min(plan_.spans, ceil_div(longest - round, kSpan));
      threads_.run(plan_.num_tasks * count, [&](std::int64_t i, int thread) {
        const FullTask& task = plan_.tasks[i / count];
        const std::int64_t begin = round + i % count * kSpan;
        if (begin >= end(task)) return;
        float* q = plan_.scratch.of(thread);
        rotate_queries(task, q);
        attend_span(task, begin, q, plan_.partials + (i / count * plan_.spans + i % count) * size,
                    q + plan_.q_size + 2 * size);
      });
      threads_.run(plan_.num_tasks, [&](std::int64_t i, int) {
        const FullTask& task = plan_.tasks[i];
        float* totals = plan_.totals + i * size;
        for (std::int64_t s = 0; s < count && round + s * kSpan < end(task); ++s) {
          const float* sums = plan_.partials + (i * plan_.spans + s) * size;
          if (round + s > 0)
            add_span(task, round + s * kSpan, sums, totals);
          else
            std::copy_n(sums, task.count * plan_.sum_size, totals);
        }
        if (end(task) > round && end(task) <= round + count * kSpan) finish(task, totals);
      });
    }
  }

  const FullPlan& plan_;
  ContextLayout context_;
};

template <template <typename> class Operation, typename Plan, typename Config>
void run(ThreadPool& threads, Isa isa, const Config& config, const RaggedBatch& batch, const Plan& plan,
         const Matrix& qkv, const CpuStatePool& pool, int layer, const Matrix& out) {
  const SoftmaxAttentionKernels& kernels =
      for_isa(isa, [](auto tag) -> const SoftmaxAttentionKernels& { return softmax_attention_kernels(tag); });
  if (pool.ring_dtype() == DType::bfloat16)
    Operation<std::uint16_t>(threads, kernels, config, batch, plan, qkv, pool, layer, out).run();
  else
    Operation<float>(threads, kernels, config, batch, plan, qkv, pool, layer, out).run();
}

}  // namespace

std::size_t scratch_nbytes(const SlidingWindowConfig& config, const Lengths& lengths, Isa, int num_threads) {
  return plan_nbytes<WindowPlan>(config, lengths, num_threads);
}

std::size_t scratch_nbytes(const FullAttentionConfig& config, const Lengths& lengths, Isa, int num_threads) {
  return plan_nbytes<FullPlan>(config, lengths, num_threads);
}

void CpuBackend::sliding_window(const SlidingWindowConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                backend::StatePool& states, int layer, const Matrix& out) {
  const Lengths lengths(batch);
  Carver carver(scratch(scratch_nbytes(config, lengths, isa_, num_threads())));
  const WindowPlan plan(carver, config, lengths, num_threads());
  run<SlidingWindow>(*pool_, isa_, config, batch, plan, qkv, pool_of(states), layer, out);
}

void CpuBackend::full_attention(const FullAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                backend::StatePool& states, int layer, const Matrix& out) {
  const Lengths lengths(batch);
  Carver carver(scratch(scratch_nbytes(config, lengths, isa_, num_threads())));
  const FullPlan plan(carver, config, lengths, num_threads());
  run<FullAttention>(*pool_, isa_, config, batch, plan, qkv, pool_of(states), layer, out);
}

}  // namespace based::cpu
