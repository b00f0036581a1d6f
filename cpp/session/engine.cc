#include "based/engine.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <utility>

#include "based/error.h"
#include "session/engine_impl.h"
#include "session/request.h"
#include "session/state_impl.h"

namespace based {

namespace {

// Bytes that a step moves for a sample, of those of the weights. An attention layer's grow: those of `num_tokens`, or
// of the longest sequence.
double row_cost(const Model& model, std::int64_t num_tokens) {
  const std::int64_t length = std::min(num_tokens, model.max_context().value_or(num_tokens));
  return static_cast<double>(model.state_nbytes(length)) / static_cast<double>(model.weight_nbytes());
}

// Signals belong to the program's own threads: one that waits for tokens is to be woken by them. Those of faults stay.
void block_signals() {
  sigset_t set;
  sigfillset(&set);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&set, fault);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

}  // namespace

std::string Engine::Impl::what_of(const std::exception_ptr& pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception of an unknown type";
  }
}

bool Engine::Impl::is_device_error(const std::exception_ptr& pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const DeviceError&) {
    return true;
  } catch (...) {
    return false;
  }
}

// ---- callers -------------------------------------------------------------------------------------------------------

Engine::Impl::Impl(std::shared_ptr<const Model> model, EngineOptions options)
    : model_(std::move(model)),
      options_(std::move(options)),
      piece_(model_->impl().executors.device().piece_tokens()),
      cut_(model_->impl().executors.device().cut_tokens()),
      is_exact_(model_->impl().executors.device().deterministic()),
      budget_(cut_, piece_, options_.max_step_tokens, row_cost(*model_, piece_)) {
  const auto check_least = [](std::int64_t value, std::int64_t least, const char* name) {
    if (value < least)
      throw InvalidArgument(std::string("engine: ") + name + " is " + std::to_string(value) + ", expected at least " +
                            std::to_string(least));
  };
  check_least(options_.max_batch_size, 1, "max_batch_size");
  check_least(options_.max_waiting_requests, 1, "max_waiting_requests");
  check_least(options_.max_waiting_tokens, 1, "max_waiting_tokens");
  check_least(options_.max_step_tokens, 0, "max_step_tokens");
  if (options_.cache.device_nbytes > 0 || options_.cache.host_nbytes > 0 || !options_.cache.folder.empty())
    cache_ = std::make_unique<StateCache>(model_, options_.cache);
  if (!options_.elastic) open(static_cast<std::size_t>(options_.max_batch_size), 0);
  publish();
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    throw IoError(error.code().value(), "creating the thread of an engine");
  }
}

Engine::Impl::~Impl() {
  shutdown(false, {});
  thread_.join();
}

void Engine::Impl::check(const EngineRequest& given) const {
  const auto& [prompt, params] = given.request;
  const ModelConfig& config = model_->config();
  std::int64_t seen = 0;
  if (given.state) {
    if (given.state->model() != model_)
      throw StateError("submit: found the state of another model, expected one of the engine's model");
    seen = given.state->num_tokens();
    const std::int64_t prefix = model_->impl().transformer.prefix_tokens();
    if (!prompt.empty() && seen > 0 && seen < prefix)
      throw InvalidArgument("submit: the state has seen " + std::to_string(seen) +
                            " tokens, and this model reads the first " + std::to_string(prefix) +
                            " tokens of a sequence as a whole: expected a state that has seen as many, or none");
  }
  if (!prompt.empty() || !given.state || !given.state->impl().progress.last.rows.data)
    check_tokens(prompt, config.vocab_size, "submit: the prompt");
  model_->impl().check_context(seen, static_cast<std::int64_t>(prompt.size()), "submit: the prompt");
  params.validate(config.vocab_size);
  if (given.reader_ends && !given.every_token)
    throw InvalidArgument("submit: found reader_ends without every_token: who says how many tokens it took needs each");
}

