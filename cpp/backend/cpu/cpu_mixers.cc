// Operations of a block other than its linear layers: how each is cut into tasks. The arithmetic is in kernels/.

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_states.h"
#include "backend/cpu/kernels/gated_conv.h"
#include "backend/cpu/kernels/linear_attention.h"
#include "backend/cpu/kernels/norm.h"
#include "backend/cpu/kernels/sliding_window.h"

namespace based::cpu {
namespace {

using backend::Matrix;
using backend::RaggedBatch;

std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

bool is_bf16(const Matrix& matrix) { return matrix.dtype == DType::bfloat16; }

void* element(const Matrix& matrix, std::int64_t row, std::int64_t col) {
  return static_cast<std::byte*>(matrix.data) +
         static_cast<std::size_t>(row * matrix.cols + col) * size_of(matrix.dtype);
}

const float* row(const Matrix& matrix, std::int64_t row) { return static_cast<const float*>(element(matrix, row, 0)); }

const CpuStatePool& pool_of(backend::StatePool& states) { return static_cast<CpuStatePool&>(states); }

// Uninitialised, aligned to 64 bytes. From the heap, which keeps its pages from call to call.
struct FreeFloats {
  void operator()(float* data) const { ::operator delete(data, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

Floats make_floats(std::int64_t size) {
  return Floats(
      static_cast<float*>(::operator new(static_cast<std::size_t>(size) * sizeof(float), std::align_val_t{64})));
}

// `size` floats for each thread.
class Scratch {
 public:
  Scratch(int num_threads, std::int64_t size)
      : stride_(round_up(size, kStateLanes)), data_(make_floats(stride_ * num_threads)) {}
  float* of(int thread) const { return data_.get() + thread * stride_; }

 private:
  std::int64_t stride_;
  Floats data_;
};

}  // namespace

// ---- norm -----------------------------------------------------------------------------------------------------------

void CpuBackend::norm(NormKind kind, double eps, const float* weight, const float* bias, const Matrix& r,
                      std::span<const std::int32_t> rows, const Matrix& out) {
  const NormKernels& kernels = for_isa(isa_, [](auto tag) -> const NormKernels& { return norm_kernels(tag); });
  const auto kernel = kind == NormKind::rms_norm ? kernels.rms_norm : kernels.layer_norm;
  const std::int64_t block = std::clamp<std::int64_t>(out.rows / (4 * num_threads()), 1, 32);
  pool_->run(ceil_div(out.rows, block), [&](std::int64_t task, int) {
    for (std::int64_t i = task * block; i < std::min(out.rows, (task + 1) * block); ++i) {
      const std::int64_t from = rows.empty() ? i : rows[static_cast<std::size_t>(i)];
      kernel({row(r, from), weight, bias, r.cols, eps, element(out, i, 0), is_bf16(out)});
    }
  });
}

// ---- gated conv -----------------------------------------------------------------------------------------------------

void CpuBackend::gated_conv(const GatedConvConfig& config, const float* taps, const RaggedBatch& batch, const Matrix& u,
                            backend::StatePool& states, int layer, const Matrix& out) {
  constexpr std::int64_t kTokens = 64, kChannels = 512;  // of a task
  const GatedConvKernels& kernels =
      for_isa(isa_, [](auto tag) -> const GatedConvKernels& { return gated_conv_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  const std::int64_t e = config.inner_size, past_rows = config.kernel_size - 1;

  struct Block {
    std::int64_t sequence, token_begin, token_end;
    bool whole;  // all tokens of its sequence
  };
  std::vector<Block> blocks;
  for (std::int64_t b = 0; b < batch.num_sequences(); ++b) {
    const std::int64_t tokens = batch.offsets[b + 1] - batch.offsets[b];
    for (std::int64_t t = 0; t < tokens; t += kTokens)
      blocks.push_back({b, t, std::min(t + kTokens, tokens), tokens <= kTokens});
  }

  // past = the last K − 1 rows of [past; u₁]
  const auto advance = [&](std::int64_t b, std::int64_t channel_begin, std::int64_t channel_end) {
    const std::int64_t tokens = batch.offsets[b + 1] - batch.offsets[b];
    float* past = pool.layer<float>(batch.slots[b], layer);
    for (std::int64_t i = 0; i < past_rows; ++i) {
      const std::int64_t t = tokens - past_rows + i;
      const float* from = t < 0 ? past + (t + past_rows) * e : row(u, batch.offsets[b] + t);
      std::copy(from + channel_begin, from + channel_end, past + i * e + channel_begin);
    }
  };

  const std::int64_t channel_blocks = ceil_div(e, kChannels);
  const Scratch scratch(num_threads(), config.kernel_size * kChannels);
  pool_->run(static_cast<std::int64_t>(blocks.size()) * channel_blocks, [&](std::int64_t task, int thread) {
    const Block& block = blocks[static_cast<std::size_t>(task / channel_blocks)];
    const std::int64_t first = batch.offsets[block.sequence];
    const std::int64_t channel_begin = task % channel_blocks * kChannels;
    const std::int64_t channel_end = std::min(channel_begin + kChannels, e);
    kernels.convolve({taps, row(u, first), pool.layer<float>(batch.slots[block.sequence], layer), e, config.kernel_size,
                      block.token_begin, block.token_end, channel_begin, channel_end, element(out, first, 0),
                      is_bf16(out), scratch.of(thread)});
    if (block.whole) advance(block.sequence, channel_begin, channel_end);
  });
  for (const Block& block : blocks)  // where another task may have read the past until now
    if (!block.whole && block.token_begin == 0) advance(block.sequence, 0, e);
}

// ---- linear attention -----------------------------------------------------------------------------------------------

void CpuBackend::linear_attention(const LinearAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                  backend::StatePool& states, int layer, const Matrix& out) {
  const LinearAttentionKernels& kernels =
      for_isa(isa_, [](auto tag) -> const LinearAttentionKernels& { return linear_attention_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  const TaylorLayout layout(config);
  const std::int64_t heads = config.num_heads, f = config.feature_dim, dv = config.head_dim;

  // With fewer heads than threads, a head's value columns are shared out too. Each share then keeps a z of its own.
  const std::int64_t pairs = batch.num_sequences() * heads;
  const std::int64_t wanted = std::clamp<std::int64_t>(ceil_div(num_threads(), pairs), 1, layout.cols / kStateLanes);
  const std::int64_t cols = round_up(ceil_div(layout.cols, wanted), kStateLanes);
  const std::int64_t shares = ceil_div(layout.cols, cols);
  const Floats shared_z = make_floats(shares > 1 ? pairs * shares * layout.size_z : 0);
  const auto state_of = [&](std::int64_t pair) {
    return pool.layer<float>(batch.slots[pair / heads], layer) + pair % heads * layout.head_size;
  };
  const auto z_of = [&](std::int64_t pair, std::int64_t share) {
    return shared_z.get() + (pair * shares + share) * layout.size_z;
  };
  const std::int64_t s_size = layout.rows * layout.cols;
  if (shares > 1) {
    for (std::int64_t pair = 0; pair < pairs; ++pair)
      for (std::int64_t share = 0; share < shares; ++share)
        std::copy_n(state_of(pair) + s_size, layout.size_z, z_of(pair, share));
  }

  const Scratch scratch(num_threads(), kernels.scratch_size(f, layout.num_features, cols));
  pool_->run(pairs * shares, [&](std::int64_t index, int thread) {
    const std::int64_t pair = index / shares, share = index % shares, b = pair / heads, h = pair % heads;
    const std::int64_t first = batch.offsets[b], col = share * cols;
    const float* x = row(qkv, first);
    float* state = state_of(pair);
    LinearAttentionTask task;
    task.q = x + h * f;
    task.k = x + (heads + h) * f;
    task.v = x + 2 * heads * f + h * dv + col;
    task.stride = qkv.cols;
    task.num_tokens = batch.offsets[b + 1] - first;
    task.feature_dim = f;
    task.num_features = layout.num_features;
    task.head_dim = std::min(cols, dv - col);
    task.eps = config.eps;
    task.state = state + col;
    task.state_cols = layout.cols;
    task.cols = std::min(cols, layout.cols - col);
    task.z = shares > 1 ? z_of(pair, share) : state + s_size;
    task.out = element(out, first, h * dv + col);
    task.out_stride = out.cols;
    task.out_bf16 = is_bf16(out);
    task.scratch = scratch.of(thread);
    kernels.attend(task);
  });
  if (shares > 1) {
    for (std::int64_t pair = 0; pair < pairs; ++pair)
      std::copy_n(z_of(pair, 0), layout.size_z, state_of(pair) + s_size);
  }
}

// ---- sliding window -------------------------------------------------------------------------------------------------

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
        ring_(config),
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
