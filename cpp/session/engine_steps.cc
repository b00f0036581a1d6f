#include <algorithm>
#include <utility>

#include "based/error.h"
#include "session/engine_impl.h"
#include "session/request.h"
#include "session/state_impl.h"

namespace based {

// ---- steps ---------------------------------------------------------------------------------------------------------

// A sample whose state is wanted is fed its last token, too.
bool Engine::Impl::wants_step(const Sample& sample) const {
  if (sample.finished) return sample.keeps && sample.confirmed && sample.sampled <= sample.taken;
  if (sample.request->paused) return false;
  return sample.keeps ? sample.sampled <= sample.most : sample.sampled < sample.most;
}

bool Engine::Impl::wants_step() const {
  return std::ranges::any_of(samples_, [this](const Sample& sample) { return wants_step(sample); });
}

void Engine::Impl::advance() {
  if (!session_) return;
  const bool asynchronous = session().backend().asynchronous();
  const auto joins = [&](const Feed& feed) { return asynchronous || !is_long(feed); };
  const auto takes_prompts = [&] {
    const bool measures = asynchronous && !budget_.knows_plain() && wants_step();  // how long one without prompts takes
    return !measures && std::ranges::any_of(feeds_, joins);
  };
  const auto launch_next = [&] {
    if (takes_prompts())
      launch_mixed();
    else
      launch();
  };
  if (asynchronous) {
    const std::size_t ahead = may_run_ahead() ? 1 : 0;
    for (bool hurried = false; session_ && steps_.size() > ahead; hurried = true) {
      take(hurried);
      settle();
      if (steps_.size() > ahead) send();  // tokens do not wait for another step
    }
    settle();
    if (session_ && takes_prompts()) send();  // nor for the launch of one with prompts, which takes milliseconds
    const std::size_t before = steps_.size();
    if (session_) launch_next();
    if (session_ && !steps_.empty() && steps_.size() == before) take();
    return;
  }
  launch_next();
  while (session_ && !steps_.empty()) take();
  settle();
  if (session_ && long_ == nullptr && std::ranges::any_of(feeds_, [&](const Feed& f) { return is_long(f); }))
    read_long();
}

// Whether a step may be launched while another is under way: where more prompts are here than it takes, so that it is
// full without who comes meanwhile, or none at all.
bool Engine::Impl::may_run_ahead() {
  if (steps_.empty() || steps_.back().serials.empty()) return false;  // take() would wait for both
  if (feeds_.empty()) return !may_begin();
  std::int64_t remaining = 0;
  for (const Feed& feed : feeds_) {
    if (feed.length == 0) return false;
    remaining += feed.remaining();
  }
  return remaining >= next_budget();
}

// Finds memory for a step of the first of `parts`, of which parts[i] is of slots[i], and returns how many these are:
// what of a step has no memory has a step of its own later. 0: nothing has changed but that the cache gave memory back,
// or that the first part has ended, for which there is none at all.
template <typename Part, typename Reserve>
std::size_t Engine::Impl::reserved(std::span<const Part> parts, std::span<const std::int32_t> slots,
                                   Reserve&& reserve) {
  for (std::size_t count = parts.size();; count = (count + 1) / 2) {
    try {
      reserve(parts.first(count));
      return count;
    } catch (...) {
      const std::exception_ptr error = std::current_exception();
      if (gave_back(model_->state_nbytes())) return 0;
      if (count > 1 && !is_device_error(error)) continue;
      fail_step(slots.first(1), error);
      return 0;
    }
  }
}

// Enqueues a step of single tokens, which a device may have recorded.
bool Engine::Impl::launch() {
  std::vector<std::int32_t> slots;
  Step step;
  for (const Sample& sample : samples_) {
    if (!wants_step(sample)) continue;
    slots.push_back(sample.slot);
    step.serials.push_back(sample.serial);
  }
  if (slots.empty()) return false;
  slots.resize(reserved<std::int32_t>(slots, slots, [this](auto part) { session().reserve_step(part); }));
  if (slots.empty()) return false;
  step.serials.resize(slots.size());
  step.num_rows = static_cast<std::int64_t>(slots.size());
  try {
    session().step(slots, *sampler_);
  } catch (...) {
    fail_step(slots, std::current_exception());
    return false;
  }
  auto left = step.num_rows;  // the first of those that want a step
  for (Sample& sample : samples_) {
    if (left == 0) break;
    if (!wants_step(sample)) continue;
    ++sample.sampled;
    --left;
  }
  steps_.push_back(std::move(step));
  return true;
}

// Tokens of a feed that a step takes, of a budget > 0: whole pieces, but for the end.
std::int64_t Engine::Impl::piece_of(const Feed& feed, std::int64_t budget) const {
  const Transformer& transformer = model_->impl().transformer;
  const backend::Backend& backend = model_->impl().executors.device();
  const bool begins = session_->num_tokens(feed.slots[0]) == 0;
  if (begins && transformer.prefix_tokens() > 1)
    return std::min(feed.remaining(), transformer.piece_tokens(backend, true));
  const std::int64_t most = std::min(std::max(budget / cut_ * cut_, cut_), piece_);
  // A cut is at a multiple of cut_ from the prompt's start: what a sequence computes depends on it alone.
  const std::int64_t count = std::min(feed.remaining(), most - feed.fed % cut_);
  const auto next = feed.cuts.upper_bound(feed.fed);
  return next == feed.cuts.end() ? count : std::min(count, *next - feed.fed);
}

// A step of all samples and of pieces of prompts, of the first `most_parts` of these.
void Engine::Impl::launch_mixed(std::size_t most_parts) {
  std::vector<Session::Impl::Piece> pieces, again;
  std::vector<Sample*> rows;
  Step step;
  for (Sample& sample : samples_) {
    if (!wants_step(sample)) continue;
    if (pieces.size() == most_parts) break;
    pieces.push_back({sample.slot, {}});
    if (!sample.finished) {
      pieces.back().samplers = {&sample.slot, 1};
      step.serials.push_back(sample.serial);
    }
    rows.push_back(&sample);
  }
  step.num_rows = static_cast<std::int64_t>(rows.size());

  const Clock::time_point now = Clock::now();
  std::ranges::sort(feeds_, [&](const Feed& a, const Feed& b) { return ranks_before(a, b, now); });
  std::vector<std::pair<std::size_t, std::int64_t>> taken;  // of feeds_: which, tokens
  const std::int64_t budget = step.budget = counted_.step_budget = budget_.tokens(step.num_rows, num_expected());
  const bool asynchronous = session().backend().asynchronous();
  const auto is_short = [](const Feed& feed) { return !feed.replayed && feed.length - feed.found <= kShort; };
  const bool has_short = std::ranges::any_of(feeds_, is_short);
  bool yields = false;
  for (std::size_t i = 0; i < feeds_.size(); ++i) {
    const Feed& feed = feeds_[i];
    if (feed.length == 0) {
      again.push_back({feed.slots[0], {}, feed.slots});
      continue;
    }
    if (!asynchronous && is_long(feed)) continue;  // it has steps of its own
    if (step.num_prompt >= budget || pieces.size() == most_parts) break;
    // A short prompt gets its first token sooner without the pieces of others, which have every second step.
    if (has_short && !yielded_ && !is_short(feed)) {
      yields = true;
      continue;
    }
    const std::int64_t count = piece_of(feed, budget - step.num_prompt);
    const auto tokens = feed.tokens().subspan(static_cast<std::size_t>(feed.fed), static_cast<std::size_t>(count));
    pieces.push_back({feed.slots[0], tokens, {}});
    if (count == feed.remaining() && !feed.replayed) pieces.back().samplers = feed.slots;
    taken.emplace_back(i, count);
    step.num_prompt += count;
  }
  std::vector<std::int32_t> slots;
  for (const auto& piece : pieces) slots.push_back(piece.slot);

  // Sequences that go on without a prompt: a step of their own, which only samples.
  const bool only_again = !again.empty();
  if (only_again) {
    slots.clear();
    for (const auto& piece : again) slots.push_back(piece.slot);
    step = {};
    taken.clear();
    rows.clear();
    for (std::size_t i = 0; i < feeds_.size(); ++i)
      if (feeds_[i].length == 0) taken.emplace_back(i, 0);
  }
  if (!only_again) {
    const std::size_t count =
        reserved<Session::Impl::Piece>(pieces, slots, [this](auto part) { session().reserve(part); });
    if (count == 0) return;
    if (count < pieces.size()) return launch_mixed(count);
  }
  yielded_ = yields;
  try {
    if (only_again)
      session().sample_again(again, *sampler_);
    else
      session().step(pieces, *sampler_);
  } catch (...) {
    return fail_step(slots, std::current_exception());
  }
  for (Sample* sample : rows) ++sample->sampled;
  std::vector<std::size_t> done;
  for (const auto& [i, count] : taken) {
    Feed& feed = feeds_[i];
    feed.fed += count;
    keep_state(feed);
    if (feed.remaining() > 0) continue;
    done.push_back(i);
    if (!feed.replayed) begin_samples(feed, step);
  }
  steps_.push_back(std::move(step));

  // What follows may fail for one request and no other.
  std::vector<Feed> ended_feeds;
  std::ranges::sort(done, std::greater{});
  for (const std::size_t i : done) {
    ended_feeds.push_back(std::move(feeds_[i]));
    feeds_.erase(feeds_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  for (Feed& feed : ended_feeds)
    if (session_) after_piece(feed);
}

// Samples behind a prompt that has been read, for which the step samples their first tokens.
void Engine::Impl::begin_samples(Feed& feed, Step& step) {
  const std::int64_t before = session().num_tokens(feed.slots[0]);
  const bool keeps = feed.request->given.keep_state;
  const std::int64_t most = std::min(room_behind(*model_, before, keeps), feed.request->params().max_tokens);
  for (std::size_t s = 0; s < feed.samples.size(); ++s) {
    samples_.push_back({feed.request, feed.samples[s], feed.slots[s], ++last_serial_, before, most});
    samples_.back().keeps = keeps;
    step.serials.push_back(last_serial_);
  }
}

// Tokens of prompts that a step may take now.
std::int64_t Engine::Impl::next_budget() const {
  const auto rows = std::ranges::count_if(samples_, [this](const Sample& sample) { return wants_step(sample); });
  return budget_.tokens(rows, num_expected());
}

// Samples that run, and that will when the prompts that are here are read.
std::int64_t Engine::Impl::num_expected() const {
  std::size_t count = num_used();
  for (const Feed& feed : waiting_) count += feed.samples.size();
  return static_cast<std::int64_t>(std::min(count, static_cast<std::size_t>(options_.max_batch_size)));
}

bool Engine::Impl::is_long(const Feed& feed) const { return feed.remaining() > kShort; }

// A piece of a long prompt, alone. On a CPU 64 tokens take several times as long as a step of a few rows, which others
// would wait for: so they have their steps between its layers.
void Engine::Impl::read_long() {
  const Clock::time_point now = Clock::now();
  auto first = feeds_.end();
  for (auto feed = feeds_.begin(); feed != feeds_.end(); ++feed)
    if (is_long(*feed) && (first == feeds_.end() || ranks_before(*feed, *first, now))) first = feed;
  Feed feed = std::move(*first);
  feeds_.erase(first);
  const std::int64_t running = std::ssize(samples_), budget = budget_.tokens(running, running);
  counted_.step_budget = budget;
  const std::int64_t count = piece_of(feed, budget);
  const bool ends = count == feed.remaining();
  const auto tokens = feed.tokens().subspan(static_cast<std::size_t>(feed.fed), static_cast<std::size_t>(count));
  Session::Impl::Piece piece{feed.slots[0], tokens, {}};
  if (ends && !feed.replayed) piece.samplers = feed.slots;
  std::exception_ptr error;
  Step step;
  step.num_prompt = count;
  step.budget = budget;
  aside_total_ = {};
  aside_ended_ = step.launched;
  try {
    // Those who come meanwhile need room: the states cannot move then.
    if (free_slots_.empty() && session().batch_size() < options_.max_batch_size) make_room(1);
    session().reserve({&piece, 1});
    long_ = &feed;
    session().step({&piece, 1}, *sampler_, [this] { between_layers(); });
  } catch (...) {
    error = std::current_exception();
  }
  long_ = nullptr;
  const auto abort = std::exchange(long_abort_, std::nullopt);
  if (const auto failure = std::exchange(long_failure_, nullptr)) {
    end(feed, FinishReason::error, what_of(failure));
    return fail_all(failure);
  }
  if (abort || error) {
    if (!abort && gave_back(model_->state_nbytes()) && !session().is_broken(feed.slots[0])) {
      feeds_.push_back(std::move(feed));  // once more
      return;
    }
    const std::string why = abort ? abort->why : what_of(error);
    end(feed, abort ? abort->finish : FinishReason::error, why);
    if (!abort && is_device_error(error)) return fail_all(error);
    for (const std::int32_t slot : feed.slots) free_slot(slot);
    return;
  }
  step.launched += aside_total_;
  last_taken_ = step.launched;  // not that of a step aside
  feed.fed += count;
  keep_state(feed);
  if (ends && !feed.replayed) begin_samples(feed, step);
  steps_.push_back(std::move(step));
  if (ends)
    after_piece(feed);
  else
    feeds_.push_back(std::move(feed));
  while (session_ && !steps_.empty()) take();
}

// Steps of others in the middle of a long prompt's. They get half of the time, and who comes new is looked at at once.
void Engine::Impl::between_layers() {
  const Clock::time_point now = Clock::now();
  bool has_news = false;
  {
    const std::lock_guard lock(mutex_);
    has_news = !incoming_.empty() || !commands_.empty() || aborting_;
  }
  const bool others =
      may_begin() || wants_step() || std::ranges::any_of(feeds_, [this](const Feed& feed) { return !is_long(feed); });
  if (has_news || (others && now - aside_ended_ >= aside_took_)) {
    {
      const Session::Impl::Aside aside(session());
      tick();
    }
    aside_ended_ = Clock::now();
    aside_took_ = aside_ended_ - now;
    aside_total_ += aside_took_;
  }
  if (long_abort_ || long_failure_) throw Error("the prompt is not wanted any more");
}

// A feed that has come to its end: its other samples get the state, or a replayed one its own.
void Engine::Impl::after_piece(Feed& feed) {
  if (feed.replayed) {
    samples_.push_back(std::move(*feed.replayed));
    samples_.back().serial = ++last_serial_;
    return;  // settle() does the rest
  }
  for (std::size_t s = 1; s < feed.slots.size(); ++s) {
    try {
      session().copy(feed.slots[0], feed.slots[s]);
    } catch (...) {
      fail_slots({&feed.slots[s], 1}, what_of(std::current_exception()));
      if (!session_) return;
    }
  }
  if (feed.request->given.keep_state && feed.request->given.every_token && !feed.request->base) {
    try {
      feed.request->base = session().snapshot(feed.slots[0], {});
    } catch (...) {
      return apply_abort(Shared(feed.request), FinishReason::error, what_of(std::current_exception()));
    }
  }
  for (Sample& sample : samples_) {
    if (sample.request != feed.request || sample.most >= 1 || sample.finished) continue;
    end(sample, FinishReason::error, out_of_room(*model_));
  }
}

// Waits for the oldest step and makes events of its tokens; those behind a sample's end are nobody's. hurried: another
// was taken just now.
void Engine::Impl::take(bool hurried) {
  const Step step = std::move(steps_.front());
  steps_.pop_front();
  std::vector<backend::SampledToken> chosen;
  try {
    if (step.serials.empty())
      session().backend().synchronize();
    else
      chosen = sampler_->take();
  } catch (...) {  // in this step or in what was enqueued after it
    fail_all(std::current_exception());
    return;
  }
  const Clock::time_point now = Clock::now();
  const std::chrono::duration<double> seconds = now - std::max(step.launched, last_taken_);
  last_taken_ = now;
  // One that only sampled again is none of either kind. One that was taken behind another without a wait had ended
  // nobody knows when.
  if (step.num_rows + step.num_prompt > 0 && !hurried)
    budget_.measured(step.num_rows, step.num_prompt, step.budget, seconds.count());
  ++counted_.steps;
  counted_.step_tokens += step.num_rows + step.num_prompt;
  if (cache_ && step.num_prompt >= kShort)
    cache_->set_seconds_per_token(seconds.count() / static_cast<double>(step.num_prompt));
  for (std::size_t i = 0; i < step.serials.size(); ++i) {
    const auto sample = std::ranges::lower_bound(samples_, step.serials[i], {}, &Sample::serial);  // serials ascend
    if (sample != samples_.end() && sample->serial == step.serials[i] && !sample->finished)
      take_token(*sample, chosen[i]);
  }
}

void Engine::Impl::take_token(Sample& sample, backend::SampledToken& chosen) {
  if (!chosen.failure.empty()) return end(sample, FinishReason::error, chosen.failure);
  const Request& request = *sample.request;
  EngineEvent event = event_of(sample.request, sample.index);
  event.token = chosen.token;
  event.logprob = chosen.logprob;
  event.top_logprobs = std::move(chosen.top_logprobs);
  sample.tokens.push_back(chosen.token);
  ++sample.taken;
  ++counted_.generated_tokens;
  event.finish = finish_of(event.token, request.params(), request.stop_ids, sample.taken, sample.most);
  if (event.finish == FinishReason::stop) event.stop_token = event.token;
  if (event.finish != FinishReason::none) {
    sample.finished = sample.complete = true;
    if (sample.keeps) {
      sample.confirmed = !request.given.reader_ends;
      if (sample.confirmed)
        sample.last = std::move(event);
      else
        emit(sample.request, std::move(event));
      return;
    }
    emit(sample.request, std::move(event));
    ended(sample.request, sample.index);
    return;
  }
  emit(sample.request, std::move(event));
  if (sample.taken >= sample.most) end(sample, FinishReason::error, out_of_room(*model_));
}

// ---- ends ----------------------------------------------------------------------------------------------------------

EngineEvent Engine::Impl::event_of(const Shared& request, int sample) const {
  EngineEvent event;
  event.request = request->id;
  event.sample = sample;
  event.num_cached_tokens = request->num_cached;
  event.scheduled = request->scheduled;
  event.time = Clock::now();
  return event;
}

void Engine::Impl::emit(const Shared& request, EngineEvent event) {
  if (request->ready.empty()) touched_.push_back(request);
  request->ready.push_back(std::move(event));
}

void Engine::Impl::ended(const Shared& request, int sample) {
  const auto index = static_cast<std::size_t>(sample);
  if (request->ended[index]) return;
  if (request->num_running == 1 && !request->given.every_token) touched_.push_back(request);  // now its events may go
  request->ended[index] = true;
  if (--request->num_running > 0) return;
  if (request->scheduled == Clock::time_point{}) {
    ++begun_;
    begun_tokens_ += static_cast<std::int64_t>(request->prompt().size());
  }
  requests_.erase(request->id);
}

// Ends a sample that has not ended, without a token and without a state.
void Engine::Impl::end(Sample& sample, FinishReason finish, const std::string& why) {
  if (sample.finished && !sample.keeps) return;
  end(sample.request, sample.index, finish, why);
  sample.finished = true;
  sample.keeps = sample.complete = false;
}

void Engine::Impl::end(const Feed& feed, FinishReason finish, const std::string& why) {
  if (feed.replayed) return end(feed.request, feed.replayed->index, finish, why);
  for (const int index : feed.samples) end(feed.request, index, finish, why);
}

void Engine::Impl::end(const Shared& request, int index, FinishReason finish, const std::string& why) {
  if (request->ended[static_cast<std::size_t>(index)]) return;
  EngineEvent event = event_of(request, index);
  event.finish = finish;
  event.error = why;
  emit(request, std::move(event));
  ended(request, index);
}

// Takes away what has ended and has nothing more to do.
void Engine::Impl::settle() {
  if (!session_) return;
  for (Sample& sample : samples_) {
    if (!sample.finished || !sample.keeps || !sample.confirmed || wants_step(sample)) continue;
    try {
      give_state(sample);
    } catch (...) {
      sample.keeps = false;
      sample.last.error = "the state could not be kept: " + what_of(std::current_exception());
      emit(sample.request, std::move(sample.last));
      ended(sample.request, sample.index);
    }
  }
  std::vector<std::int32_t> freed;
  std::erase_if(samples_, [&](const Sample& sample) {
    if (!sample.finished || sample.keeps) return false;
    if (sample.complete) keep_answer(sample);
    if (sample.slot >= 0) freed.push_back(sample.slot);
    return true;
  });
  for (const std::int32_t slot : freed) free_slot(slot);
}

// Sends the last event of a sample with its state, or has its tokens fed anew where it has seen too many.
void Engine::Impl::give_state(Sample& sample) {
  const std::int64_t fed = session().num_tokens(sample.slot) - sample.num_before;
  if (fed <= sample.taken) {
    sample.last.state = session().snapshot(sample.slot, seen_by(sample));
    sample.keeps = false;
    emit(sample.request, std::move(sample.last));
    ended(sample.request, sample.index);
    return;
  }
  if (!sample.request->base)
    throw InvalidArgument("its reader ended it, which a request that does not give every token does not allow for");
  const State* const states[] = {sample.request->base.get()};
  session().restore({&sample.slot, 1}, states);
  Feed feed{sample.request, {}, {sample.slot}};
  feed.replayed.emplace(sample);
  feed.replayed->sampled = sample.taken + 1;
  feed.length = sample.taken;
  if (feed.length == 0) return give_state(sample);
  feeds_.push_back(std::move(feed));
  sample.keeps = false;
  sample.slot = -1;  // the feed's
}

SeenTokens Engine::Impl::seen_by(const Sample& sample) const {
  SeenTokens seen;
  const Request& request = *sample.request;
  if (request.given.state) seen = request.given.state->impl().progress.seen;
  seen.add_prompt(request.prompt());
  for (std::int64_t i = 0; i < sample.taken; ++i) seen.add_output(sample.tokens[static_cast<std::size_t>(i)]);
  return seen;
}

void Engine::Impl::free_slot(std::int32_t slot) {
  if (!session_) return;  // another slot could not be freed
  try {
    session().reset(slot);
    free_slots_.push_back(slot);
  } catch (...) {
    fail_all(std::current_exception());
  }
}

// A step failed that these slots had a part in, or would have had.
void Engine::Impl::fail_slots(std::span<const std::int32_t> slots, const std::string& why) {
  const auto concerns = [&](std::int32_t slot) { return std::ranges::count(slots, slot) > 0; };
  for (Sample& sample : samples_)
    if (concerns(sample.slot)) end(sample, FinishReason::error, why);
  std::vector<std::int32_t> freed;
  std::erase_if(feeds_, [&](Feed& feed) {
    if (!concerns(feed.slots[0])) return false;
    end(feed, FinishReason::error, why);
    freed.insert(freed.end(), feed.slots.begin(), feed.slots.end());
    return true;
  });
  for (const std::int32_t slot : freed) free_slot(slot);
  settle();
}

// A step of these slots failed, alone or with the device.
void Engine::Impl::fail_step(std::span<const std::int32_t> slots, const std::exception_ptr& error) {
  if (is_device_error(error))
    fail_all(error);
  else
    fail_slots(slots, what_of(error));
}

// The states are lost: all that have one end. What waits begins with new ones. Where memory is short even for that,
// run() does it once more.
void Engine::Impl::fail_all(const std::exception_ptr& error) {
  failure_ = error;
  if (long_ != nullptr) long_failure_ = error;  // its step is under way: read_long() does the rest
  const std::string why = what_of(error);
  const bool lost = is_device_error(error);
  if (lost) {
    const std::lock_guard lock(mutex_);
    if (broken_.empty()) broken_ = why;
  }
  if (lost) waiting_.clear();
  end_begun(why);
  failure_ = nullptr;
  if (long_ == nullptr) return close_session();
  samples_.clear();
  feeds_.clear();
  steps_.clear();
}

// Ends all samples but those that wait, whatever list they are in: or in none, where memory was short for that.
void Engine::Impl::end_begun(const std::string& why) {
  std::vector<Shared> all;
  for (const auto& [id, request] : requests_)
    if (long_ == nullptr || long_->request != request) all.push_back(request);
  for (const Shared& request : all)
    for (int index = 0; index < request->params().n; ++index) {
      const auto waits = [&](const Feed& feed) {
        return feed.request == request && std::ranges::count(feed.samples, index) > 0;
      };
      if (std::ranges::none_of(waiting_, waits)) end(request, index, FinishReason::error, why);
    }
}

}  // namespace based
