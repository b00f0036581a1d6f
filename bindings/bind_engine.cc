#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <filesystem>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "based/engine.h"
#include "based/error.h"
#include "bindings.h"

namespace based::python {

namespace {

class QueuedEngine;

}  // namespace

template <>
inline constexpr bool is_bound<QueuedEngine> = true;

namespace {

constexpr double kLongestWait = 60;  // seconds

// A deadline has no place beyond what a clock counts.
constexpr double kLongestTimeout = 3e8;

/// What an engine's loop, which knows no Python, leaves for a thread of Python.
class EventQueue {
 public:
  void push(std::span<const EngineEvent> events) {
    const std::lock_guard lock(mutex_);
    events_.insert(events_.end(), events.begin(), events.end());
  }
  void notify() { news_.notify_all(); }
  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    news_.notify_all();
  }

  /// Nothing: no events are to come. Empty: the time is over.
  std::optional<std::vector<EngineEvent>> wait(double seconds) {
    std::unique_lock lock(mutex_);
    news_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return !events_.empty() || ended_; });
    if (events_.empty() && ended_) return std::nullopt;
    return std::exchange(events_, {});
  }

 private:
  std::mutex mutex_;
  std::condition_variable news_;
  std::vector<EngineEvent> events_;
  bool ended_ = false;
};

class QueuedEngine {
 public:
  QueuedEngine(std::shared_ptr<const Model> model, EngineOptions options) : vocab_size_(model->config().vocab_size) {
    options.after_events = [queue = queue_] { queue->notify(); };
    options.after_end = [queue = queue_] { queue->end(); };
    engine_ = std::make_unique<Engine>(std::move(model), std::move(options));
  }
  ~QueuedEngine() {
    const ReleaseGil nogil;
    engine_.reset();
  }
  QueuedEngine(const QueuedEngine&) = delete;
  QueuedEngine& operator=(const QueuedEngine&) = delete;

  Engine& engine() const { return *engine_; }
  std::int64_t vocab_size() const { return vocab_size_; }
  EngineRequest::Sink sink() const {
    return [queue = queue_](std::span<const EngineEvent> events) { queue->push(events); };
  }
  std::optional<std::vector<EngineEvent>> wait(double seconds) const {
    const ReleaseGil nogil;
    const std::shared_ptr<EventQueue> queue = queue_;
    return queue->wait(seconds);
  }
  bool shutdown(bool drain, std::optional<double> timeout) const {
    const ReleaseGil nogil;
    std::optional<std::chrono::duration<double>> limit;
    if (timeout) limit = std::chrono::duration<double>(*timeout);
    return engine_->shutdown(drain, limit);
  }

 private:
  std::shared_ptr<EventQueue> queue_ = std::make_shared<EventQueue>();
  std::unique_ptr<Engine> engine_;
  std::int64_t vocab_size_;
};

const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::error:
      return "error";
    case FinishReason::abort:
      return "abort";
    default:
      return nullptr;
  }
}

// Seconds of time.monotonic(), which reads the same clock.
double seconds(EngineEvent::Clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

py::object text_or_none(const char* text) {
  return text == nullptr ? py::object(py::none()) : py::object(py::str(text));
}

// Messages may quote bytes that are no UTF-8.
py::object message(const std::string& text) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "backslashreplace"));
}

py::tuple as_tuple(EngineEvent& event) {
  py::object top = py::none();
  if (!event.top_logprobs.empty()) {
    py::list list;
    for (const TokenLogprob& each : event.top_logprobs) list.append(py::make_tuple(each.token, each.logprob));
    top = std::move(list);
  }
  py::object state = py::none();
  if (event.state) state = py::cast(std::const_pointer_cast<State>(std::move(event.state)));
  const bool began = event.scheduled != EngineEvent::Clock::time_point{};
  return py::make_tuple(
      event.request, event.sample, event.token, event.logprob, top, text_or_none(name_of(event.finish)),
      event.stop_token, message(event.error), event.num_cached_tokens,
      began ? py::object(py::float_(seconds(event.scheduled))) : py::object(py::none()), seconds(event.time), state);
}

