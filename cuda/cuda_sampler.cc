#include "cuda_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>
#include <utility>

#include "based/error.h"
#include "cuda_error.h"

namespace based::cuda {
namespace {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// The least float that is not less than x.
float round_up(double x) {
  const auto rounded = static_cast<float>(x);
  return rounded < x ? std::nextafter(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

std::vector<BiasedToken> biased_tokens(const SamplingParams& params) {
  std::vector<BiasedToken> tokens;
  for (const auto& [token, bias] : params.logit_bias)
    tokens.push_back({static_cast<std::int32_t>(token), static_cast<float>(bias)});
  std::stable_sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  return tokens;
}

std::string reason(SamplingFailure failure, std::int64_t vocab_size) {
  switch (failure) {
    case SamplingFailure::no_logit:
      return "all " + std::to_string(vocab_size) + " logits are NaN or -inf";
    case SamplingFailure::no_token:
      return "logit_bias, min_tokens and penalties leave no token with a logit above -inf";
    default:
      return "the row has no token to go on from: none was sampled, or sampling it failed";
  }
}

}  // namespace

CudaSampler::CudaSampler(SamplerHost& host, std::int64_t vocab_size, int num_rows)
    : host_(host), device_(current_device()), vocab_size_(vocab_size), rows_(static_cast<std::size_t>(num_rows)) {
  if (vocab_size > kMaxVocabSize)
    throw UnsupportedError("sampling on a CUDA device: the vocabulary has " + std::to_string(vocab_size) +
                           " tokens, at most " + std::to_string(kMaxVocabSize) + " are supported");
  const auto rows = static_cast<std::size_t>(num_rows);
  const std::size_t counters_at = rows * sizeof(SamplerRow), chosen_at = counters_at + 2 * sizeof(std::uint32_t);
  memory_ = host_.allocate_workspace(chosen_at + rows * sizeof(std::int32_t));
  ring_ = allocate_pinned(kRing * rows * sizeof(SamplingResult));
  auto* data = static_cast<std::byte*>(memory_.data.get());
  view_ = {reinterpret_cast<SamplerRow*>(data),
           reinterpret_cast<std::int32_t*>(data + chosen_at),
           reinterpret_cast<std::uint32_t*>(data + counters_at),
           static_cast<SamplingResult*>(ring_.get()),
           num_rows,
           kRing};
  check(cudaMemsetAsync(data, 0, chosen_at, host_.stream()), "make_sampler");
  check(cudaMemsetAsync(view_.chosen, 0xff, rows * sizeof(std::int32_t), host_.stream()), "make_sampler");  // −1
}

// The kernels of steps under way write to pinned memory, which is not freed in the order of the stream.
CudaSampler::~CudaSampler() { keep_failure(cudaStreamSynchronize(host_.stream()), "ending a sampler"); }

backend::Buffer CudaSampler::upload(const void* values, std::size_t nbytes) {
  if (nbytes == 0) return {};
  backend::Buffer buffer = host_.allocate_workspace(nbytes);
  host_.copy_staged(buffer.data.get(), values, nbytes);
  return buffer;
}

void CudaSampler::assign(int row, const SamplingParams& params, std::uint64_t seed, std::uint32_t sequence,
                         std::span<const std::int32_t> prompt, std::span<const std::int32_t> stop_ids,
                         std::span<const backend::SeenToken> seen) {
  if (row < 0 || static_cast<std::size_t>(row) >= rows_.size())
    throw InvalidArgument("sampler: row " + std::to_string(row) + " of " + std::to_string(rows_.size()));
  params.validate(vocab_size_);
  const bool penalises =
      params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0;
  if (penalises)
    for (std::int32_t token : prompt)
      if (token < 0 || token >= vocab_size_)
        throw InvalidArgument("sampler: prompt token " + std::to_string(token) + ", expected 0 … " +
                              std::to_string(vocab_size_ - 1));
  std::vector<std::int32_t> stop;
  if (params.min_tokens > 0)
    std::copy_if(stop_ids.begin(), stop_ids.end(), std::back_inserter(stop),
                 [&](std::int32_t token) { return token >= 0 && token < vocab_size_; });
  const std::vector<BiasedToken> bias = biased_tokens(params);

  const UseDevice use(device_);
  const Row& old = rows_[static_cast<std::size_t>(row)];
  const std::size_t padded_nbytes = static_cast<std::size_t>(padded_vocabulary(vocab_size_)) * sizeof(float);
  const auto kept = [&](const backend::Buffer& buffer) {
    return buffer.data != nullptr ? buffer : host_.allocate_workspace(padded_nbytes);
  };
  Row fresh;
  fresh.bias = upload(bias.data(), bias.size() * sizeof(BiasedToken));
  fresh.stop = upload(stop.data(), stop.size() * sizeof(std::int32_t));
  if (penalises || !bias.empty() || !stop.empty()) fresh.changed_logits = kept(old.changed_logits);
  backend::Buffer tokens;
  std::vector<std::uint32_t> seen_before;  // by token; empty: nothing was seen
  if (penalises) {
    fresh.seen = kept(old.seen);
    if (seen.empty()) {
      tokens = upload(prompt.data(), prompt.size_bytes());
    } else {
      seen_before.resize(padded_nbytes / sizeof(float));
      for (const auto& [token, in_prompt, num_outputs] : seen)
        seen_before[static_cast<std::size_t>(token)] =
            (in_prompt ? kInPrompt : 0) | static_cast<std::uint32_t>(num_outputs);
      for (const std::int32_t token : prompt) seen_before[static_cast<std::size_t>(token)] |= kInPrompt;
    }
  }
  fresh.num_top = static_cast<int>(std::min<std::int64_t>(params.logprobs.value_or(0), vocab_size_));
  fresh.top_logprobs = old.top_logprobs;
  fresh.top_capacity = old.top_capacity;
  // Results that were not taken are read from the old memory.
  const bool shared = fresh.top_logprobs.use_count() > 2;
  if (fresh.num_top > 0 && (fresh.num_top > old.top_capacity || shared)) {
    fresh.top_logprobs = allocate_pinned(kRing * static_cast<std::size_t>(fresh.num_top) * sizeof(TokenLogprob));
    fresh.top_capacity = fresh.num_top;
  }

  // Nothing was changed so far that the row still uses.
  if (!seen_before.empty()) {
    host_.copy_staged(fresh.seen.data.get(), seen_before.data(), padded_nbytes);
  } else if (penalises) {
    check(cudaMemsetAsync(fresh.seen.data.get(), 0, padded_nbytes, host_.stream()), "assign");
    mark_prompt(host_.stream(), static_cast<const std::int32_t*>(tokens.data.get()),
                static_cast<std::int64_t>(prompt.size()), static_cast<std::uint32_t*>(fresh.seen.data.get()));
  }
  SamplerRow state;
  state.seed = seed;
  state.sequence = sequence;
  state.draws = params.temperature > 0;
  // With a temperature of almost 0 only the maximum keeps a weight.
  if (state.draws)
    state.inverse_temperature = static_cast<float>(std::min(1.0 / params.temperature, 1e30) * std::numbers::log2e);
  state.min_p = round_up(params.min_p);
  state.top_p = params.top_p;
  state.top_k = static_cast<std::int32_t>(std::clamp<std::int64_t>(params.top_k, 0, kMaxVocabSize));
  state.num_bias = static_cast<std::int32_t>(bias.size());
  state.num_stop = static_cast<std::int32_t>(stop.size());
  state.num_top = fresh.num_top;
  state.min_tokens = params.min_tokens;
  state.repetition_penalty = params.repetition_penalty;
  state.presence_penalty = params.presence_penalty;
  state.frequency_penalty = params.frequency_penalty;
  state.bias = static_cast<const BiasedToken*>(fresh.bias.data.get());
  state.stop = static_cast<const std::int32_t*>(fresh.stop.data.get());
  state.seen = static_cast<std::uint32_t*>(fresh.seen.data.get());
  state.changed_logits = static_cast<float*>(fresh.changed_logits.data.get());
  state.top_logprobs = static_cast<TokenLogprob*>(fresh.top_logprobs.get());
  store_row(host_.stream(), view_, row, state);
  rows_[static_cast<std::size_t>(row)] = std::move(fresh);
}

void CudaSampler::sample(const backend::Matrix& logits, const backend::RaggedBatch& batch) {
  const UseDevice use(device_);
  cuda::sample(host_.stream(), view_, host_.device_batch(batch), static_cast<const float*>(logits.data), logits.cols,
               vocab_size_);
  host_.after_launch([this](const backend::RaggedBatch& done) { launched(done); });
}

void CudaSampler::launched(const backend::RaggedBatch& batch) {
  Pending step;
  step.entry = num_launched_++ % kRing;
  events_[step.entry].record(host_.stream(), "sample");
  if (pending_.size() >= kRing) throw Error("sampler: " + std::to_string(kRing) + " steps wait to be taken");
  step.slots.assign(batch.slots.begin(), batch.slots.end());
  for (std::size_t b = 0; b < step.slots.size(); ++b) {
    step.positions.push_back(batch.positions[b] + batch.offsets[b + 1] - batch.offsets[b]);
    if (step.slots[b] < 0) continue;
    const Row& row = rows_[static_cast<std::size_t>(step.slots[b])];
    if (row.num_top == 0) continue;
    step.top.resize(step.slots.size());
    step.top[b] = {row.top_logprobs, row.num_top};
  }
  pending_.push_back(std::move(step));
}

std::vector<backend::SampledToken> CudaSampler::take() {
  if (pending_.empty()) throw Error("sampler: no step waits to be taken");
  const Pending step = std::move(pending_.front());
  pending_.pop_front();
  events_[step.entry].wait("sample");
  const auto* entry = static_cast<const SamplingResult*>(ring_.get()) + step.entry * rows_.size();
  std::vector<backend::SampledToken> tokens(step.slots.size());
  for (std::size_t b = 0; b < tokens.size(); ++b) {
    const std::int32_t slot = step.slots[b];
    if (slot < 0) continue;
    const SamplingResult& result = entry[slot];
    tokens[b].token = result.token;
    tokens[b].logprob = result.logprob;
    if (result.failure != SamplingFailure::none)
      tokens[b].failure = "sampling row " + std::to_string(slot) + " at position " + std::to_string(step.positions[b]) +
                          ": " + reason(result.failure, vocab_size_);
    if (result.num_top == 0) continue;
    const auto* top = static_cast<const TokenLogprob*>(step.top[b].logprobs.get()) + step.entry * step.top[b].num_top;
    tokens[b].top_logprobs.assign(top, top + result.num_top);
  }
  return tokens;
}

}  // namespace based::cuda