Engine::Id Engine::Impl::submit(EngineRequest given) {
  check(given);
  auto request = std::make_shared<Request>();
  request->seed = given.request.params.seed.value_or(fresh_seed());
  request->stop_ids = stop_ids_of(given.request.params, model_->config());
  request->num_running = given.request.params.n;
  request->ended.assign(static_cast<std::size_t>(given.request.params.n), false);
  request->given = std::move(given);
  request->arrival = Clock::now();
  const auto length = static_cast<std::int64_t>(request->prompt().size());

  const std::lock_guard lock(mutex_);
  if (!broken_.empty()) throw DeviceError("submit: the engine takes no more requests: " + broken_);
  if (closing_) throw EngineClosedError("submit: this engine was shut down");
  // Those that no free slot is about to take: they have at most as many samples as have no slot.
  const std::int64_t num_left = std::clamp<std::int64_t>(waiting_samples_ - room_, 0, num_waiting_);
  if (num_left >= options_.max_waiting_requests)
    throw EngineBusyError(std::to_string(num_left) + " requests are waiting, which is max_waiting_requests");
  if (num_left > 0 && waiting_tokens_ + length > options_.max_waiting_tokens)
    throw EngineBusyError("requests of " + std::to_string(waiting_tokens_) + " tokens are waiting, and with " +
                          std::to_string(length) + " more they exceed max_waiting_tokens, " +
                          std::to_string(options_.max_waiting_tokens));
  incoming_.push_back(request);  // what may throw comes first
  request->id = ++last_id_;
  ++num_waiting_;
  waiting_tokens_ += length;
  waiting_samples_ += request->params().n;
  work_.notify_one();
  return request->id;
}

void Engine::Impl::command(Id id, std::function<void(Impl&)> apply) {
  const std::lock_guard lock(mutex_);
  if (id == 0 || id > last_id_) throw InvalidArgument("engine: there is no request " + std::to_string(id));
  if (has_ended_) return;
  commands_.push_back(std::move(apply));
  work_.notify_one();
}

void Engine::Impl::cancel(Id id, std::string why) {
  command(id, [id, why = std::move(why)](Impl& self) {
    const auto found = self.requests_.find(id);
    if (found != self.requests_.end()) self.apply_abort(Shared(found->second), FinishReason::abort, why);
  });
}

void Engine::Impl::finish(Id id, int index, std::int64_t num_read) {
  command(id, [id, index, num_read](Impl& self) {
    for (Sample& sample : self.samples_) {
      if (sample.request->id != id || sample.index != index) continue;
      if (sample.finished && (!sample.keeps || sample.confirmed)) return;
      sample.finished = sample.confirmed = sample.complete = true;
      sample.taken = std::clamp<std::int64_t>(num_read, 0, sample.taken);
      sample.last = self.event_of(sample.request, index);
      sample.last.finish = FinishReason::stop;
      if (!sample.keeps) self.ended(sample.request, index);
      return;
    }
  });
}

void Engine::Impl::pause(Id id, bool paused) {
  command(id, [id, paused](Impl& self) {
    const auto found = self.requests_.find(id);
    if (found != self.requests_.end()) found->second->paused = paused;
  });
}

EngineStats Engine::Impl::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  if (cache_) stats.cache = cache_->stats();
  stats.waiting_requests = num_waiting_;
  stats.waiting_tokens = waiting_tokens_;
  return stats;
}

bool Engine::Impl::shutdown(bool drain, std::optional<std::chrono::duration<double>> timeout) {
  std::unique_lock lock(mutex_);
  closing_ = true;
  aborting_ |= !drain;
  work_.notify_one();
  const auto has_ended = [this] { return has_ended_; };
  constexpr std::chrono::hours kLongest{24 * 365};  // what clocks can add to now
  if (timeout && *timeout < kLongest)
    return idle_.wait_for(lock, std::chrono::duration_cast<Clock::duration>(*timeout), has_ended);
  idle_.wait(lock, has_ended);
  return true;
}

// ---- the loop ------------------------------------------------------------------------------------------------------

