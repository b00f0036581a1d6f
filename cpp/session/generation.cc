#include "based/generation.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>

#include "based/error.h"
#include "session/session_impl.h"

namespace based {

namespace {

constexpr std::int32_t kNone = -1;

std::uint64_t fresh_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

}  // namespace

class Generator::Impl {
 public:
  Impl(std::unique_ptr<Session> owned, Session* session, std::vector<GenerationRequest> requests);

  bool done() const { return waiting_.empty() && active_.empty() && ready_.empty(); }
  std::vector<TokenEvent> next(const InterruptCheck& interrupt);
  void finish(int request, int sample);

 private:
  // Samples of one request that share one prefill.
  struct Group {
    int request;
    std::vector<int> samples;
  };
  struct Sequence {
    int request;
    int sample;
    std::int32_t slot;  // of the session, and row of the sampler
    std::int64_t num_generated = 0;
    std::int32_t pending = kNone;  // the last token, which the session has not seen yet
    bool finished = false;         // and waits only for `pending` to be fed
  };

  void admit(const InterruptCheck& interrupt);
  void step();
  void feed_finished();
  void sample(const float* logits, std::span<Sequence> sequences);
  void end(Sequence& sequence);
  void drop_ended();
  const GenerationRequest& request(int index) const { return requests_[static_cast<std::size_t>(index)]; }

  std::unique_ptr<Session> owned_;
  Session::Impl& session_;
  std::vector<GenerationRequest> requests_;
  std::vector<std::uint64_t> seeds_;                 // per request
  std::vector<std::vector<std::int32_t>> stop_ids_;  // per request: stop_token_ids and the model's end token
  std::unique_ptr<backend::Sampler> sampler_;
  std::deque<Group> waiting_;
  std::vector<std::int32_t> free_slots_;  // taken from the back
  std::vector<Sequence> active_;
  std::vector<TokenEvent> ready_;  // computed, not yet returned
  bool broken_ = false;            // a session has moved on without its tokens
};

Generator::Impl::Impl(std::unique_ptr<Session> owned, Session* session, std::vector<GenerationRequest> requests)
    : owned_(std::move(owned)), session_(owned_ ? owned_->impl() : session->impl()), requests_(std::move(requests)) {
  const std::int64_t vocab_size = session_.config().vocab_size;
  if (requests_.size() > static_cast<std::size_t>(std::numeric_limits<int>::max()))
    throw InvalidArgument("generate: too many requests");
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    check_tokens(requests_[i].prompt, vocab_size, "generate: prompt " + std::to_string(i));
    requests_[i].params.validate(vocab_size);
    seeds_.push_back(requests_[i].params.seed.value_or(fresh_seed()));
    const SamplingParams& params = requests_[i].params;
    stop_ids_.emplace_back(params.stop_token_ids.begin(), params.stop_token_ids.end());
    if (const auto eos = session_.config().eos_token_id; eos && !params.ignore_eos)
      stop_ids_.back().push_back(static_cast<std::int32_t>(*eos));
  }
  const int capacity = session_.batch_size();
  if (!owned_) {
    if (requests_.size() != static_cast<std::size_t>(capacity))
      throw InvalidArgument("generate: " + std::to_string(requests_.size()) + " prompts, the session has " +
                            std::to_string(capacity) + " sequences");
    for (const auto& r : requests_)
      if (r.params.n != 1)
        throw InvalidArgument("generate: n is " + std::to_string(r.params.n) +
                              ", a session continues its own sequences: expected 1 (fork the session for more)");
  }
  sampler_ = session_.backend->make_sampler(vocab_size, capacity);
  for (int i = capacity; i-- > 0;) free_slots_.push_back(i);
  for (int r = 0; r < static_cast<int>(requests_.size()); ++r)
    for (int s = 0; s < request(r).params.n; ++s) {
      if (s % capacity == 0) waiting_.push_back({r, {}});
      waiting_.back().samples.push_back(s);
    }
}

// Prefills as many waiting groups as find slots, and samples their first tokens.
void Generator::Impl::admit(const InterruptCheck& interrupt) {
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<std::int32_t> slots;  // of each group's first sample
  std::size_t used = 0;
  for (const Group& group : waiting_) {
    if (used + group.samples.size() > free_slots_.size()) break;
    slots.push_back(free_slots_[free_slots_.size() - 1 - used]);
    prompts.push_back(request(group.request).prompt);
    used += group.samples.size();
  }
  if (slots.empty()) return;
  active_.reserve(active_.size() + used);  // what follows the prefill is not to fail
  const Tensor logits = session_.prefill(prompts, slots, interrupt);

  broken_ = true;
  std::vector<Sequence> first;                            // one per group, as the rows of logits
  std::vector<std::pair<std::size_t, Sequence>> further;  // (row, another sample)
  for (std::size_t row = 0; row < slots.size(); ++row) {
    const Group& group = waiting_[row];
    const auto r = static_cast<std::size_t>(group.request);
    for (const int sample_index : group.samples) {
      const Sequence sequence{group.request, sample_index, free_slots_.back()};
      free_slots_.pop_back();
      session_.copy(slots[row], sequence.slot);
      sampler_->assign(sequence.slot, requests_[r].params, seeds_[r], static_cast<std::uint32_t>(sample_index),
                       prompts[row], stop_ids_[r]);
      if (sequence.slot == slots[row])
        first.push_back(sequence);
      else
        further.emplace_back(row, sequence);
    }
  }
  waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(slots.size()));
  const auto* rows = logits.data_as<const float>();
  sample(rows, first);
  for (auto& [row, sequence] : further)
    sample(rows + static_cast<std::int64_t>(row) * session_.config().padded_vocab_size, {&sequence, 1});
  active_.insert(active_.end(), first.begin(), first.end());
  for (const auto& [row, sequence] : further) active_.push_back(sequence);
  broken_ = false;
}

