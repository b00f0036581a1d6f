// Sliding-window attention: rotary, rings, and how the work is cut into tasks. The arithmetic is in kernels/.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/sliding_window.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

namespace {

static_assert(kKeyBlock == kStateLanes);

// cos and sin of every token's angles, (N, num_pairs) each. In double: a position may be large.
class RotaryTable {
 public:
  RotaryTable(ThreadPool& threads, const SlidingWindowConfig& config, const RaggedBatch& batch)
      : num_pairs_((config.rotary_dim + 1) / 2), num_tokens_(batch.num_tokens()) {
    if (num_pairs_ == 0) return;
    table_ = make_floats(2 * num_tokens_ * num_pairs_);
    std::vector<double> frequency(static_cast<std::size_t>(num_pairs_));
    for (std::int64_t i = 0; i < num_pairs_; ++i)
      frequency[static_cast<std::size_t>(i)] =
          std::pow(config.rotary_base, -2.0 * static_cast<double>(i) / static_cast<double>(config.rotary_dim));
    std::vector<std::int64_t> positions(static_cast<std::size_t>(num_tokens_));
    for (std::int64_t b = 0; b < batch.num_sequences(); ++b)
      for (std::int64_t t = batch.offsets[b]; t < batch.offsets[b + 1]; ++t)
        positions[static_cast<std::size_t>(t)] = batch.positions[b] + t - batch.offsets[b];
    float* cosine = table_.get();
    float* sine = cosine + num_tokens_ * num_pairs_;
    constexpr std::int64_t kTokens = 16;
    threads.run(ceil_div(num_tokens_, kTokens), [&](std::int64_t task, int) {
      for (std::int64_t t = task * kTokens; t < std::min(num_tokens_, (task + 1) * kTokens); ++t) {
        for (std::int64_t i = 0; i < num_pairs_; ++i) {
          const double angle =
              static_cast<double>(positions[static_cast<std::size_t>(t)]) * frequency[static_cast<std::size_t>(i)];
          cosine[t * num_pairs_ + i] = static_cast<float>(std::cos(angle));
          sine[t * num_pairs_ + i] = static_cast<float>(std::sin(angle));
        }
      }
    });
  }
  std::int64_t num_pairs() const { return num_pairs_; }
  const float* cosine(std::int64_t token) const { return table_.get() + token * num_pairs_; }
  const float* sine(std::int64_t token) const { return cosine(num_tokens_ + token); }

 private:
  std::int64_t num_pairs_, num_tokens_;
  Floats table_;
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
                const RaggedBatch& batch, const Matrix& qkv, const CpuStatePool& states, int layer, const Matrix& out)
      : threads_(threads),
        kernels_(kernels),
        config_(config),
        batch_(batch),
        qkv_(qkv),
        states_(states),
        layer_(layer),
        out_(out),
        ring_(config.ring()),
        rotary_(threads, config, batch) {}

