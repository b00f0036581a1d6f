#include "based/engine.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>

#include "based/error.h"
#include "session/request.h"
#include "session/session_impl.h"
#include "session/state_cache.h"
#include "session/state_impl.h"
#include "session/step_budget.h"

namespace based {

namespace {

using Clock = EngineEvent::Clock;

// Prompts are cut at multiples of this from their start. Every device computes in chunks of so many tokens, counted
// from where a call begins, so that cuts change no bit where nothing else does (tests/python/test_laws.py). It divides
// Backend::chunk_tokens().
constexpr std::int64_t kCut = 64;
// Between two attempts to find memory for more sequences than there was memory for.
constexpr std::chrono::milliseconds kGrowPause{100};
// What the states of more sequences than need be must leave to the steps' scratch memory.
constexpr std::size_t kHeadroom = std::size_t{64} << 20;
constexpr std::size_t kAll = std::numeric_limits<std::size_t>::max();

std::string what_of(const std::exception_ptr& pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception of an unknown type";
  }
}

bool is_device_error(const std::exception_ptr& pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const DeviceError&) {
    return true;
  } catch (...) {
    return false;
  }
}

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

class Engine::Impl {
 public:
  Impl(std::shared_ptr<const Model> model, EngineOptions options);
  ~Impl();

  Id submit(EngineRequest given);
  void command(Id id, std::function<void(Impl&)> apply);
  void cancel(Id id, std::string why);
  void finish(Id id, int sample, std::int64_t num_read);
  void pause(Id id, bool paused);
  EngineStats stats() const;
  bool shutdown(bool drain, std::optional<std::chrono::duration<double>> timeout);

  bool in_this_process() const { return process_ == getpid(); }
  Impl* older = nullptr;  // see Engine::~Engine

 private:
  struct Request {
    Id id = 0;
    EngineRequest given;
    std::uint64_t seed = 0;
    std::vector<std::int32_t> stop_ids;
    Clock::time_point arrival;
    Clock::time_point scheduled{};  // the epoch: waits
    int num_running = 0;            // samples that have not ended
    std::int64_t num_cached = 0;
    bool paused = false;
    std::shared_ptr<const State> base;  // after the prompt, where a sample may have to be fed its tokens anew
    std::vector<EngineEvent> ready;     // for the sink

    const SamplingParams& params() const { return given.request.params; }
    const std::vector<std::int32_t>& prompt() const { return given.request.prompt; }
  };
  using Shared = std::shared_ptr<Request>;

  // One sample. Of tokens 1, 2, …: `sampled` are chosen or being chosen, all of them but the last fed, and `tokens` are
  // known here.
  struct Sample {
    Shared request;
    int index = 0;
    std::int32_t slot = 0;
    std::uint64_t serial = 0;
    std::int64_t num_before = 0;  // tokens of the sequence before token 1
    std::int64_t most = 0;        // tokens that it may have: max_tokens, or as many as have room
    std::int64_t sampled = 1;
    std::int64_t taken = 0;  // returned
    bool finished = false;
    bool keeps = false;      // its state is wanted
    bool complete = false;   // it was not ended by a failure or an abort
    bool confirmed = false;  // its reader has said how many tokens it has
    EngineEvent last{};      // waits for the state
    std::vector<std::int32_t> tokens{};
  };

  // A sequence that is fed several tokens: a prompt, behind which its samples begin, or the tokens of a sample whose
  // state is to be made anew (`replayed`).
  struct Feed {
    Shared request;
    std::vector<int> samples;
    std::vector<std::int32_t> slots{};  // of the samples; the first one is fed. Empty: it waits for room
    std::int64_t fed = 0;
    std::int64_t length = 0;
    std::optional<Sample> replayed{};
    bool caches = false;            // its states are to be kept
    std::int64_t found = 0;         // tokens of the cached state that it began with
    std::int64_t kept = 0;          // tokens of the last state that was kept of it
    std::set<std::int64_t> cuts{};  // where a state is to be kept, whatever the interval

