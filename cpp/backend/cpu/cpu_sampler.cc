#include "backend/cpu/cpu_sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/philox.h"
#include "based/error.h"

namespace based::cpu {
namespace {

const SoftmaxKernels& kernels_for(Isa isa) {
  return for_isa(isa, [](auto tag) -> const SoftmaxKernels& { return softmax_kernels(tag); });
}

const float* row_of(const backend::Matrix& logits, std::int64_t row) {
  return static_cast<const float*>(logits.data) + row * logits.cols;
}

// log softmax of a logit; `stats` are its row's.
float log_softmax(float logit, const SoftmaxStats& stats) {
  const double x = std::min(logit, FLT_MAX);  // as in stats; NaN stays NaN
  return static_cast<float>((logit == logit ? x : std::nan("")) - stats.max - std::log(stats.sum));
}

// Likelier first.
constexpr auto kByLogit = [](const auto& a, const auto& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void CpuBackend::token_log_probs(const backend::Matrix& logits, std::int64_t vocab_size,
                                 std::span<const std::int32_t> targets, std::span<float> out) {
  const SoftmaxKernels& kernels = kernels_for(isa_);
  pool_->run(logits.rows, [&](std::int64_t i, int) {
    const float* x = row_of(logits, i);
    const auto at = static_cast<std::size_t>(i);
    out[at] = log_softmax(x[targets[at]], kernels.stats(x, vocab_size));
  });
}

std::unique_ptr<backend::Sampler> CpuBackend::make_sampler(std::int64_t vocab_size, int num_rows) {
  return std::make_unique<CpuSampler>(pool_, kernels_for(isa_), vocab_size, num_rows);
}

// ---- a row's params and history -------------------------------------------------------------------------------------

bool CpuSampler::Row::has_penalties() const {
  return params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0;
}

bool CpuSampler::Row::changes_logits() const {
  return has_penalties() || !params.logit_bias.empty() || (num_output < params.min_tokens && !stop_ids.empty());
}

bool CpuSampler::Row::selects() const { return params.top_k > 0 || params.top_p < 1 || params.min_p > 0; }

void CpuSampler::Row::see(std::int32_t token, bool in_prompt) {
  std::int32_t& number = seen_number[static_cast<std::size_t>(token)];
  if (number == 0) {
    seen.push_back({token, 0, false});
    number = static_cast<std::int32_t>(seen.size());
  }
  Seen& entry = seen[static_cast<std::size_t>(number - 1)];
  in_prompt ? static_cast<void>(entry.in_prompt = true) : static_cast<void>(++entry.count);
}

CpuSampler::CpuSampler(std::shared_ptr<ThreadPool> pool, const SoftmaxKernels& kernels, std::int64_t vocab_size,
                       int num_rows)
    : pool_(std::move(pool)),
      kernels_(kernels),
      vocab_size_(vocab_size),
      rows_(static_cast<std::size_t>(num_rows)),
      workspaces_(static_cast<std::size_t>(pool_->num_threads())) {}

void CpuSampler::assign(int row, const SamplingParams& params, std::uint64_t seed, std::uint32_t sequence,
                        std::span<const std::int32_t> prompt, std::span<const std::int32_t> stop_ids,
                        std::span<const backend::SeenToken> seen) {
  if (row < 0 || static_cast<std::size_t>(row) >= rows_.size())
    throw InvalidArgument("sampler: row " + std::to_string(row) + " of " + std::to_string(rows_.size()));
  params.validate(vocab_size_);
  Row fresh;
  fresh.params = params;
  fresh.seed = seed;
  fresh.sequence = sequence;
  for (std::int32_t token : stop_ids)  // an end token may lie outside of a small vocabulary
    if (token >= 0 && token < vocab_size_) fresh.stop_ids.push_back(token);
  if (fresh.has_penalties()) {
    fresh.seen_number.assign(static_cast<std::size_t>(vocab_size_), 0);
    for (const auto& [token, in_prompt, num_outputs] : seen) {
      fresh.seen.push_back({token, num_outputs, in_prompt});
      fresh.seen_number[static_cast<std::size_t>(token)] = static_cast<std::int32_t>(fresh.seen.size());
    }
    for (std::int32_t token : prompt) {
      if (token < 0 || token >= vocab_size_)
        throw InvalidArgument("sampler: prompt token " + std::to_string(token) + ", expected 0 … " +
                              std::to_string(vocab_size_ - 1));
      fresh.see(token, true);
    }
  }
  rows_[static_cast<std::size_t>(row)] = std::move(fresh);
}

// ---- sampling -------------------------------------------------------------------------------------------------------

void CpuSampler::reserve(std::span<const std::int32_t> rows) {
  bool change = false, draw = false, select = false;
  for (std::int32_t r : rows) {
    Row& row = rows_[static_cast<std::size_t>(r)];
    change |= row.changes_logits();
    draw |= row.params.temperature > 0;
    select |= row.selects() || row.params.logprobs.value_or(0) > 0;
    if (row.has_penalties() && row.seen.size() == row.seen.capacity()) row.seen.reserve(2 * row.seen.size() + 16);
  }
  const auto size = static_cast<std::size_t>(vocab_size_);
  for (Workspace& workspace : workspaces_) {
    if (change) workspace.logits.resize(size);
    if (draw) workspace.weights.resize(size);
    if (select) workspace.candidates.resize(size);
  }
}

void CpuSampler::sample(const backend::Matrix& logits, const backend::RaggedBatch& batch) {
  const std::span<const std::int32_t> rows = batch.slots;
  const auto position = [&](std::size_t i) { return batch.positions[i] + batch.offsets[i + 1] - batch.offsets[i]; };
  if (steps_.size() >= kMaxSteps) throw Error("sampler: " + std::to_string(kMaxSteps) + " steps wait to be taken");
  reserve(rows);
  std::vector<backend::SampledToken> results(rows.size());
  std::vector<Failure> failures(rows.size(), Failure::none);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t wanted = rows_[static_cast<std::size_t>(rows[i])].params.logprobs.value_or(0);
    results[i].top_logprobs.reserve(static_cast<std::size_t>(std::min(wanted, vocab_size_)));
  }
  pool_->run(static_cast<std::int64_t>(rows.size()), [&](std::int64_t task, int thread) {
    const auto i = static_cast<std::size_t>(task);
    const std::int64_t logits_row = batch.logit_rows.empty() ? task : batch.logit_rows[i];
    failures[i] = choose(rows_[static_cast<std::size_t>(rows[i])], row_of(logits, logits_row), position(i),
                         workspaces_[static_cast<std::size_t>(thread)], results[i]);
  });
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (failures[i] == Failure::none) continue;
    const std::string where =
        "sampling row " + std::to_string(rows[i]) + " at position " + std::to_string(position(i)) + ": ";
    results[i] = {};
    results[i].token = -1;
    results[i].failure = where + (failures[i] == Failure::no_logit
                                      ? "all " + std::to_string(vocab_size_) + " logits are NaN or -inf"
                                      : "logit_bias, min_tokens and penalties leave no token with a logit above -inf");
  }
  steps_.push_back(std::move(results));  // may fail; what follows does not
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows_[static_cast<std::size_t>(rows[i])];
    const std::int32_t token = steps_.back()[i].token;
    row.chosen = token;
    if (token < 0) continue;
    ++row.num_output;
    if (row.has_penalties()) row.see(token, false);
  }
}

