// Norms, gated conv and linear attention: how each is cut into tasks. The arithmetic is in kernels/.

#include <algorithm>
#include <span>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_operands.h"
#include "backend/cpu/kernels/gated_conv.h"
#include "backend/cpu/kernels/linear_attention.h"
#include "backend/cpu/kernels/norm.h"

namespace based::cpu {

using backend::Matrix;
using backend::RaggedBatch;

// ---- norm -----------------------------------------------------------------------------------------------------------

void CpuBackend::norm(NormKind kind, double eps, const float* weight, const float* bias, const Matrix& r,
                      std::span<const std::int32_t> rows, const Matrix& out) {
  const NormKernels& kernels = for_isa(isa_, [](auto tag) -> const NormKernels& { return norm_kernels(tag); });
  const auto kernel = kind == NormKind::rms_norm ? kernels.rms_norm : kernels.layer_norm;
  const std::int64_t block = std::clamp<std::int64_t>(out.rows / (4 * num_threads()), 1, 32);
  pool_->run(ceil_div(out.rows, block), [&](std::int64_t task, int) {
    for (std::int64_t i = task * block; i < std::min(out.rows, (task + 1) * block); ++i) {
      const std::int64_t from = rows.empty() ? i : rows[static_cast<std::size_t>(i)];
      if (from < 0) continue;
      kernel({row(r, from), weight, bias, r.cols, eps, element(out, i, 0), is_bf16(out)});
    }
  });
}

// ---- gated conv -----------------------------------------------------------------------------------------------------

namespace {

constexpr std::int64_t kConvTokens = 64, kConvChannels = 512;  // of a task

struct ConvPlan {
  struct Block {
    std::int64_t sequence, token_begin, token_end;
    bool whole;  // all tokens of its sequence
  };
  std::int64_t num_blocks;
  Block* blocks;
  ThreadFloats scratch;

  ConvPlan(Carver& carver, std::int64_t kernel_size, const Lengths& lengths, int num_threads)
      : num_blocks(count_blocks(lengths)),
        blocks(carver.take<Block>(num_blocks)),
        scratch(carver, num_threads, kernel_size * kConvChannels) {}

  static std::int64_t count_blocks(const Lengths& lengths) {
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < lengths.num_sequences(); ++b) count += ceil_div(lengths.tokens(b), kConvTokens);
    return count;
  }
};

}  // namespace

std::size_t scratch_nbytes(const GatedConvConfig& config, const Lengths& lengths, Isa, int num_threads) {
  return conv_scratch_nbytes(config.kernel_size, lengths, num_threads);
}

std::size_t conv_scratch_nbytes(std::int64_t kernel_size, const Lengths& lengths, int num_threads) {
  return plan_nbytes<ConvPlan>(kernel_size, lengths, num_threads);
}

void CpuBackend::gated_conv(const GatedConvConfig& config, const float* taps, const RaggedBatch& batch, const Matrix& u,
                            backend::StatePool& states, int layer, const Matrix& out) {
  convolve(config.kernel_size, taps, nullptr, true, batch, u, states, layer, out);
}