    std::span<const std::int32_t> tokens() const {
      return std::span(replayed ? replayed->tokens : request->prompt()).first(static_cast<std::size_t>(length));
    }
    std::int64_t remaining() const { return length - fed; }
  };

  // Which sample each entry of a step belongs to.
  struct Step {
    std::vector<std::uint64_t> serials{};
    std::int64_t num_rows = 0;    // samples that were fed
    std::int64_t num_prompt = 0;  // tokens of prompts
    std::int64_t budget = 0;      // tokens of prompts that it might have had
    Clock::time_point launched = Clock::now();
  };

  void run() noexcept;
  bool tick();
  bool receive();
  void apply_abort(const Shared& request, FinishReason finish, const std::string& why);
  void check(const EngineRequest& given) const;
  void expire();
  void begin_waiting();
  Feed* best_waiting();
  bool is_held(const Feed& feed);
  void begin_from_cache(Feed& feed);
  void keep_state(Feed& feed) noexcept;
  void keep_answer(const Sample& sample) noexcept;
  bool gave_back(std::size_t nbytes) noexcept;
  bool ranks_before(const Feed& a, const Feed& b, Clock::time_point now) const;
  bool make_room(std::size_t count);
  template <typename Make>
  std::size_t as_many_as_fit(std::size_t least, std::size_t most, Make&& make);
  void open(std::size_t capacity, std::size_t headroom);
  void close_session() noexcept;
  bool begin(Feed& feed);
  void advance();
  bool launch();
  void launch_mixed(std::size_t most_parts = kAll);
  std::int64_t num_expected() const;
  std::int64_t next_budget() const;
  bool is_long(const Feed& feed) const;
  void read_long();
  void between_layers();
  void begin_samples(Feed& feed, Step& step);
  std::int64_t piece_of(const Feed& feed, std::int64_t budget) const;
  void after_piece(Feed& feed);
  void take(bool hurried = false);
  void take_token(Sample& sample, backend::SampledToken& chosen);
  void end(Sample& sample, FinishReason finish, const std::string& why);
  void end(const Feed& feed, FinishReason finish, const std::string& why);
  void end(const Shared& request, int index, FinishReason finish, const std::string& why);
  void settle();
  void give_state(Sample& sample);
  SeenTokens seen_by(const Sample& sample) const;
  bool wants_step(const Sample& sample) const;
  bool wants_step() const;
  bool may_begin();
  bool may_run_ahead();
  bool may_grow() const;
  std::size_t num_used() const;
  template <typename Part, typename Reserve>
  std::size_t reserved(std::span<const Part> parts, std::span<const std::int32_t> slots, Reserve&& reserve);
  void fail_slots(std::span<const std::int32_t> slots, const std::string& why);
  void fail_step(std::span<const std::int32_t> slots, const std::exception_ptr& error);
  void fail_all(const std::exception_ptr& error) noexcept;
  void free_slot(std::int32_t slot);
  void emit(const Shared& request, EngineEvent event);
  EngineEvent event_of(const Shared& request, int sample) const;
  void ended(const Shared& request);
  void send();
  void deliver();
  void publish();
  Session::Impl& session() { return *session_; }

  const std::shared_ptr<const Model> model_;
  const EngineOptions options_;
  const pid_t process_ = getpid();
  const std::int64_t chunk_;
  const bool is_exact_;  // a cached state must not change a bit
  std::thread thread_;

  // Shared with callers.
  mutable std::mutex mutex_;
  std::condition_variable work_, idle_;
  std::vector<Shared> incoming_;
  std::vector<std::function<void(Impl&)>> commands_;
  std::string broken_;  // why it takes no more requests
  bool closing_ = false, aborting_ = false, has_ended_ = false;
  std::int64_t num_waiting_ = 0, waiting_tokens_ = 0, waiting_samples_ = 0;
  std::int64_t room_ = 0;  // samples that could begin, when the loop looked last
  Id last_id_ = 0;
  EngineStats stats_;