// Feeds all pending tokens, and samples the running sequences' next.
void Generator::Impl::step() {
  if (active_.empty()) return;
  // Running ones first: their logits are the first rows.
  const auto finished = std::ranges::stable_partition(active_, [](const Sequence& s) { return !s.finished; });
  std::vector<std::int32_t> tokens, slots;
  for (const Sequence& sequence : active_) {
    tokens.push_back(sequence.pending);
    slots.push_back(sequence.slot);
  }
  const Tensor logits = session_.step(tokens, slots);
  broken_ = true;
  for (Sequence& sequence : active_) sequence.pending = kNone;
  sample(logits.data_as<const float>(), {active_.begin(), finished.begin()});
  broken_ = false;
}

// One token for each sequence from its row of logits (sequences.size(), padded_vocab_size).
void Generator::Impl::sample(const float* logits, std::span<Sequence> sequences) {
  if (sequences.empty()) return;
  std::vector<std::int32_t> rows;
  std::vector<std::int64_t> positions;
  for (const Sequence& sequence : sequences) {
    rows.push_back(sequence.slot);
    positions.push_back(session_.num_tokens[static_cast<std::size_t>(sequence.slot)]);
  }
  const backend::Matrix matrix{const_cast<float*>(logits), DType::float32, static_cast<std::int64_t>(sequences.size()),
                               session_.config().padded_vocab_size};
  auto chosen = sampler_->sample(matrix, rows, positions);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = sequences[i];
    TokenEvent event;
    event.request = sequence.request;
    event.sample = sequence.sample;
    event.token = chosen[i].token;
    event.logprob = chosen[i].logprob;
    event.top_logprobs = std::move(chosen[i].top_logprobs);
    sequence.pending = event.token;
    ++sequence.num_generated;
    if (std::ranges::count(stop_ids_[static_cast<std::size_t>(sequence.request)], event.token) > 0) {
      event.finish = FinishReason::stop;
      event.stop_token = event.token;
    } else if (sequence.num_generated >= request(sequence.request).params.max_tokens) {
      event.finish = FinishReason::length;
    }
    if (event.finish != FinishReason::none) end(sequence);
    ready_.push_back(std::move(event));
  }
}

void Generator::Impl::end(Sequence& sequence) {
  sequence.finished = true;
  if (!owned_) return;  // the caller's session is to see the last token too
  sequence.pending = kNone;
}

void Generator::Impl::drop_ended() {
  std::erase_if(active_, [this](const Sequence& sequence) {
    if (!sequence.finished || sequence.pending != kNone) return false;
    if (owned_) {
      session_.reset(sequence.slot);
      free_slots_.push_back(sequence.slot);
    }
    return true;
  });
}

// When nothing runs any more, lets a caller's session see the last tokens.
void Generator::Impl::feed_finished() {
  if (std::ranges::all_of(active_, &Sequence::finished)) step();
  drop_ended();
}

std::vector<TokenEvent> Generator::Impl::next(const InterruptCheck& interrupt) {
  if (broken_) throw Error("generate: an earlier call failed half-way, this generator cannot go on");
  if (ready_.empty()) {
    const Session::Impl::Turn turn(session_);
    step();
    drop_ended();
    admit(interrupt);
    drop_ended();
    feed_finished();
  }
  return std::exchange(ready_, {});
}

void Generator::Impl::finish(int request_index, int sample_index) {
  if (request_index < 0 || request_index >= static_cast<int>(requests_.size()) || sample_index < 0 ||
      sample_index >= request(request_index).params.n)
    throw InvalidArgument("finish: no sample " + std::to_string(sample_index) + " of request " +
                          std::to_string(request_index));
  const Session::Impl::Turn turn(session_);
  for (Sequence& sequence : active_)
    if (sequence.request == request_index && sequence.sample == sample_index && !sequence.finished) end(sequence);
  for (Group& group : waiting_)
    if (group.request == request_index) std::erase(group.samples, sample_index);
  std::erase_if(waiting_, [](const Group& group) { return group.samples.empty(); });
  drop_ended();
  feed_finished();
}

Generator::Generator(std::shared_ptr<const Model> model, std::vector<GenerationRequest> requests, int max_batch_size) {
  if (max_batch_size < 1)
    throw InvalidArgument("max_batch_size is " + std::to_string(max_batch_size) + ", expected ≥ 1");
  std::int64_t samples = 0;
  for (const auto& request : requests) samples += std::max(request.params.n, 1);
  const auto capacity = static_cast<int>(std::clamp<std::int64_t>(samples, 1, max_batch_size));
  impl_ = std::make_unique<Impl>(std::make_unique<Session>(std::move(model), capacity), nullptr, std::move(requests));
}

Generator::Generator(Session& session, std::vector<GenerationRequest> requests)
    : impl_(std::make_unique<Impl>(nullptr, &session, std::move(requests))) {}

Generator::~Generator() = default;

bool Generator::done() const { return impl_->done(); }
std::vector<TokenEvent> Generator::next(const InterruptCheck& interrupt) { return impl_->next(interrupt); }
void Generator::finish(int request, int sample) { impl_->finish(request, sample); }

}  // namespace based
