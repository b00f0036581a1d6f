#pragma once

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "based/engine.h"
#include "session/session_impl.h"
#include "session/state_cache.h"
#include "session/step_budget.h"

namespace based {

/// The loop's thread has all that stands below "Of the loop"; callers' threads have what mutex_ guards. In engine.cc:
/// callers, the loop, events. In engine_admission.cc: who begins, memory, cached states. In engine_steps.cc: steps, and
/// how samples end.
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
  using Clock = EngineEvent::Clock;
  static constexpr std::int64_t kShort = 64;  // tokens of a prompt that are one step on any device
  static constexpr std::size_t kAll = std::numeric_limits<std::size_t>::max();

  struct Request {
    Id id = 0;
    EngineRequest given;
    std::uint64_t seed = 0;
    std::vector<std::int32_t> stop_ids;
    Clock::time_point arrival;
    Clock::time_point scheduled{};  // the epoch: waits
    int num_running = 0;            // samples that have not ended
    std::vector<bool> ended;        // of each sample: its last event is made
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
  void fail_all(const std::exception_ptr& error);
  void free_slot(std::int32_t slot);
  void emit(const Shared& request, EngineEvent event);
  EngineEvent event_of(const Shared& request, int sample) const;
  void ended(const Shared& request, int sample);
  void end_begun(const std::string& why);
  void send();
  void deliver();
  void publish();
  static std::string what_of(const std::exception_ptr& error);
  static bool is_device_error(const std::exception_ptr& error);
  Session::Impl& session() { return *session_; }

  const std::shared_ptr<const Model> model_;
  const EngineOptions options_;
  const pid_t process_ = getpid();
  const std::int64_t piece_, cut_;  // Backend::piece_tokens(), Backend::cut_tokens()
  const bool is_exact_;             // a cached state must not change a bit
  std::thread thread_;

  // Shared with callers.
  mutable std::mutex mutex_;
  std::condition_variable work_, idle_;
  std::deque<Shared> incoming_;
  std::deque<std::function<void(Impl&)>> commands_;
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
  std::vector<std::int32_t> free_slots_;        // taken from the back
  Clock::time_point grows_from_{};              // there was no memory for more slots: not tried again before
  std::deque<Shared> arrived_;                  // of incoming_
  std::deque<std::function<void(Impl&)>> due_;  // of commands_
  std::unordered_map<Id, Shared> requests_;
  std::vector<Feed> waiting_;
  std::vector<Feed> feeds_;      // have slots
  std::vector<Sample> samples_;  // by rising serial
  std::deque<Step> steps_;       // launched, not taken
  std::exception_ptr failure_;   // all that have states are to end
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

}  // namespace based
