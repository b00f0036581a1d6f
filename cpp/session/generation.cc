#include "based/generation.h"

#include <algorithm>
#include <deque>
#include <exception>
#include <limits>
#include <span>
#include <string>
#include <utility>

#include "based/error.h"
#include "session/request.h"
#include "session/session_impl.h"

namespace based {

class Generator::Impl {
 public:
  Impl(std::unique_ptr<Session::Impl> owned, Session* session, std::vector<GenerationRequest> requests);

  bool done() const { return waiting_.empty() && active_.empty() && ready_.empty() && given_.empty() && !failure_; }
  std::vector<TokenEvent> next(const InterruptCheck& interrupt, const InterruptCheck& last_interrupt);
  void finish(int request, int sample, std::int64_t num_read);
  int add(GenerationRequest request);

 private:
  struct Entry {
    GenerationRequest request;
    std::uint64_t seed = 0;
    std::vector<std::int32_t> stop_ids;  // stop_token_ids and the model's end token
    int num_running = 0;                 // samples that have not ended
  };
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
    std::int64_t num_prompt_tokens = 0;  // of the session's sequence, before token 1
    std::int64_t most = 0;               // tokens that it may have: max_tokens, or as many as have room
    std::int64_t sampled = 1;
    std::int64_t taken = 0;
    bool finished = false;
  };
  // A token that the caller may still say it has not read.
  struct Given {
    int request;
    std::int32_t token;
  };
  // Which sequence each entry of a sampled step belongs to.
  using Step = std::vector<std::uint64_t>;

  void advance(const InterruptCheck& interrupt);
  bool can_admit() const { return !waiting_.empty() && waiting_.front().samples.size() <= free_slots_.size(); }
  void check_prompt(int slot) const;
  void admit(const InterruptCheck& interrupt);
  bool begin_sample(const Group& group, int sample, std::int32_t prefilled_slot, std::int32_t slot);
  void sample_first(const Tensor& logits);
  bool wants_step(const Sequence& sequence) const;
  bool launch();
  void take();
  void take_token(Sequence& sequence, backend::SampledToken& chosen);
  void fail(int request, int sample, std::string why);
  void drop_ended();
  void settle();
  void count_given();
  int num_requests() const { return num_dropped_ + static_cast<int>(entries_.size()); }
  Entry& entry(int index) { return entries_[static_cast<std::size_t>(index - num_dropped_)]; }
  const Entry& entry(int index) const { return entries_[static_cast<std::size_t>(index - num_dropped_)]; }
  const GenerationRequest& request(int index) const { return entry(index).request; }
  void enter(GenerationRequest request);
  void wait(int index);

  std::unique_ptr<Session::Impl> owned_;
  Session::Impl& session_;
  Session::Impl::Hold hold_{session_};  // the sampler's work is on this executor
  std::deque<Entry> entries_;           // per request; add() drops those at the front that have ended
  int num_dropped_ = 0;
  std::unique_ptr<backend::Sampler> sampler_;
  std::deque<Group> waiting_;
  std::vector<std::int32_t> free_slots_;  // taken from the back
  std::vector<Sequence> active_;
  std::vector<std::int32_t> first_rows_;  // of the sequences that are being admitted: each one's row of logits
  std::deque<Step> steps_;                // sampled, not taken
  std::vector<TokenEvent> ready_;         // taken, not yet returned
  std::vector<Given> given_;              // what the last call returned, of a caller's session
  std::exception_ptr failure_;            // what the next call throws
  std::uint64_t last_serial_ = 0;
  bool broken_ = false;  // a session has moved on without its tokens
};

Generator::Impl::Impl(std::unique_ptr<Session::Impl> owned, Session* session, std::vector<GenerationRequest> requests)
    : owned_(std::move(owned)), session_(owned_ ? *owned_ : session->impl()) {
  const Session::Impl::Turn turn(session_);
  if (requests.size() > static_cast<std::size_t>(std::numeric_limits<int>::max()))
    throw InvalidArgument("generate: too many requests");
  for (GenerationRequest& request : requests) enter(std::move(request));
  const int capacity = session_.batch_size();
  if (!owned_) {
    for (int r = 0; r < num_requests(); ++r) check_prompt(r);
    if (num_requests() != capacity)
      throw InvalidArgument("generate: " + std::to_string(num_requests()) + " prompts, the session has " +
                            std::to_string(capacity) + " sequences");
    for (const Entry& e : entries_)
      if (e.request.params.n != 1)
        throw InvalidArgument("generate: n is " + std::to_string(e.request.params.n) +
                              ", a session continues its own sequences: expected 1 (fork the session for more)");
  }
  sampler_ = session_.backend().make_sampler(session_.config().vocab_size, capacity);
  for (int i = capacity; i-- > 0;) free_slots_.push_back(i);
  for (int r = 0; r < num_requests(); ++r) wait(r);
}