  // Of the loop.
  std::unique_ptr<StateCache> cache_;  // null: none
  std::unique_ptr<Session::Impl> session_;
  std::optional<Session::Impl::Turn> turn_;
  std::unique_ptr<backend::Sampler> sampler_;
  std::vector<std::int32_t> free_slots_;  // taken from the back
  Clock::time_point grows_from_{};        // there was no memory for more slots: not tried again before
  std::unordered_map<Id, Shared> requests_;
  std::vector<Feed> waiting_;
  std::vector<Feed> feeds_;      // have slots
  std::vector<Sample> samples_;  // by rising serial
  std::deque<Step> steps_;       // launched, not taken
  std::uint64_t last_serial_ = 0;
  StepBudget budget_;
  bool yielded_ = false;  // the last step left out pieces of long prompts

  // A piece of a long prompt, between whose layers others take steps. Only where the device is not asynchronous.
  struct Aborted {
    FinishReason finish;
    std::string why;
  };
  Feed* long_ = nullptr;               // the prompt
  std::optional<Aborted> long_abort_;  // it is to end
  std::exception_ptr long_failure_;    // all that have states are to end
  Clock::time_point aside_ended_{};
  Clock::duration aside_took_{}, aside_total_{};
  Clock::time_point last_taken_{};
  std::vector<Shared> touched_;  // have events
  EngineStats counted_;          // what publish() copies
  std::int64_t begun_ = 0, begun_tokens_ = 0;
};

// ---- callers -------------------------------------------------------------------------------------------------------

Engine::Impl::Impl(std::shared_ptr<const Model> model, EngineOptions options)
    : model_(std::move(model)),
      options_(std::move(options)),
      chunk_(model_->impl().executors.device().chunk_tokens()),
      is_exact_(model_->impl().executors.device().deterministic()),
      budget_(kCut, chunk_, options_.max_step_tokens, row_cost(*model_, chunk_)) {
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
}