std::vector<backend::SampledToken> CpuSampler::take() {
  if (steps_.empty()) throw Error("sampler: no step waits to be taken");
  auto results = std::move(steps_.front());
  steps_.pop_front();
  return results;
}

CpuSampler::Failure CpuSampler::choose(const Row& row, const float* logits, std::int64_t position, Workspace& workspace,
                                       backend::SampledToken& result) const {
  const SoftmaxStats raw = kernels_.stats(logits, vocab_size_);
  if (raw.argmax < 0) return Failure::no_logit;
  if (const int wanted = row.params.logprobs.value_or(0); wanted > 0)
    likeliest(logits, raw, workspace, static_cast<std::size_t>(wanted), result.top_logprobs);

  const float* x = logits;
  SoftmaxStats stats = raw;
  if (row.changes_logits()) {
    std::copy_n(logits, vocab_size_, workspace.logits.data());
    change_logits(row, workspace.logits.data());
    x = workspace.logits.data();
    stats = kernels_.stats(x, vocab_size_);
    if (stats.argmax < 0) return Failure::no_token;
  }
  result.token =
      row.params.temperature == 0
          ? static_cast<std::int32_t>(stats.argmax)
          : draw(row, x, stats, uniform(row.seed, row.sequence, static_cast<std::uint64_t>(position)), workspace);
  result.logprob = log_softmax(logits[result.token], raw);
  return Failure::none;
}