// Checks a request and gives it the next number.
void Generator::Impl::enter(GenerationRequest request) {
  const std::int64_t vocab_size = session_.config().vocab_size;
  const SamplingParams& params = request.params;
  const std::string name = "generate: prompt " + std::to_string(num_requests());
  if (owned_ || !request.prompt.empty()) check_tokens(request.prompt, vocab_size, name);
  if (owned_) session_.model->impl().check_context(0, static_cast<std::int64_t>(request.prompt.size()), name);
  params.validate(vocab_size);
  Entry entry;
  entry.seed = params.seed.value_or(fresh_seed());
  entry.num_running = params.n;
  entry.stop_ids = stop_ids_of(params, session_.config());
  entry.request = std::move(request);
  entries_.push_back(std::move(entry));
}

// Puts a request's samples in line, as many together as can share one prefill.
void Generator::Impl::wait(int index) {
  for (int s = 0; s < request(index).params.n; ++s) {
    if (s % session_.batch_size() == 0) waiting_.push_back({index, {}});
    waiting_.back().samples.push_back(s);
  }
}

int Generator::Impl::add(GenerationRequest request) {
  if (!owned_) throw InvalidArgument("generate: a session's generator takes no more requests than it has sequences");
  if (num_requests() == std::numeric_limits<int>::max()) throw InvalidArgument("generate: too many requests");
  for (; !entries_.empty() && entries_.front().num_running == 0; ++num_dropped_) entries_.pop_front();
  enter(std::move(request));
  wait(num_requests() - 1);
  return num_requests() - 1;
}

// An empty prompt goes on from what the sequence has seen.
void Generator::Impl::check_prompt(int slot) const {
  const bool exists = slot < session_.batch_size();
  if (exists) {
    session_.check_whole(slot);
    session_.model->impl().check_context(session_.num_tokens(slot),
                                         static_cast<std::int64_t>(request(slot).prompt.size()),
                                         "generate: prompt " + std::to_string(slot));
  }
  if (exists && !request(slot).prompt.empty()) session_.check_prefix(slot, "generate: prompt " + std::to_string(slot));
  if (!request(slot).prompt.empty() || (exists && session_.has_last_logits(slot))) return;
  const std::string what = "generate: prompt " + std::to_string(slot) + " is empty, and its sequence has ";
  if (!exists || session_.num_tokens(slot) == 0)
    throw InvalidArgument(what + "seen nothing: expected at least one token");
  throw InvalidArgument(what +
                        "a state that was saved without what going on needs (by an older version), or whose last token "
                        "could not be sampled: expected at least one token");
}

// Prefills as many waiting groups as find slots, and samples their first tokens. A batch has either prompts or empty
// prompts, whose sequences go on.
void Generator::Impl::admit(const InterruptCheck& interrupt) {
  std::vector<std::vector<std::int32_t>> prompts;
  std::vector<std::int32_t> slots;  // of each group's first sample
  std::size_t used = 0;
  const bool goes_on = request(waiting_.front().request).prompt.empty();
  for (const Group& group : waiting_) {
    if (used + group.samples.size() > free_slots_.size() || request(group.request).prompt.empty() != goes_on) break;
    slots.push_back(free_slots_[free_slots_.size() - 1 - used]);
    prompts.push_back(request(group.request).prompt);
    used += group.samples.size();
  }
  active_.reserve(active_.size() + used);  // what follows the prefill is not to fail
  first_rows_.clear();
  first_rows_.reserve(used);
  std::vector<std::int32_t> unused;
  unused.reserve(used);
  const Tensor logits = goes_on ? session_.last_logits(slots) : session_.prefill(prompts, slots, interrupt);

  broken_ = true;
  for (std::size_t row = 0; row < slots.size(); ++row) {
    const Group group = std::move(waiting_.front());
    waiting_.pop_front();
    for (const int sample : group.samples) {
      const std::int32_t slot = free_slots_.back();
      free_slots_.pop_back();
      if (begin_sample(group, sample, slots[row], slot))
        first_rows_.push_back(static_cast<std::int32_t>(row));
      else if (owned_)
        unused.push_back(slot);
    }
  }
  for (const std::int32_t slot : unused) {
    session_.reset(slot);
    free_slots_.push_back(slot);
  }
  sample_first(logits);
  broken_ = false;
}