void Engine::Impl::run() noexcept {
  block_signals();
  int num_failures = 0;
  while (true) {
    try {
      if (failure_) {
        fail_all(std::exception_ptr(failure_));
        send();
      }
      if (!tick()) break;
      num_failures = 0;
    } catch (...) {  // of memory for the loop's own lists; steps and states have been taken care of
      if (!failure_) failure_ = std::current_exception();
      if (++num_failures > 3) {
        const std::lock_guard lock(mutex_);
        closing_ = aborting_ = true;
        try {
          if (broken_.empty()) broken_ = "the loop failed again and again";
        } catch (...) {  // then submit() says that it was shut down
        }
      }
      if (num_failures > 6) break;
    }
  }
  close_session();
  if (cache_) {
    try {
      cache_->flush();
    } catch (...) {  // what cannot be written is lost to the cache
    }
  }
  if (options_.after_end) options_.after_end();
  const std::lock_guard lock(mutex_);
  incoming_.clear();
  commands_.clear();
  has_ended_ = true;
  idle_.notify_all();
}

// Once around: what callers want, one step, events. False: it is over.
bool Engine::Impl::tick() {
  if (!receive()) return false;
  expire();
  begin_waiting();
  advance();
  settle();
  if (options_.elastic && requests_.empty() && session_) {
    bool is_idle = false;
    {
      const std::lock_guard lock(mutex_);
      is_idle = incoming_.empty();
    }
    if (is_idle) close_session();
  }
  send();
  return true;
}

// Waits until there is something to do; takes new requests and commands. False: it is over.
bool Engine::Impl::receive() {
  bool aborting = false;
  {
    std::unique_lock lock(mutex_);
    const auto has_news = [this] { return !incoming_.empty() || !commands_.empty() || aborting_; };
    const bool is_still = arrived_.empty() && due_.empty() && long_ == nullptr && steps_.empty() && feeds_.empty() &&
                          !may_begin() && !wants_step();
    if (is_still) {
      std::optional<Clock::time_point> next;
      for (const auto& [id, request] : requests_)
        if (request->given.deadline && (!next || *request->given.deadline < *next)) next = request->given.deadline;
      if (!waiting_.empty() && !may_grow() && (!next || grows_from_ < *next)) next = grows_from_;
      const auto wakes = [&] { return has_news() || (closing_ && requests_.empty()); };
      if (next)
        work_.wait_until(lock, *next, wakes);
      else
        work_.wait(lock, wakes);
    }
    if (closing_ && requests_.empty() && incoming_.empty() && arrived_.empty()) return false;
    if (arrived_.empty()) arrived_.swap(incoming_);
    if (due_.empty()) due_.swap(commands_);
    aborting = aborting_;
  }
  // What fails for want of memory stays for the next turn.
  while (!arrived_.empty()) {
    const Shared request = arrived_.front();
    requests_.emplace(request->id, request);
    arrived_.pop_front();
    const int most = options_.max_batch_size;
    for (int s = 0; s < request->params().n; ++s) {
      if (s % most == 0) {
        waiting_.push_back({request, {}});
        waiting_.back().length = static_cast<std::int64_t>(request->prompt().size());
      }
      waiting_.back().samples.push_back(s);
    }
  }
  for (; !due_.empty(); due_.pop_front()) due_.front()(*this);
  if (aborting) {
    std::vector<Shared> all;
    for (const auto& [id, request] : requests_) all.push_back(request);
    for (const Shared& request : all) apply_abort(request, FinishReason::abort, "the engine was shut down");
  }
  return true;
}

void Engine::Impl::expire() {
  const Clock::time_point now = Clock::now();
  std::vector<Shared> late;
  for (const auto& [id, request] : requests_)
    if (request->given.deadline && *request->given.deadline <= now) late.push_back(request);
  for (const Shared& request : late) apply_abort(request, FinishReason::abort, "its deadline has passed");
}