  void run() {
    // Sequences of several tokens read keys and values from a copy: those in the ring that any query sees, then the
    // call's. Of one head: keys by blocks, values by rows, as in a ring, float.
    std::int64_t copied = 0, max_blocks = 0;
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b) {
      const std::int64_t start = batch_.positions[b], tokens = batch_.offsets[b + 1] - batch_.offsets[b];
      Sequence s{start, tokens, batch_.offsets[b], first_key(start) / kKeyBlock, 0, nullptr};
      s.num_blocks = (start + tokens - 1) / kKeyBlock + 1 - s.first_block;
      max_blocks = std::max(max_blocks, std::min(s.num_blocks, ceil_div(config_.window + kQueryBlock, kKeyBlock) + 1));
      sequences_.push_back(s);
      if (tokens > 1) copied += config_.num_kv_heads * copy_size(s);
    }
    const Floats copies = make_floats(copied);
    float* copy = copies.get();
    std::vector<Task> fills, tasks;
    for (std::int64_t b = 0; b < batch_.num_sequences(); ++b) {
      Sequence& s = sequences_[static_cast<std::size_t>(b)];
      for (std::int64_t kv = 0; kv < config_.num_kv_heads; ++kv) {
        if (s.tokens > 1) fills.push_back({b, kv, 0});
        for (std::int64_t t = 0; t < s.tokens; t += kTaskTokens) tasks.push_back({b, kv, t});
      }
      if (s.tokens > 1) {
        s.copy = copy;
        copy += config_.num_kv_heads * copy_size(s);
      }
    }
    q_size_ = round_up(kQueryBlock * config_.head_dim, kStateLanes);
    const Scratch scratch(threads_.num_threads(), q_size_ + kQueryBlock * kKeyBlock * max_blocks);
    threads_.run(static_cast<std::int64_t>(fills.size()),
                 [&](std::int64_t i, int thread) { fill(fills[static_cast<std::size_t>(i)], scratch.of(thread)); });
    threads_.run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int thread) {
      const Task& task = tasks[static_cast<std::size_t>(i)];
      sequences_[static_cast<std::size_t>(task.sequence)].tokens > 1 ? attend_tokens(task, scratch.of(thread))
                                                                     : attend_token(task, scratch.of(thread));
    });
  }

 private:
  static constexpr std::int64_t kTaskTokens = 32;

  struct Sequence {
    std::int64_t start, tokens;
    std::int64_t row;                      // of its first token
    std::int64_t first_block, num_blocks;  // of all keys that it sees in this call
    float* copy;
  };
  struct Task {
    std::int64_t sequence, kv_head, token;
  };

  std::int64_t first_key(std::int64_t position) const {
    return std::max<std::int64_t>(0, position - config_.window + 1);
  }
  std::int64_t group() const { return config_.num_heads / config_.num_kv_heads; }
  std::int64_t copy_size(const Sequence& s) const { return s.num_blocks * kKeyBlock * (config_.head_dim + ring_.cols); }
  T* ring_of(const Task& task) const {
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
    kernels_.rotate({input(token, head), y, rotary_.cosine(token), rotary_.sine(token), rotary_.num_pairs(),
                     config_.head_dim, config_.rotary_interleaved, is_key && sizeof(T) == 2, scale});
  }

  // Copies what the queries see of the ring, adds the call's keys and values, and brings the ring up to date.
  void fill(const Task& task, float* key) const {
    const Sequence& s = sequences_[static_cast<std::size_t>(task.sequence)];
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
  void attend_tokens(const Task& task, float* scratch) const {
    const Sequence& s = sequences_[static_cast<std::size_t>(task.sequence)];
    const float* keys = s.copy + task.kv_head * copy_size(s);
    WindowAttendTask attend;
    attend.window = {keys,         keys + s.num_blocks * kKeyBlock * config_.head_dim,
                     false,        s.first_block,
                     s.num_blocks, config_.head_dim,
                     ring_.cols};
    attend.q = scratch;
    attend.out_bf16 = is_bf16(out_);
    attend.scratch = scratch + q_size_;
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
  void attend_token(const Task& task, float* scratch) const {
    const Sequence& s = sequences_[static_cast<std::size_t>(task.sequence)];
    T* ring = ring_of(task);
    rotate(s.row, config_.num_heads + task.kv_head, 1.0f, scratch);
    keep(ring, s.start, scratch, input(s.row, config_.num_heads + config_.num_kv_heads + task.kv_head));
    WindowAttendTask attend;
    attend.window = {ring,      ring + ring_.keys_size, sizeof(T) == 2, 0, ring_.slots / kKeyBlock, config_.head_dim,
                     ring_.cols};
    attend.q = scratch;
    attend.out_bf16 = is_bf16(out_);
    attend.scratch = scratch + q_size_;
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
  const Matrix& qkv_;
  const CpuStatePool& states_;
  int layer_;
  const Matrix& out_;
  RingLayout ring_;
  RotaryTable rotary_;
  std::vector<Sequence> sequences_;
  std::int64_t q_size_ = 0;
};

}  // namespace

void CpuBackend::sliding_window(const SlidingWindowConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                backend::StatePool& states, int layer, const Matrix& out) {
  const SlidingWindowKernels& kernels =
      for_isa(isa_, [](auto tag) -> const SlidingWindowKernels& { return sliding_window_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  if (pool.ring_dtype() == DType::bfloat16) {
    SlidingWindow<std::uint16_t>(*pool_, kernels, config, batch, qkv, pool, layer, out).run();
  } else {
    SlidingWindow<float>(*pool_, kernels, config, batch, qkv, pool, layer, out).run();
  }
}

}  // namespace based::cpu
