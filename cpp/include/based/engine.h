#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "based/error.h"
#include "based/generation.h"
#include "based/model.h"
#include "based/state.h"
#include "based/state_cache.h"

namespace based {

/// A request that an engine has no room for now.                    based.EngineBusyError
class EngineBusyError : public Error {
 public:
  using Error::Error;
};

/// A request to an engine that was shut down.                       based.EngineClosedError
class EngineClosedError : public Error {
 public:
  using Error::Error;
};

/// What one step adds to one sample of a request, or how the sample ended.
struct EngineEvent {
  using Clock = std::chrono::steady_clock;

  std::uint64_t request = 0;
  int sample = 0;           // 0 … n − 1
  std::int32_t token = -1;  // −1: the sample has ended without another token
  float logprob = 0;
  std::vector<TokenLogprob> top_logprobs;  // as TokenEvent::top_logprobs
  FinishReason finish = FinishReason::none;
  std::optional<std::int32_t> stop_token;
  std::string error;                   // why, when finish is error or abort
  std::int64_t num_cached_tokens = 0;  // of the request's prompt, that were not computed
  Clock::time_point scheduled{};       // when the request left the queue; the epoch: it never did
  Clock::time_point time{};            // when this was known
  std::shared_ptr<const State> state;  // of a sample's last event, where EngineRequest::keep_state asks for it
};

struct EngineRequest {
  /// Takes a request's events, in order, on the loop's thread: it must neither block nor throw, nor call the engine.
  using Sink = std::function<void(std::span<const EngineEvent>)>;

  GenerationRequest request;
  int priority = 0;                                             // smaller is sooner
  std::optional<EngineEvent::Clock::time_point> deadline = {};  // then it is aborted
  std::shared_ptr<const State> state = nullptr;                 // goes on from it; the prompt may then be empty
  bool keep_state = false;   // the last event of a sample holds its state after all tokens returned
  bool reader_ends = false;  // with keep_state: that event waits for finish(), by which the reader says what it took
  bool every_token = true;   // false: the events are given in one call, when all samples have ended
  Sink sink = {};            // may be empty
};

struct EngineOptions {
  int max_batch_size = 1;  // samples that run at once

  // What may wait for others to end; submit() throws EngineBusyError beyond. One request may always wait, however long
  // it is, and what free slots are about to take does not count.
  std::int64_t max_waiting_requests = std::numeric_limits<std::int64_t>::max();
  std::int64_t max_waiting_tokens = std::numeric_limits<std::int64_t>::max();  // of their prompts

  /// Prompt tokens in one step, up to a rounding to whole pieces; 0: chosen from measured step times.
  std::int64_t max_step_tokens = 0;

  StateCacheOptions cache = {};  // of states behind prompts and answers; without bytes: none

  /// Memory for states is taken as samples need it, and given back when nothing runs. false: taken at the start.
  bool elastic = false;

  /// Called by the loop's thread behind the sinks of a step. Must neither block nor throw.
  std::function<void()> after_events = {};

  /// Called once, when the loop is over: no event follows. Must neither block nor throw.
  std::function<void()> after_end = {};
};

struct EngineStats {
  std::int64_t running = 0;           // samples
  std::int64_t waiting_requests = 0;  // that have not begun
  std::int64_t waiting_tokens = 0;    // of their prompts
  int slots = 0;                      // samples that the memory taken has room for
  int max_batch_size = 0;
  std::int64_t step_budget = 0;  // prompt tokens that the last step with prompts might have taken; 0 before the first

  // In all, since the start.
  std::int64_t prompt_tokens = 0;     // of requests that have begun
  std::int64_t cached_tokens = 0;     // of these, not computed
  std::int64_t generated_tokens = 0;  // returned
  std::int64_t steps = 0;
  std::int64_t step_tokens = 0;  // of all steps
  StateCacheStats cache;
};

/// Runs the requests of any number of threads in one batch, on a thread of its own. Each step advances every running
/// sample by one token and takes pieces of waiting prompts as far as the step stays short. What a request yields
/// depends on nothing but the model, its prompt, its params and its state, as with Generator. Requests that wait come
/// in order of priority, then of their wait over the tokens of their prompt (highest response ratio). Every method but
/// the destructor may be called by any thread, and by none of a forked child, where it throws EngineClosedError.
class Engine {
 public:
  using Id = std::uint64_t;

  /// Throws InvalidArgument, OutOfMemory.
  Engine(std::shared_ptr<const Model> model, EngineOptions options);

  /// Aborts what runs. Not to be called by the loop's thread.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Throws InvalidArgument, StateError (a state of another model), EngineBusyError (the queue is full),
  /// EngineClosedError, and DeviceError when the device has failed.
  Id submit(EngineRequest request);

  /// Ends a request with FinishReason::abort at the next step. No effect on one that has ended.
  void cancel(Id id, std::string why = "cancelled");

  /// Ends one sample after `num_read` of its tokens (a stop string was found): no event follows, but with keep_state
  /// one that holds the state after these tokens, FinishReason::stop.
  void finish(Id id, int sample, std::int64_t num_read);

  /// A paused request keeps its place in memory and takes no step: its reader is slow.
  void pause(Id id, bool paused);

  EngineStats stats() const;

  /// Takes no more requests; waits until those that it has are ended: finished (`drain`) or aborted. A second call may
  /// abort what a first one waits for. Returns false when `timeout` passes before.
  bool shutdown(bool drain, std::optional<std::chrono::duration<double>> timeout = {});

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
