#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "based/error.h"
#include "session/engine_impl.h"
#include "session/request.h"
#include "session/state_impl.h"

namespace based {

namespace {

// Between two attempts to find memory for more sequences than there was memory for.
constexpr std::chrono::milliseconds kGrowPause{100};
// What the states of more sequences than need be must leave to the steps' scratch memory.
constexpr std::size_t kHeadroom = std::size_t{64} << 20;

}  // namespace

// ---- who begins ----------------------------------------------------------------------------------------------------

// Priority, then wait / tokens to compute.
bool Engine::Impl::ranks_before(const Feed& a, const Feed& b, Clock::time_point now) const {
  if (a.request->given.priority != b.request->given.priority)
    return a.request->given.priority < b.request->given.priority;
  const auto ratio = [now](const Feed& feed) {
    const double wait = std::chrono::duration<double>(now - feed.request->arrival).count() + 1e-3;
    return wait / static_cast<double>(std::max<std::int64_t>(feed.remaining(), 1));
  };
  const double ratio_a = ratio(a), ratio_b = ratio(b);
  return ratio_a != ratio_b ? ratio_a > ratio_b : a.request->id < b.request->id;
}

// The first of those that wait; null: there is none that may begin now.
Engine::Impl::Feed* Engine::Impl::best_waiting() {
  const Clock::time_point now = Clock::now();
  Feed* best = nullptr;
  for (Feed& feed : waiting_)
    if ((best == nullptr || ranks_before(feed, *best, now)) && !is_held(feed)) best = &feed;
  return best;
}

// Whether a prompt that is being read begins as this one does: its state behind what they share is waited for.
bool Engine::Impl::is_held(const Feed& feed) {
  if (!cache_ || feed.request->given.state) return false;
  const auto& prompt = feed.request->prompt();
  std::vector<Feed*> others;
  for (Feed& other : feeds_) others.push_back(&other);
  if (long_ != nullptr) others.push_back(long_);
  for (Feed* const each : others) {
    Feed& other = *each;
    if (!other.caches || feed.request->given.priority < other.request->given.priority) continue;
    const auto& read = other.request->prompt();
    const auto end = prompt.begin() + static_cast<std::ptrdiff_t>(std::min(prompt.size() - 1, read.size()));
    std::int64_t shared = std::mismatch(prompt.begin(), end, read.begin()).first - prompt.begin();
    if (shared < other.length || is_exact_) shared = shared / cut_ * cut_;
    if (shared - other.found < cut_ || other.fed >= shared) continue;
    if (shared < other.length) other.cuts.insert(shared);
    return true;
  }
  return false;
}

std::size_t Engine::Impl::num_used() const {
  return session_ ? static_cast<std::size_t>(session_->batch_size()) - free_slots_.size() : 0;
}

// Whether there is room for some waiting samples, or may be.
bool Engine::Impl::may_begin() {
  if (waiting_.empty()) return false;
  const std::size_t used = num_used();
  if (used >= static_cast<std::size_t>(options_.max_batch_size)) return false;
  const Feed* const best = best_waiting();
  if (best == nullptr) return false;
  const std::size_t count = best->samples.size();
  if (session_ && free_slots_.size() >= count) return true;
  return count + used <= static_cast<std::size_t>(options_.max_batch_size) && may_grow();
}

// Asking for memory that is not there costs a device milliseconds.
bool Engine::Impl::may_grow() const { return num_used() == 0 || Clock::now() >= grows_from_; }

void Engine::Impl::begin_waiting() {
  while (num_used() < static_cast<std::size_t>(options_.max_batch_size)) {
    Feed* const best = best_waiting();
    if (best == nullptr) return;
    Feed feed = *best;
    try {
      if (!make_room(feed.samples.size())) return;
    } catch (...) {  // nothing runs that would give memory back
      const std::exception_ptr error = std::current_exception();
      apply_abort(feed.request, FinishReason::error, what_of(error));
      continue;
    }
    waiting_.erase(waiting_.begin() + (best - waiting_.data()));
    if (feed.request->scheduled == Clock::time_point{}) {
      feed.request->scheduled = Clock::now();
      ++begun_;
      begun_tokens_ += static_cast<std::int64_t>(feed.request->prompt().size());
      counted_.prompt_tokens += static_cast<std::int64_t>(feed.request->prompt().size());
    }
    if (begin(feed)) feeds_.push_back(std::move(feed));
  }
}

// Makes `count` slots free, if there can be. Throws when there cannot be, ever.
bool Engine::Impl::make_room(std::size_t count) {
  const auto most = static_cast<std::size_t>(options_.max_batch_size);
  if (!session_) {
    std::size_t wanted = 0;
    for (const Feed& feed : waiting_) wanted += feed.samples.size();
    const std::size_t least = options_.elastic ? count : most;
    as_many_as_fit(least, std::clamp(wanted, least, most),
                   [&](std::size_t size) { open(size, size > least ? kHeadroom : 0); });
  }
  if (free_slots_.size() >= count) return true;
  const auto size = static_cast<std::size_t>(session().batch_size());
  const std::size_t used = num_used();
  if (used + count > most) return false;
  if (long_ != nullptr) return false;  // its step is under way in the states that there are
  if (used == 0) {
    close_session();  // not both at once, the old states and the new
    return make_room(count);
  }
  if (!may_grow()) return false;
  try {
    const std::size_t grown =
        as_many_as_fit(used + count, std::min(most, std::max(2 * size, used + count)), [this](std::size_t n) {
          free_slots_.reserve(n);
          session().grow(static_cast<std::int64_t>(n));
        });
    for (std::size_t slot = grown; slot-- > size;) free_slots_.push_back(static_cast<std::int32_t>(slot));
    return true;
  } catch (const std::bad_alloc&) {  // it waits for those that run
    grows_from_ = Clock::now() + kGrowPause;
    return false;
  }
}

// Calls make(n) for the first n of most, …, least for which there is memory, what is above `least` halved each time,
// and returns n. The cache gives its memory back first. Throws std::bad_alloc when there is none for `least`.
template <typename Make>
std::size_t Engine::Impl::as_many_as_fit(std::size_t least, std::size_t most, Make&& make) {
  for (std::size_t count = most;;) {
    try {
      make(count);
      return count;
    } catch (const std::bad_alloc&) {
      if (gave_back(count * model_->state_nbytes())) continue;
      if (count == least) throw;
      count = least + (count - least) / 2;
    }
  }
}

// Throws std::bad_alloc, too, when the states do not leave `headroom` bytes of the device's memory.
void Engine::Impl::open(std::size_t capacity, std::size_t headroom) {
  auto session = std::make_unique<Session::Impl>(model_, static_cast<int>(capacity), /*keeps_seen=*/false);
  std::vector<std::int32_t> slots;
  for (std::size_t slot = capacity; slot-- > 0;) slots.push_back(static_cast<std::int32_t>(slot));
  turn_.emplace(*session);
  try {
    sampler_ = session->backend().make_sampler(session->config().vocab_size, options_.max_batch_size);
    if (headroom > 0) session->backend().allocate(headroom, backend::MemoryKind::workspace);
  } catch (...) {
    turn_.reset();
    throw;
  }
  session_ = std::move(session);
  free_slots_ = std::move(slots);
}

void Engine::Impl::close_session() noexcept {
  steps_.clear();
  samples_.clear();
  feeds_.clear();
  free_slots_.clear();
  sampler_.reset();
  if (turn_) {
    try {
      session_->backend().synchronize();
    } catch (...) {  // the device has failed: the next call says so
    }
  }
  turn_.reset();
  session_.reset();
}

// Gives the samples their slots, and the first slot what the sequence has seen. False: none is left, all have ended.
bool Engine::Impl::begin(Feed& feed) {
  const Shared& request = feed.request;
  std::vector<int> samples;
  for (const int index : feed.samples) {
    const std::int32_t slot = free_slots_.back();
    free_slots_.pop_back();
    try {
      std::span<const backend::SeenToken> seen;
      if (request->given.state) seen = request->given.state->impl().progress.seen.entries();
      sampler_->assign(slot, request->params(), request->seed, static_cast<std::uint32_t>(index), request->prompt(),
                       request->stop_ids, seen);
      samples.push_back(index);
      feed.slots.push_back(slot);
    } catch (...) {
      free_slots_.push_back(slot);
      end(request, index, FinishReason::error, what_of(std::current_exception()));
    }
  }
  feed.samples = std::move(samples);
  if (feed.slots.empty()) return false;
  try {
    if (request->given.state) {
      const State* const states[] = {request->given.state.get()};
      session().restore(std::span(feed.slots).first(1), states);
    } else if (cache_) {
      begin_from_cache(feed);
    }
    return true;
  } catch (...) {
    end(feed, FinishReason::error, what_of(std::current_exception()));
    for (const std::int32_t slot : feed.slots) free_slot(slot);
    return false;
  }
}

// ---- cached states -------------------------------------------------------------------------------------------------

// Puts the longest cached state into the feed's slot.
void Engine::Impl::begin_from_cache(Feed& feed) {
  feed.caches = true;
  const StateCache::Match match = cache_->find(feed.tokens(), feed.length - 1);
  if (match.state && !(is_exact_ && match.num_tokens % cut_ != 0)) {
    const State* const states[] = {match.state.get()};
    session().begin_restore(std::span(feed.slots).first(1), states);
    feed.fed = feed.found = feed.kept = match.num_tokens;
    if (feed.samples.front() == 0) {
      feed.request->num_cached = match.num_tokens;
      counted_.cached_tokens += match.num_tokens;
    }
  }
  const std::int64_t branch = is_exact_ ? match.branch / cut_ * cut_ : match.branch;
  if (branch > feed.fed && branch < feed.length) feed.cuts.insert(branch);
  // Where the next turn of a conversation will begin, if a state behind the answer is not exactly that of a prompt.
  const std::int64_t last = (feed.length - 1) / cut_ * cut_;
  if (is_exact_ && last > feed.fed && feed.length >= options_.cache.interval) feed.cuts.insert(last);
}

// After a piece. What cannot be kept is lost to the cache, and to nobody else.
void Engine::Impl::keep_state(Feed& feed) noexcept {
  if (!feed.caches || feed.fed < model_->impl().transformer.prefix_tokens()) return;
  const bool is_cut = feed.cuts.erase(feed.fed) > 0;
  if (is_exact_ && feed.fed % cut_ != 0) return;
  if (!is_cut && (feed.fed - feed.kept < options_.cache.interval || feed.fed == feed.length)) return;
  try {
    const std::int32_t slot[] = {feed.slots[0]};
    cache_->insert(feed.tokens().first(static_cast<std::size_t>(feed.fed)), session().begin_snapshots(slot).front());
    feed.kept = feed.fed;
  } catch (...) {
  }
}

// The state behind an answer. Not where a hit must give what no hit gives to the bit: single tokens are rounded
// otherwise than a prompt.
void Engine::Impl::keep_answer(const Sample& sample) noexcept {
  const Request& request = *sample.request;
  if (!cache_ || is_exact_ || request.given.state || request.params().n > 1 || sample.slot < 0) return;
  try {
    const std::int64_t fed = session().num_tokens(sample.slot) - sample.num_before;
    if (fed < 1 || fed > static_cast<std::int64_t>(sample.tokens.size())) return;
    if (sample.num_before < model_->impl().transformer.prefix_tokens()) return;
    std::vector<std::int32_t> tokens = request.prompt();
    tokens.insert(tokens.end(), sample.tokens.begin(), sample.tokens.begin() + fed);
    const std::int32_t slot[] = {sample.slot};
    cache_->insert(tokens, session().begin_snapshots(slot).front());
  } catch (...) {  // as keep_state
  }
}

// Takes memory of the device from the cache. False: it has none.
bool Engine::Impl::gave_back(std::size_t nbytes) noexcept {
  try {
    return cache_ && cache_->release(nbytes) > 0;
  } catch (...) {
    return false;
  }
}

}  // namespace based