// Puts the state after a sample's prompt into its slot, and its params into that row of the sampler. False: it cannot
// go on, and has ended.
bool Generator::Impl::begin_sample(const Group& group, int sample, std::int32_t prefilled_slot, std::int32_t slot) {
  const std::int64_t most = room_behind(*session_.model, session_.num_tokens(prefilled_slot), !owned_);
  try {
    const Entry& of = entry(group.request);
    if (most < 1) throw InvalidArgument(out_of_room(*session_.model));
    session_.copy(prefilled_slot, slot);
    std::span<const std::int32_t> prompt;
    if (owned_) prompt = of.request.prompt;  // a caller's session has counted it
    sampler_->assign(slot, of.request.params, of.seed, static_cast<std::uint32_t>(sample), prompt, of.stop_ids,
                     session_.seen(slot));
  } catch (const std::exception& error) {
    fail(group.request, sample, error.what());
    --entry(group.request).num_running;
    return false;
  }
  active_.push_back({group.request, sample, slot, ++last_serial_, session_.num_tokens(slot),
                     std::min(most, request(group.request).params.max_tokens)});
  return true;
}

// Samples the first tokens of the sequences that were just admitted, the last ones of active_.
void Generator::Impl::sample_first(const Tensor& logits) {
  if (first_rows_.empty()) return;
  std::vector<std::int32_t> offsets{0}, slots;
  std::vector<std::int64_t> positions;
  Step step;
  for (std::size_t i = active_.size() - first_rows_.size(); i < active_.size(); ++i) {
    step.push_back(active_[i].serial);
    slots.push_back(active_[i].slot);
    offsets.push_back(offsets.back() + 1);
    positions.push_back(session_.num_tokens(active_[i].slot) - 1);  // of the last token
  }
  const backend::RaggedBatch batch{{}, offsets, slots, positions, nullptr, first_rows_};
  session_.backend().begin(batch);
  sampler_->sample({logits.data(), DType::float32, logits.shape()[0], logits.shape()[1]}, batch);
  steps_.push_back(std::move(step));
}

// A session of the generator's own need not see last tokens; a caller's is to see every token that was taken.
bool Generator::Impl::wants_step(const Sequence& s) const {
  const std::int64_t last = s.finished ? s.taken : s.most;
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
  session_.reserve_step(slots);  // may fail, and then nothing has changed
  broken_ = true;
  session_.step(slots, *sampler_);
  for (Sequence& sequence : active_)
    if (wants_step(sequence)) ++sequence.sampled;
  steps_.push_back(std::move(step));
  broken_ = false;
  return true;
}

// Waits for the oldest step and makes events of its tokens; those behind a sequence's end are nobody's.
void Generator::Impl::take() {
  const Step step = std::move(steps_.front());
  steps_.pop_front();
  broken_ = true;
  std::vector<backend::SampledToken> chosen;
  try {
    chosen = sampler_->take();
  } catch (...) {  // the device failed, in this step or in what was enqueued after it
    for (int slot = 0; slot < session_.batch_size(); ++slot) session_.mark_broken(slot);
    throw;
  }
  for (std::size_t i = 0; i < step.size(); ++i) {
    const auto sequence = std::ranges::lower_bound(active_, step[i], {}, &Sequence::serial);  // serials ascend
    if (sequence != active_.end() && sequence->serial == step[i] && !sequence->finished)
      take_token(*sequence, chosen[i]);
  }
  broken_ = false;
}

void Generator::Impl::fail(int request_index, int sample, std::string why) {
  TokenEvent event;
  event.request = request_index;
  event.sample = sample;
  event.token = -1;
  event.finish = FinishReason::error;
  event.error = std::move(why);
  ready_.push_back(std::move(event));
}

