#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "based/error.h"
#include "based/generation.h"
#include "bindings.h"

namespace based::python {

namespace {

class SharedGenerator;

}  // namespace

template <>
inline constexpr bool is_bound<SharedGenerator> = true;

namespace {

/// A Generator that refuses a second thread, and that any thread may cancel.
class SharedGenerator {
 private:
  template <typename F>
  auto guarded(F&& f) const {
    if (busy_.exchange(true)) throw SessionBusyError("this generation is being advanced by another thread");
    struct Release {
      std::atomic<bool>& busy;
      ~Release() { busy.store(false); }
    } release{busy_};
    return f();
  }

 public:
  template <typename... Args>
  explicit SharedGenerator(Args&&... args) : generator_(std::forward<Args>(args)...) {}

  bool done() const {
    return guarded([this] { return generator_.done(); });
  }
  std::vector<TokenEvent> next() {
    const InterruptCheck interrupt = interrupt_check(cancelled_), last_interrupt = last_interrupt_check();
    const ReleaseGil nogil;
    return guarded([&] { return generator_.next(interrupt, last_interrupt); });
  }
  void finish(int request, int sample, std::int64_t num_read) {
    const ReleaseGil nogil;
    guarded([&] { generator_.finish(request, sample, num_read); });
  }
  int add(GenerationRequest request) {
    const ReleaseGil nogil;
    return guarded([&] { return generator_.add(std::move(request)); });
  }
  void cancel() { cancelled_->store(true); }

 private:
  Generator generator_;
  mutable std::atomic<bool> busy_ = false;
  std::shared_ptr<std::atomic<bool>> cancelled_ = std::make_shared<std::atomic<bool>>(false);
};

std::vector<GenerationRequest> requests(const Prompts& prompt_ids, const std::vector<TextSamplingParams>& params,
                                        std::int64_t vocab_size, bool may_be_empty) {
  auto tokens = prompts(prompt_ids, vocab_size, may_be_empty);
  if (tokens.size() != params.size()) {
    throw py::value_error(std::to_string(tokens.size()) + " prompts, but " + std::to_string(params.size()) +
                          " SamplingParams");
  }
  std::vector<GenerationRequest> result;
  for (std::size_t i = 0; i < tokens.size(); ++i) result.push_back({std::move(tokens[i]), params[i]});
  return result;
}

}  // namespace

void bind_generator(py::module_& m) {
  py::native_enum<FinishReason>(m, "FinishReason", "enum.Enum")
      .value("none", FinishReason::none)
      .value("stop", FinishReason::stop)
      .value("length", FinishReason::length)
      .value("error", FinishReason::error)
      .value("abort", FinishReason::abort)
      .finalize();
  py::class_<TokenEvent>(m, "TokenEvent", "One new token of one sample of one request.")
      .def_readonly("request", &TokenEvent::request)
      .def_readonly("sample", &TokenEvent::sample)
      .def_readonly("token", &TokenEvent::token)
      .def_readonly("logprob", &TokenEvent::logprob)
      .def_property_readonly(
          "top_logprobs",
          [](const TokenEvent& event) {
            std::vector<std::pair<std::int32_t, float>> result;
            for (const TokenLogprob& top : event.top_logprobs) result.emplace_back(top.token, top.logprob);
            return result;
          },
          "(token, log-probability), likeliest first.")
      .def_readonly("finish", &TokenEvent::finish)
      .def_readonly("stop_token", &TokenEvent::stop_token)
      .def_readonly("error", &TokenEvent::error, "Why there is no token, when finish is error.");

  m.def(
      "check_prompt",
      [](const TokenIds& ids, std::int64_t vocab_size, const std::string& name) {
        const auto tokens = token_ids(ids, vocab_size, name);
        return py::array_t<std::int32_t>(static_cast<py::ssize_t>(tokens.size()), tokens.data());
      },
      py::arg("prompt"), py::arg("vocab_size"), py::arg("name"),
      "Token ids as an array. Raises TypeError and ValueError, in which `name` is the prompt's.");

  m.def(
      "check_batch_size",
      [](const Arg<int>& size) {
        const int batch = size.get("max_batch_size");
        if (batch < 1) throw py::value_error("max_batch_size is " + std::to_string(batch) + ", expected ≥ 1");
        return batch;
      },
      py::arg("max_batch_size"), "The number itself. Raises TypeError and ValueError.");

  py::class_<SharedGenerator>(m, "Generator", "Runs requests to their ends, one token per sequence and call.")
      .def(py::init([](const std::shared_ptr<Model>& model, const Prompts& prompt_ids,
                       const std::vector<TextSamplingParams>& params, const Arg<int>& max_batch_size) {
             auto list = requests(prompt_ids, params, model->config().vocab_size, false);
             const int batch = max_batch_size.get("max_batch_size");
             const ReleaseGil nogil;
             return std::make_unique<SharedGenerator>(model, std::move(list), batch);
           }),
           py::arg("model").none(false), py::arg("prompts"), py::arg("params"), py::arg("max_batch_size"),
           "On a session of its own, of at most `max_batch_size` sequences.")
      .def(
          py::init([](Session& session, const Prompts& prompt_ids, const std::vector<TextSamplingParams>& params) {
            auto list = requests(prompt_ids, params, session.model()->config().vocab_size, true);
            const ReleaseGil nogil;
            return std::make_unique<SharedGenerator>(session, std::move(list));
          }),
          py::arg("session"), py::arg("prompts"), py::arg("params"), py::keep_alive<1, 2>(),
          "On a session: request i continues sequence i, from where it is when its prompt is empty; every n must be 1.")
      .def("done", &SharedGenerator::done)
      .def("next", &SharedGenerator::next, "Advances every running sequence by one token. Empty only when done().")
      .def("finish", &SharedGenerator::finish, py::arg("request"), py::arg("sample"),
           py::arg("num_read") = Generator::kAllTokens,
           "Ends a sample early. No effect on one that has ended. num_read: of its tokens, that the caller has read: a "
           "session does not see the others.")
      .def(
          "add",
          [](SharedGenerator& self, const TokenIds& ids, const TextSamplingParams& params) {
            constexpr std::int64_t kAnyId = std::int64_t{1} << 31;  // the generator knows the vocabulary
            GenerationRequest request{token_ids(ids, kAnyId, "prompt"), params};
            return self.add(std::move(request));
          },
          py::arg("prompt"), py::arg("params"),
          "One more request for a generator with a session of its own; its number.")
      .def("cancel", &SharedGenerator::cancel,
           "Makes a next() that another thread is in, and every later one, raise Error soon. From any thread.");
}

}  // namespace based::python