std::size_t nbytes(const Arg<std::int64_t>& value, const std::string& name) {
  return static_cast<std::size_t>(to_int64(value, name, 0));
}

py::dict as_dict(const StateCacheStats::Tier& tier) {
  py::dict dict;
  dict["num_states"] = tier.num_states;
  dict["nbytes"] = tier.nbytes;
  dict["max_nbytes"] = tier.max_nbytes;
  dict["hit_tokens"] = tier.hit_tokens;
  dict["stored_tokens"] = tier.stored_tokens;
  dict["evicted_tokens"] = tier.evicted_tokens;
  dict["num_evicted"] = tier.num_evicted;
  return dict;
}

std::optional<double> timeout_of(const Arg<std::optional<double>>& value) {
  const auto timeout = value.get("timeout");
  if (timeout && !(*timeout >= 0))
    throw py::value_error("timeout is " + describe(value) + ", expected at least 0 seconds, or None");
  return timeout;
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<QueuedEngine>(m, "Engine", "Runs the requests of any number of threads in one batch; see based.Engine.")
      .def(
          py::init([](const std::shared_ptr<Model>& model, const Arg<int>& max_batch_size,
                      const Arg<std::optional<std::int64_t>>& max_waiting_requests,
                      const Arg<std::optional<std::int64_t>>& max_waiting_tokens,
                      const Arg<std::optional<std::int64_t>>& max_step_tokens, const Arg<bool>& elastic,
                      const Arg<std::int64_t>& cache_bytes, const Arg<std::int64_t>& host_cache_bytes,
                      const std::optional<std::filesystem::path>& cache_dir, const Arg<std::int64_t>& cache_dir_bytes) {
            EngineOptions options;
            options.cache.device_nbytes = nbytes(cache_bytes, "cache_bytes");
            options.cache.host_nbytes = nbytes(host_cache_bytes, "host_cache_bytes");
            if (cache_dir) {
              options.cache.folder = *cache_dir;
              options.cache.folder_nbytes = nbytes(cache_dir_bytes, "cache_dir_bytes");
            }
            options.max_batch_size = max_batch_size.get("max_batch_size");
            options.max_waiting_requests =
                max_waiting_requests.get("max_waiting_requests").value_or(options.max_waiting_requests);
            options.max_waiting_tokens =
                max_waiting_tokens.get("max_waiting_tokens").value_or(options.max_waiting_tokens);
            if (const auto tokens = max_step_tokens.get("max_step_tokens")) {
              options.max_step_tokens = *tokens;
              if (*tokens < 1)
                throw py::value_error("max_step_tokens is " + std::to_string(*tokens) + ", expected ≥ 1, or None");
            }
            options.elastic = elastic.get("elastic");
            const ReleaseGil nogil;
            return std::make_unique<QueuedEngine>(model, std::move(options));
          }),
          py::arg("model").none(false), py::arg("max_batch_size"), py::arg("max_waiting_requests") = py::none(),
          py::arg("max_waiting_tokens") = py::none(), py::arg("max_step_tokens") = py::none(),
          py::arg("elastic") = false, py::arg("cache_bytes") = 0, py::arg("host_cache_bytes") = 0,
          py::arg("cache_dir") = py::none(), py::arg("cache_dir_bytes") = 0,
          "elastic: memory for states is taken as samples need it, and given back when nothing runs.")
      .def(
          "submit",
          [](const QueuedEngine& self, const TokenIds& ids, const TextSamplingParams& params, const Arg<int>& priority,
             const Arg<std::optional<double>>& timeout, const std::shared_ptr<State>& state,
             const Arg<bool>& keep_state, const Arg<bool>& reader_ends, const Arg<bool>& every_token) {
            EngineRequest request;
            request.request.prompt = token_ids(ids, self.vocab_size(), "prompt", state != nullptr);
            request.request.params = params;
            request.priority = priority.get("priority");
            if (const auto limit = timeout_of(timeout))
              request.deadline =
                  EngineEvent::Clock::now() + std::chrono::duration_cast<EngineEvent::Clock::duration>(
                                                  std::chrono::duration<double>(std::min(*limit, kLongestTimeout)));
            request.state = state;
            request.keep_state = keep_state.get("keep_state");
            request.reader_ends = reader_ends.get("reader_ends");
            request.every_token = every_token.get("every_token");
            request.sink = self.sink();
            const ReleaseGil nogil;
            return self.engine().submit(std::move(request));
          },
          py::arg("prompt"), py::arg("params"), py::arg("priority") = 0, py::arg("timeout") = py::none(),
          py::arg("state") = py::none(), py::arg("keep_state") = false, py::arg("reader_ends") = false,
          py::arg("every_token") = true,
          "The request's number. Raises EngineBusyError when the queue is full, EngineClosedError after a shutdown.")
      .def(
          "cancel",
          [](const QueuedEngine& self, const Arg<std::uint64_t>& id, const py::str& why) {
            self.engine().cancel(id.get("request"), to_string(why, "why"));
          },
          py::arg("request"), py::arg("why") = "cancelled", "Ends a request at the next step.")
      .def(
          "finish",
          [](const QueuedEngine& self, const Arg<std::uint64_t>& id, const Arg<int>& sample,
             const Arg<std::int64_t>& num_read) {
            self.engine().finish(id.get("request"), sample.get("sample"), num_read.get("num_read"));
          },
          py::arg("request"), py::arg("sample"), py::arg("num_read"), "Ends one sample after num_read of its tokens.")
      .def(
          "pause",
          [](const QueuedEngine& self, const Arg<std::uint64_t>& id, const Arg<bool>& paused) {
            self.engine().pause(id.get("request"), paused.get("paused"));
          },
          py::arg("request"), py::arg("paused"), "A paused request takes no step.")
      .def(
          "wait",
          [](const QueuedEngine& self, const Arg<double>& timeout) -> std::optional<py::list> {
            const double limit = timeout.get("timeout");
            if (!(limit >= 0 && limit <= kLongestWait))
              throw py::value_error("timeout is " + describe(timeout) + ", expected 0 to 60 seconds");
            auto events = self.wait(limit);
            if (!events) return std::nullopt;
            py::list list(events->size());
            for (std::size_t i = 0; i < events->size(); ++i) list[i] = as_tuple((*events)[i]);
            return list;
          },
          py::arg("timeout"),
          "Events of all requests, as soon as there are some: (request, sample, token, logprob, top_logprobs, finish, "
          "stop_token, error, num_cached_tokens, scheduled, time, state); none when the time is over. None: the engine "
          "has ended.")
      .def(
          "stats",
          [](const QueuedEngine& self) {
            const EngineStats s = self.engine().stats();
            py::dict stats;
            stats["running"] = s.running;
            stats["waiting_requests"] = s.waiting_requests;
            stats["waiting_tokens"] = s.waiting_tokens;
            stats["slots"] = s.slots;
            stats["max_batch_size"] = s.max_batch_size;
            stats["step_budget"] = s.step_budget;
            stats["prompt_tokens"] = s.prompt_tokens;
            stats["cached_tokens"] = s.cached_tokens;
            stats["generated_tokens"] = s.generated_tokens;
            stats["steps"] = s.steps;
            stats["step_tokens"] = s.step_tokens;
            py::dict cache;
            cache["device"] = as_dict(s.cache.device);
            cache["host"] = as_dict(s.cache.host);
            cache["files"] = as_dict(s.cache.files);
            cache["query_tokens"] = s.cache.query_tokens;
            cache["hit_tokens"] = s.cache.hit_tokens;
            cache["num_not_stored"] = s.cache.num_not_stored;
            cache["num_not_copied"] = s.cache.num_not_copied;
            cache["num_failed_copies"] = s.cache.num_failed_copies;
            cache["num_refused_files"] = s.cache.num_refused_files;
            cache["last_error"] = message(s.cache.last_error);
            stats["cache"] = cache;
            return stats;
          },
          "Numbers of requests, samples, tokens and steps.")
      .def(
          "shutdown",
          [](const QueuedEngine& self, const Arg<bool>& drain, const Arg<std::optional<double>>& timeout) {
            return self.shutdown(drain.get("drain"), timeout_of(timeout));
          },
          py::arg("drain"), py::arg("timeout") = py::none(),
          "Takes no more requests; waits until all have ended. False: the time was over before.");
}

}  // namespace based::python