void Generator::Impl::take_token(Sequence& sequence, backend::SampledToken& chosen) {
  if (!chosen.failure.empty()) {
    sequence.finished = true;
    session_.set_num_tokens(sequence.slot, sequence.num_prompt_tokens + sequence.taken);
    fail(sequence.request, sequence.sample, std::move(chosen.failure));
    --entry(sequence.request).num_running;
    return;
  }
  const SamplingParams& params = request(sequence.request).params;
  TokenEvent event;
  event.request = sequence.request;
  event.sample = sequence.sample;
  event.token = chosen.token;
  event.logprob = chosen.logprob;
  event.top_logprobs = std::move(chosen.top_logprobs);
  ++sequence.taken;
  event.finish = finish_of(event.token, params, entry(sequence.request).stop_ids, sequence.taken, sequence.most);
  if (event.finish == FinishReason::stop) event.stop_token = event.token;
  sequence.finished = event.finish != FinishReason::none;
  ready_.push_back(std::move(event));
  if (!sequence.finished && sequence.taken >= sequence.most) {
    sequence.finished = true;
    fail(sequence.request, sequence.sample, out_of_room(*session_.model));
  }
  if (sequence.finished) --entry(sequence.request).num_running;
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

// When nothing runs any more, lets a caller's session see the last tokens, and leaves no step untaken. Tokens come
// first: the session sees the last ones only after they were returned.
void Generator::Impl::settle() {
  if (broken_) return;
  drop_ended();
  if (!std::ranges::all_of(active_, &Sequence::finished)) return;
  if (!active_.empty() && !ready_.empty()) return;
  launch();
  drop_ended();
  while (!steps_.empty()) take();
}

// Request i of a caller's session is its sequence i.
void Generator::Impl::count_given() {
  for (const Given& given : given_) session_.add_output(given.request, given.token);
  given_.clear();
}

std::vector<TokenEvent> Generator::Impl::next(const InterruptCheck& interrupt, const InterruptCheck& last_interrupt) {
  if (done() && !broken_) return {};
  const Session::Impl::Turn turn(session_);
  count_given();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  if (broken_) throw Error("generate: an earlier call failed half-way, this generator cannot go on");
  if (ready_.empty() && !done()) {
    if (interrupt) interrupt();
    try {
      advance(interrupt);
    } catch (...) {
      if (ready_.empty()) throw;
      failure_ = std::current_exception();  // the tokens first: a session may have been fed them
    }
  }
  if (last_interrupt) last_interrupt();  // what it throws leaves the tokens to the next call
  if (!owned_) {
    given_.reserve(ready_.size());
    for (const TokenEvent& event : ready_)
      if (event.finish != FinishReason::error) given_.push_back({event.request, event.token});
  }
  return std::exchange(ready_, {});
}

void Generator::Impl::advance(const InterruptCheck& interrupt) {
  if (steps_.empty()) launch();
  // One step ahead of what is known here: a sequence that ends now was fed its last token meanwhile, no more.
  if (!steps_.empty() && session_.backend().asynchronous() && !can_admit()) launch();
  if (!steps_.empty()) take();
  drop_ended();
  if (steps_.empty() && can_admit()) {
    admit(interrupt);
    if (!steps_.empty()) take();
  }
  settle();
}

void Generator::Impl::finish(int request_index, int sample_index, std::int64_t num_read) {
  if (request_index >= 0 && request_index < num_dropped_) return;
  if (request_index < 0 || request_index >= num_requests() || sample_index < 0 ||
      sample_index >= request(request_index).params.n)
    throw InvalidArgument("finish: no sample " + std::to_string(sample_index) + " of request " +
                          std::to_string(request_index));
  const Session::Impl::Turn turn(session_);
  // Tokens that nobody has read are taken back, unless a step that ran ahead has fed them.
  auto num_unread = std::erase_if(ready_, [&](const TokenEvent& event) {
    return event.request == request_index && event.sample == sample_index && event.finish != FinishReason::error;
  });
  for (const Sequence& sequence : active_) {
    if (sequence.request != request_index || sequence.sample != sample_index) continue;
    if (num_read < sequence.taken - static_cast<std::int64_t>(num_unread))
      num_unread += std::erase_if(given_, [&](const Given& given) { return given.request == request_index; });
  }
  count_given();
  int ended = 0;
  for (Sequence& sequence : active_) {
    if (sequence.request != request_index || sequence.sample != sample_index) continue;
    if (sequence.sampled == sequence.taken) sequence.taken -= static_cast<std::int64_t>(num_unread);
    if (!std::exchange(sequence.finished, true)) ++ended;
  }
  for (Group& group : waiting_)
    if (group.request == request_index) ended += static_cast<int>(std::erase(group.samples, sample_index));
  entry(request_index).num_running -= ended;
  std::erase_if(waiting_, [](const Group& group) { return group.samples.empty(); });
  settle();
}

Generator::Generator(std::shared_ptr<const Model> model, std::vector<GenerationRequest> requests, int max_batch_size) {
  if (max_batch_size < 1)
    throw InvalidArgument("max_batch_size is " + std::to_string(max_batch_size) + ", expected ≥ 1");
  std::int64_t samples = 0;
  for (const auto& request : requests) samples += std::max(request.params.n, 1);
  const auto capacity = static_cast<int>(std::clamp<std::int64_t>(samples, 1, max_batch_size));
  auto session = std::make_unique<Session::Impl>(std::move(model), capacity, /*keeps_seen=*/false);
  impl_ = std::make_unique<Impl>(std::move(session), nullptr, std::move(requests));
}

Generator::Generator(Session& session, std::vector<GenerationRequest> requests)
    : impl_(std::make_unique<Impl>(nullptr, &session, std::move(requests))) {}

Generator::~Generator() = default;

bool Generator::done() const { return impl_->done(); }
std::vector<TokenEvent> Generator::next(const InterruptCheck& interrupt, const InterruptCheck& last_interrupt) {
  return impl_->next(interrupt, last_interrupt);
}
int Generator::add(GenerationRequest request) { return impl_->add(std::move(request)); }
void Generator::finish(int request, int sample, std::int64_t num_read) { impl_->finish(request, sample, num_read); }

}  // namespace based