void CpuBackend::convolve(std::int64_t kernel_size, const float* taps, const float* bias, bool gated,
                          const RaggedBatch& batch, const Matrix& u, backend::StatePool& states, int layer,
                          const Matrix& out) {
  const GatedConvKernels& kernels =
      for_isa(isa_, [](auto tag) -> const GatedConvKernels& { return gated_conv_kernels(tag); });
  const CpuStatePool& pool = pool_of(states);
  const std::int64_t e = out.cols, past_rows = kernel_size - 1;

  const Lengths lengths(batch);
  Carver carver(scratch(conv_scratch_nbytes(kernel_size, lengths, num_threads())));
  const ConvPlan plan(carver, kernel_size, lengths, num_threads());
  ConvPlan::Block* next = plan.blocks;
  for (std::int64_t b = 0; b < batch.num_sequences(); ++b) {
    const std::int64_t tokens = lengths.tokens(b);
    for (std::int64_t t = 0; t < tokens; t += kConvTokens)
      *next++ = {b, t, std::min(t + kConvTokens, tokens), tokens <= kConvTokens};
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

  const std::int64_t channel_blocks = ceil_div(e, kConvChannels);
  pool_->run(plan.num_blocks * channel_blocks, [&](std::int64_t task, int thread) {
    const ConvPlan::Block& block = plan.blocks[task / channel_blocks];
    const std::int64_t first = batch.offsets[block.sequence];
    const std::int64_t channel_begin = task % channel_blocks * kConvChannels;
    const std::int64_t channel_end = std::min(channel_begin + kConvChannels, e);
    kernels.convolve({taps, bias, gated, row(u, first), pool.layer<float>(batch.slots[block.sequence], layer), e,
                      kernel_size, u.cols, block.token_begin, block.token_end, channel_begin, channel_end,
                      element(out, first, 0), is_bf16(out), plan.scratch.of(thread)});
    if (block.whole) advance(block.sequence, channel_begin, channel_end);
  });
  for (const ConvPlan::Block& block :
       std::span(plan.blocks, next))  // where another task may have read the past until now
    if (!block.whole && block.token_begin == 0) advance(block.sequence, 0, e);
}

// ---- linear attention -----------------------------------------------------------------------------------------------

namespace {

const LinearAttentionKernels& attention_kernels(Isa isa) {
  return for_isa(isa, [](auto tag) -> const LinearAttentionKernels& { return linear_attention_kernels(tag); });
}

// With fewer heads than threads, a head's value columns are shared out too. Each share then keeps a z of its own.
struct TaylorPlan {
  TaylorLayout layout;
  std::int64_t pairs;   // of a sequence and a head
  std::int64_t cols;    // of a share
  std::int64_t shares;  // of a pair
  float* shared_z;      // (pairs, shares, size_z); unused with one share
  ThreadFloats scratch;

  TaylorPlan(Carver& carver, const LinearAttentionConfig& config, const Lengths& lengths, Isa isa, int num_threads)
      : layout(config.taylor()),
        pairs(lengths.num_sequences() * config.num_heads),
        cols(share_cols(layout.cols, pairs, num_threads)),
        shares(ceil_div(layout.cols, cols)),
        shared_z(carver.take<float>(shares > 1 ? pairs * shares * layout.size_z : 0)),
        scratch(carver, num_threads,
                attention_kernels(isa).scratch_size(config.feature_dim, layout.num_features, cols)) {}

  static std::int64_t share_cols(std::int64_t cols, std::int64_t pairs, int num_threads) {
    const std::int64_t wanted = std::clamp<std::int64_t>(ceil_div(num_threads, pairs), 1, cols / kStateLanes);
    return round_up(ceil_div(cols, wanted), kStateLanes);
  }
};

}  // namespace

std::size_t scratch_nbytes(const LinearAttentionConfig& config, const Lengths& lengths, Isa isa, int num_threads) {
  return plan_nbytes<TaylorPlan>(config, lengths, isa, num_threads);
}

std::size_t scratch_nbytes(const PrefixLinearAttentionConfig& config, const Lengths& lengths, Isa isa,
                           int num_threads) {
  return scratch_nbytes(config.attention(), lengths, isa, num_threads);
}

void CpuBackend::linear_attention(const LinearAttentionConfig& config, const RaggedBatch& batch, const Matrix& qkv,
                                  backend::StatePool& states, int layer, const Matrix& out) {
  taylor_attention(config, 0, batch, qkv, nullptr, states, layer, out);
}

void CpuBackend::prefix_linear_attention(const PrefixLinearAttentionConfig& config, const RaggedBatch& batch,
                                         const Matrix& qkv, const Matrix& encoder, backend::StatePool& states,
                                         int layer, const Matrix& out) {
  taylor_attention(config.attention(), config.enc_length, batch, qkv, &encoder, states, layer, out);
}

void CpuBackend::taylor_attention(const LinearAttentionConfig& config, std::int64_t enc_length,
                                  const RaggedBatch& batch, const Matrix& qkv, const Matrix* encoder,
                                  backend::StatePool& states, int layer, const Matrix& out) {
  const LinearAttentionKernels& kernels = attention_kernels(isa_);
  const CpuStatePool& pool = pool_of(states);
  const Lengths lengths(batch);
  Carver carver(scratch(scratch_nbytes(config, lengths, isa_, num_threads())));
  const TaylorPlan plan(carver, config, lengths, isa_, num_threads());
  const TaylorLayout& layout = plan.layout;
  const std::int64_t pairs = plan.pairs, cols = plan.cols, shares = plan.shares;
  const std::int64_t heads = config.num_heads, f = config.feature_dim, dv = config.head_dim;

  const auto state_of = [&](std::int64_t pair) {
    return pool.layer<float>(batch.slots[pair / heads], layer) + pair % heads * layout.head_size;
  };
  const auto z_of = [&](std::int64_t pair, std::int64_t share) {
    return plan.shared_z + (pair * shares + share) * layout.size_z;
  };
  const std::int64_t s_size = layout.rows * layout.cols;
  if (shares > 1) {
    for (std::int64_t pair = 0; pair < pairs; ++pair)
      for (std::int64_t share = 0; share < shares; ++share)
        std::copy_n(state_of(pair) + s_size, layout.size_z, z_of(pair, share));
  }

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
    task.count = batch.positions[b] + enc_length;
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
    task.scratch = plan.scratch.of(thread);
    if (encoder != nullptr && batch.positions[b] == 0) {  // the prefix comes first: every token sees all of it
      LinearAttentionTask prefix = task;
      prefix.k = row(*encoder, first) + h * f;
      prefix.v = row(*encoder, first) + heads * f + h * dv + col;
      prefix.stride = encoder->cols;
      prefix.num_tokens = std::min(enc_length, task.num_tokens);
      kernels.add(prefix);
    }
    kernels.attend(task);
  });
  if (shares > 1) {
    for (std::int64_t pair = 0; pair < pairs; ++pair)
      std::copy_n(z_of(pair, 0), layout.size_z, state_of(pair) + s_size);
  }
}

}  // namespace based::cpu