Engine::Id Engine::Impl::submit(EngineRequest given) {
  check(given);
  auto request = std::make_shared<Request>();
  request->seed = given.request.params.seed.value_or(fresh_seed());
  request->stop_ids = stop_ids_of(given.request.params, model_->config());
  request->num_running = given.request.params.n;
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
      if (!sample.keeps) self.ended(sample.request);
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
      if (!tick()) break;
      num_failures = 0;
    } catch (...) {  // of memory for the loop's own lists; steps and states have been taken care of
      fail_all(std::current_exception());
      if (++num_failures > 3) {
        const std::lock_guard lock(mutex_);
        if (broken_.empty()) broken_ = "the loop failed again and again";
        closing_ = aborting_ = true;
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
  std::vector<Shared> incoming;
  std::vector<std::function<void(Impl&)>> commands;
  bool aborting = false;
  {
    std::unique_lock lock(mutex_);
    const auto has_news = [this] { return !incoming_.empty() || !commands_.empty() || aborting_; };
    const bool is_still = long_ == nullptr && steps_.empty() && feeds_.empty() && !may_begin() && !wants_step();
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
    if (closing_ && requests_.empty() && incoming_.empty()) return false;
    incoming.swap(incoming_);
    commands.swap(commands_);
    aborting = aborting_;
  }
  for (Shared& request : incoming) {
    requests_.emplace(request->id, request);
    const int most = options_.max_batch_size;
    for (int s = 0; s < request->params().n; ++s) {
      if (s % most == 0) {
        waiting_.push_back({request, {}});
        waiting_.back().length = static_cast<std::int64_t>(request->prompt().size());
      }
      waiting_.back().samples.push_back(s);
    }
  }
  for (const auto& command : commands) command(*this);
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
    if (shared < other.length || is_exact_) shared = shared / kCut * kCut;
    if (shared - other.found < kCut || other.fed >= shared) continue;
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
  if (match.state && !(is_exact_ && match.num_tokens % kCut != 0)) {
    const State* const states[] = {match.state.get()};
    session().begin_restore(std::span(feed.slots).first(1), states);
    feed.fed = feed.found = feed.kept = match.num_tokens;
    if (feed.samples.front() == 0) {
      feed.request->num_cached = match.num_tokens;
      counted_.cached_tokens += match.num_tokens;
    }
  }
  const std::int64_t branch = is_exact_ ? match.branch / kCut * kCut : match.branch;
  if (branch > feed.fed && branch < feed.length) feed.cuts.insert(branch);
  // Where the next turn of a conversation will begin, if a state behind the answer is not exactly that of a prompt.
  const std::int64_t last = (feed.length - 1) / kCut * kCut;
  if (is_exact_ && last > feed.fed && feed.length >= options_.cache.interval) feed.cuts.insert(last);
}

// After a piece. What cannot be kept is lost to the cache, and to nobody else.
void Engine::Impl::keep_state(Feed& feed) noexcept {
  if (!feed.caches || feed.fed < model_->impl().transformer.prefix_tokens()) return;
  const bool is_cut = feed.cuts.erase(feed.fed) > 0;
  if (is_exact_ && feed.fed % kCut != 0) return;
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
  const std::int64_t most = std::min(std::max(budget / kCut * kCut, kCut), chunk_);
  // A cut is at a multiple of kCut from the prompt's start: what a sequence computes depends on it alone.
  const std::int64_t count = std::min(feed.remaining(), most - feed.fed % kCut);
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
  const auto is_short = [](const Feed& feed) { return !feed.replayed && feed.length - feed.found <= kCut; };
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
  yielded_ = yields;
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

bool Engine::Impl::is_long(const Feed& feed) const { return feed.remaining() > kCut; }

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
  if (cache_ && step.num_prompt >= kCut)
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
    ended(sample.request);
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

void Engine::Impl::ended(const Shared& request) {
  if (--request->num_running > 0) return;
  if (request->scheduled == Clock::time_point{}) {
    ++begun_;
    begun_tokens_ += static_cast<std::int64_t>(request->prompt().size());
  }
  if (!request->given.every_token) touched_.push_back(request);  // now its events may go
  requests_.erase(request->id);
}

// Ends a sample that has not ended, without a token and without a state.
void Engine::Impl::end(Sample& sample, FinishReason finish, const std::string& why) {
  if (sample.finished && !sample.keeps) return;
  sample.finished = true;
  sample.keeps = sample.complete = false;
  end(sample.request, sample.index, finish, why);
}

void Engine::Impl::end(const Feed& feed, FinishReason finish, const std::string& why) {
  if (feed.replayed) return end(feed.request, feed.replayed->index, finish, why);
  for (const int index : feed.samples) end(feed.request, index, finish, why);
}

void Engine::Impl::end(const Shared& request, int index, FinishReason finish, const std::string& why) {
  EngineEvent event = event_of(request, index);
  event.finish = finish;
  event.error = why;
  emit(request, std::move(event));
  ended(request);
}

// Takes away what has ended and has nothing more to do.
void Engine::Impl::settle() {
  if (!session_) return;
  std::vector<std::int32_t> failed;
  for (Sample& sample : samples_) {
    if (!sample.finished || !sample.keeps || !sample.confirmed || wants_step(sample)) continue;
    try {
      give_state(sample);
    } catch (...) {
      sample.keeps = false;
      sample.last.error = "the state could not be kept: " + what_of(std::current_exception());
      emit(sample.request, std::move(sample.last));
      ended(sample.request);
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
    ended(sample.request);
    return;
  }
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

// The states are lost: all that have one end. What waits begins with new ones.
void Engine::Impl::fail_all(const std::exception_ptr& error) noexcept {
  const std::string why = what_of(error);
  const bool lost = is_device_error(error);
  if (lost) {
    const std::lock_guard lock(mutex_);
    if (broken_.empty()) broken_ = why;
  }
  if (long_ != nullptr) long_failure_ = error;  // its step is under way: read_long() does the rest
  for (Sample& sample : samples_) end(sample, FinishReason::error, why);
  for (const Feed& feed : feeds_) end(feed, FinishReason::error, why);
  if (lost) {
    for (const Feed& feed : waiting_) end(feed, FinishReason::error, why);
    waiting_.clear();
  }
  if (long_ == nullptr) return close_session();
  samples_.clear();
  feeds_.clear();
  steps_.clear();
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