// Ends all samples of a request, wherever they are.
void Engine::Impl::apply_abort(const Shared& request, FinishReason finish, const std::string& why) {
  for (Sample& sample : samples_)
    if (sample.request == request) end(sample, finish, why);
  std::vector<std::int32_t> freed;
  const auto concerns = [&](const Feed& feed) {
    if (feed.request != request) return false;
    end(feed, finish, why);
    freed.insert(freed.end(), feed.slots.begin(), feed.slots.end());
    return true;
  };
  std::erase_if(waiting_, concerns);
  std::erase_if(feeds_, concerns);
  if (long_ != nullptr && long_->request == request && !long_abort_) long_abort_ = {finish, why};
  for (const std::int32_t slot : freed) free_slot(slot);
  settle();
}

// ---- events --------------------------------------------------------------------------------------------------------

void Engine::Impl::send() {
  publish();  // whoever has read an event finds its effects counted
  deliver();
}

void Engine::Impl::deliver() {
  for (const Shared& request : touched_) {
    const bool has_ended = request->num_running == 0;
    if (!request->given.every_token && !has_ended) continue;
    const std::vector<EngineEvent> events = std::exchange(request->ready, {});
    if (!request->given.sink || events.empty()) continue;
    try {
      request->given.sink(events);
    } catch (...) {  // it was told not to
    }
  }
  const bool any = !touched_.empty();
  touched_.clear();
  if (any && options_.after_events) {
    try {
      options_.after_events();
    } catch (...) {  // it was told not to
    }
  }
}

void Engine::Impl::publish() {
  counted_.running = static_cast<std::int64_t>(samples_.size());
  if (long_ != nullptr) counted_.running += static_cast<std::int64_t>(long_->slots.size());
  for (const Feed& feed : feeds_) counted_.running += static_cast<std::int64_t>(feed.slots.size());
  counted_.slots = session_ ? session_->batch_size() : 0;
  counted_.max_batch_size = options_.max_batch_size;
  const std::size_t room =
      may_grow() ? static_cast<std::size_t>(options_.max_batch_size) - num_used() : free_slots_.size();
  std::int64_t samples = 0;
  for (const Feed& feed : waiting_) samples += std::ssize(feed.samples);
  const std::lock_guard lock(mutex_);
  for (const Shared& request : incoming_) samples += request->params().n;
  room_ = static_cast<std::int64_t>(room);
  waiting_samples_ = samples;
  stats_ = counted_;
  num_waiting_ -= std::exchange(begun_, 0);
  waiting_tokens_ -= std::exchange(begun_tokens_, 0);
}

// ---- Engine --------------------------------------------------------------------------------------------------------

namespace {

[[noreturn]] void throw_in_child() {
  throw EngineClosedError("this engine belongs to the process that forked this one: make one in this process");
}

}  // namespace

Engine::Engine(std::shared_ptr<const Model> model, EngineOptions options)
    : impl_(std::make_unique<Impl>(std::move(model), std::move(options))) {}

Engine::~Engine() {
  if (impl_->in_this_process()) return;
  // A parent's: its thread is not here, and its locks may be held for ever. It stays in a list, so that it does not
  // count as lost.
  static std::atomic<Impl*> last{nullptr};
  Impl* const impl = impl_.release();
  impl->older = last.exchange(impl);
}

Engine::Id Engine::submit(EngineRequest request) {
  if (!impl_->in_this_process()) throw_in_child();
  return impl_->submit(std::move(request));
}
void Engine::cancel(Id id, std::string why) {
  if (impl_->in_this_process()) impl_->cancel(id, std::move(why));
}
void Engine::finish(Id id, int sample, std::int64_t num_read) {
  if (impl_->in_this_process()) impl_->finish(id, sample, num_read);
}
void Engine::pause(Id id, bool paused) {
  if (impl_->in_this_process()) impl_->pause(id, paused);
}
EngineStats Engine::stats() const {
  if (!impl_->in_this_process()) throw_in_child();
  return impl_->stats();
}
bool Engine::shutdown(bool drain, std::optional<std::chrono::duration<double>> timeout) {
  return !impl_->in_this_process() || impl_->shutdown(drain, timeout);
}

}  // namespace based