void CpuSampler::change_logits(const Row& row, float* logits) const {
  const SamplingParams& params = row.params;
  for (const auto& [token, bias] : params.logit_bias) logits[token] += static_cast<float>(bias);
  if (row.num_output < params.min_tokens)
    for (std::int32_t token : row.stop_ids) logits[token] = -kInfinity;
  for (const Seen& seen : row.seen) {
    double x = logits[seen.token];
    x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    if (seen.count > 0) x -= params.presence_penalty + params.frequency_penalty * seen.count;
    logits[seen.token] = static_cast<float>(x);
  }
}

std::int32_t CpuSampler::draw(const Row& row, const float* logits, const SoftmaxStats& stats, double random,
                              Workspace& workspace) const {
  float* weights = workspace.weights.data();
  // With a temperature of almost 0 only the maximum keeps a weight.
  const double inverse_temperature = std::min(1.0 / row.params.temperature, 1e30);
  kernels_.weights(logits, vocab_size_, stats.max, static_cast<float>(inverse_temperature), weights);

  if (row.selects()) {
    const std::span<const Candidate> kept = keep_candidates(row, logits, stats.max, workspace);
    double total = 0;
    for (const Candidate& c : kept) total += c.weight;
    double cumulative = 0;
    for (const Candidate& c : kept)
      if ((cumulative += c.weight) > random * total) return c.token;
    return kept.back().token;
  }

  // The block, then the token.
  constexpr std::int64_t kBlock = 1024;
  const auto block_sum = [&](std::int64_t begin) {
    return kernels_.sum(weights + begin, std::min(kBlock, vocab_size_ - begin));
  };
  double total = 0, cumulative = 0;
  for (std::int64_t begin = 0; begin < vocab_size_; begin += kBlock) total += block_sum(begin);
  const double target = random * total;
  for (std::int64_t begin = 0; begin < vocab_size_; begin += kBlock) {
    const double after = cumulative + block_sum(begin);
    if (after > target) {
      for (std::int64_t i = begin; i < std::min(begin + kBlock, vocab_size_); ++i)
        if ((cumulative += weights[i]) > target) return static_cast<std::int32_t>(i);
    }
    cumulative = after;
  }
  return static_cast<std::int32_t>(stats.argmax);  // rounding left the target just out of reach
}

// `enough` takes the number and the weight of logits from `low` on; it does not hold for `high`.
template <typename Above, typename Enough>
CpuSampler::Bracket CpuSampler::narrow(double max, double temperature, Above&& above, Enough&& enough) {
  constexpr double kAll = 128;  // e^−kAll is 0 in float
  constexpr int kHalvings = 8;
  constexpr std::int64_t kFew = 256;
  Bracket bracket;
  double near = 0, far = kAll;
  const auto look = [&](double reach) {
    const Bound bound = above(static_cast<float>(max - reach * temperature));
    const bool found = enough(bound);
    (found ? bracket.low : bracket.high) = bound;
    (found ? far : near) = reach;
    return found;
  };
  for (double reach = 1; !look(reach); reach *= 2)
    if (2 * reach >= kAll) return bracket;
  for (int i = 0; i < kHalvings && bracket.low.count - bracket.high.count > kFew; ++i) look((near + far) / 2);
  return bracket;
}

