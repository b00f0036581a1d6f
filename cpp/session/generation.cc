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
  // Of tokens 1, 2, …: `sampled` are chosen or being chosen, all of them but the last fed to the session, and `taken`
  // are known here.
  struct Sequence {
    int request;
    int sample;
    std::int32_t slot;  // of the session, and row of the sampler
    std::uint64_t serial;
    std::int64_t sampled = 1;
    std::int64_t taken = 0;
    bool finished = false;
  };
  // Which sequence each entry of a sampled step belongs to.
  using Step = std::vector<std::uint64_t>;

  bool can_admit() const { return !waiting_.empty() && waiting_.front().samples.size() <= free_slots_.size(); }
  void admit(const InterruptCheck& interrupt);
  bool wants_step(const Sequence& sequence) const;
  bool launch();
  void take();
  void take_token(Sequence& sequence, backend::SampledToken& chosen);
  void drop_ended();
  void settle();
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
  std::deque<Step> steps_;         // sampled, not taken
  std::vector<TokenEvent> ready_;  // taken, not yet returned
  std::uint64_t last_serial_ = 0;
  bool broken_ = false;  // a session has moved on without its tokens
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
  std::vector<std::int32_t> offsets{0}, sampled_slots, logit_rows;
  std::vector<std::int64_t> positions;
  Step step;
  for (std::size_t row = 0; row < slots.size(); ++row) {
    const Group& group = waiting_[row];
    const auto r = static_cast<std::size_t>(group.request);
    for (const int sample : group.samples) {
      const Sequence sequence{group.request, sample, free_slots_.back(), ++last_serial_};
      free_slots_.pop_back();
      session_.copy(slots[row], sequence.slot);
      sampler_->assign(sequence.slot, requests_[r].params, seeds_[r], static_cast<std::uint32_t>(sample), prompts[row],
                       stop_ids_[r]);
      active_.push_back(sequence);
      step.push_back(sequence.serial);
      sampled_slots.push_back(sequence.slot);
      logit_rows.push_back(static_cast<std::int32_t>(row));
      offsets.push_back(offsets.back() + 1);
      positions.push_back(session_.num_tokens[static_cast<std::size_t>(sequence.slot)] - 1);  // of the last token
    }
  }
  waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(slots.size()));
  const backend::RaggedBatch batch{{}, offsets, sampled_slots, positions, nullptr, logit_rows};
  session_.backend->begin(batch);
  sampler_->sample({logits.data(), DType::float32, logits.shape()[0], logits.shape()[1]}, batch);
  steps_.push_back(std::move(step));
  broken_ = false;
}

// A session of the generator's own need not see last tokens; a caller's is to see every token that was taken.
bool Generator::Impl::wants_step(const Sequence& s) const {
  const std::int64_t last = s.finished ? s.taken : request(s.request).params.max_tokens;
  return owned_ ? !s.finished && s.sampled < last : s.sampled <= last;
}

// Enqueues a step of all sequences that want one.
bool Generator::Impl::launch() {
  std::vector<std::int32_t> slots;
  Step step;
  for (const Sequence& sequence : active_) {
    if (!wants_step(sequence)) continue;
    slots.push_back(sequence.slot);
    step.push_back(sequence.serial);
  }
  if (slots.empty()) return false;
  session_.reserve_step(slots.size());  // may fail, and then nothing has changed
  broken_ = true;
  session_.step(slots, *sampler_);
  broken_ = false;
  for (Sequence& sequence : active_)
    if (wants_step(sequence)) ++sequence.sampled;
  steps_.push_back(std::move(step));
  return true;
}

// Waits for the oldest step and makes events of its tokens; those behind a sequence's end are nobody's.
void Generator::Impl::take() {
  const Step step = std::move(steps_.front());
  steps_.pop_front();
  broken_ = true;
  auto chosen = sampler_->take();
  for (std::size_t i = 0; i < step.size(); ++i) {
    const auto sequence = std::ranges::lower_bound(active_, step[i], {}, &Sequence::serial);  // serials ascend
    if (sequence != active_.end() && sequence->serial == step[i] && !sequence->finished)
      take_token(*sequence, chosen[i]);
  }
  broken_ = false;
}

void Generator::Impl::take_token(Sequence& sequence, backend::SampledToken& chosen) {
  if (!chosen.failure.empty()) throw Error(chosen.failure);
  const SamplingParams& params = request(sequence.request).params;
  TokenEvent event;
  event.request = sequence.request;
  event.sample = sequence.sample;
  event.token = chosen.token;
  event.logprob = chosen.logprob;
  event.top_logprobs = std::move(chosen.top_logprobs);
  ++sequence.taken;
  if (std::ranges::count(stop_ids_[static_cast<std::size_t>(sequence.request)], event.token) > 0) {
    event.finish = FinishReason::stop;
    event.stop_token = event.token;
  } else if (sequence.taken >= params.max_tokens) {
    event.finish = FinishReason::length;
  }
  sequence.finished = event.finish != FinishReason::none;
  ready_.push_back(std::move(event));
}

void Generator::Impl::drop_ended() {
  std::erase_if(active_, [this](const Sequence& sequence) {
    if (!sequence.finished || wants_step(sequence)) return false;
    if (owned_) {
      session_.reset(sequence.slot);
      free_slots_.push_back(sequence.slot);
    }
    return true;
  });
}

// When nothing runs any more, lets a caller's session see the last tokens, and leaves no step untaken.
void Generator::Impl::settle() {
  drop_ended();
  if (!std::ranges::all_of(active_, &Sequence::finished)) return;
  launch();
  drop_ended();
  while (!steps_.empty()) take();
}

std::vector<TokenEvent> Generator::Impl::next(const InterruptCheck& interrupt) {
  if (broken_) throw Error("generate: an earlier call failed half-way, this generator cannot go on");
  if (ready_.empty()) {
    const Session::Impl::Turn turn(session_);
    if (steps_.empty()) launch();
    // One step ahead of what is known here: a sequence that ends now was fed its last token meanwhile, no more.
    if (!steps_.empty() && session_.backend->asynchronous() && !can_admit()) launch();
    if (!steps_.empty()) take();
    drop_ended();
    if (steps_.empty() && can_admit()) {
      admit(interrupt);
      take();
    }
    settle();
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
    if (sequence.request == request_index && sequence.sample == sample_index) sequence.finished = true;
  for (Group& group : waiting_)
    if (group.request == request_index) std::erase(group.samples, sample_index);
  std::erase_if(waiting_, [](const Group& group) { return group.samples.empty(); });
  settle();
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