// The tokens that min_p, then top_k, then top_p leave, in the order of their ids; in workspace.candidates.
std::span<const CpuSampler::Candidate> CpuSampler::keep_candidates(const Row& row, const float* logits, float max,
                                                                   Workspace& workspace) const {
  const SamplingParams& params = row.params;
  const float* weights = workspace.weights.data();
  const auto above = [&](float threshold) {
    Bound bound{threshold, 0, 0};
    kernels_.above(logits, weights, vocab_size_, threshold, &bound.count, &bound.weight);
    return bound;
  };

  // Some tokens: all that are kept, or, with top_p alone, those that the last one kept is among.
  float low, high = kInfinity;
  double wanted = 0;  // with top_p: weight of those of them that are kept
  if (params.top_k > 0) {
    low = narrow(max, params.temperature, above, [&](const Bound& b) { return b.count >= params.top_k; }).low.threshold;
  } else if (params.min_p > 0) {
    low = static_cast<float>(max + (std::log(params.min_p) - 0.01) * params.temperature);
  } else {
    const double total = params.top_p * kernels_.sum(weights, vocab_size_);
    const Bracket bracket = narrow(max, params.temperature, above, [&](const Bound& b) { return b.weight >= total; });
    low = bracket.low.threshold;
    high = bracket.high.threshold;
    wanted = total - bracket.high.weight;
  }
  std::span<Candidate> kept = collect(logits, weights, low, high, params.min_p, workspace);

  if (params.top_k > 0 && static_cast<std::size_t>(params.top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + params.top_k, kept.end(), kByLogit);
    kept = kept.first(static_cast<std::size_t>(params.top_k));
  }
  if (params.top_p < 1) {
    if (params.top_k > 0 || params.min_p > 0) {
      for (const Candidate& c : kept) wanted += c.weight;
      wanted *= params.top_p;
    }
    // The shortest prefix of the sorted candidates with enough weight, by halving the range that its end lies in:
    // everything before `begin` is kept, nothing from `end` on.
    auto begin = kept.begin(), end = kept.end();
    while (end - begin > 1) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, kByLogit);
      double weight = 0;
      for (auto it = begin; it != middle; ++it) weight += it->weight;
      if (weight >= wanted) {
        end = middle;
      } else {
        wanted -= weight;
        begin = middle;
      }
    }
    kept = {kept.begin(), end};
  }

  // In the order of their ids: everything down to the last one kept.
  const Candidate last = *std::max_element(kept.begin(), kept.end(), kByLogit);
  kept = collect(logits, weights, last.logit, kInfinity, params.min_p, workspace);
  const auto end = std::remove_if(kept.begin(), kept.end(), [&](const Candidate& c) { return kByLogit(last, c); });
  return {kept.begin(), end};
}

// The tokens with low ≤ logit < high and a weight > 0 and ≥ least_weight; weights null: each of weight 1.
std::span<CpuSampler::Candidate> CpuSampler::collect(const float* logits, const float* weights, float low, float high,
                                                     double least_weight, Workspace& workspace) const {
  Candidate* out = workspace.candidates.data();
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t begin = 0; begin < vocab_size_; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, vocab_size_);
    bool any = false;
    for (std::int64_t i = begin; i < end; ++i) any |= logits[i] >= low;
    if (!any) continue;
    for (std::int64_t i = begin; i < end; ++i) {
      const float logit = std::min(logits[i], FLT_MAX), weight = weights == nullptr ? 1.0f : weights[i];
      *out = {logit, weight, static_cast<std::int32_t>(i)};
      out += (logit >= low) & (logit < high) & (weight > 0) & (weight >= least_weight);
    }
  }
  return {workspace.candidates.data(), out};
}

void CpuSampler::likeliest(const float* logits, const SoftmaxStats& stats, Workspace& workspace, std::size_t count,
                           std::vector<TokenLogprob>& out) const {
  const auto above = [&](float threshold) {
    Bound bound{threshold, 0, 0};
    kernels_.above(logits, logits, vocab_size_, threshold, &bound.count, &bound.weight);
    return bound;
  };
  const Bracket bracket =
      narrow(stats.max, 1, above, [&](const Bound& b) { return static_cast<std::size_t>(b.count) >= count; });
  const std::span<Candidate> found = collect(logits, nullptr, bracket.low.threshold, kInfinity, 0, workspace);
  count = std::min(count, found.size());
  std::partial_sort(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(count), found.end(), kByLogit);
  for (std::size_t i = 0; i < count; ++i) out.push_back({found[i].token, log_softmax(found[i].logit, stats)});
}

}  // namespace based::cpu
