#include "based/session.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "based/error.h"
#include "based/state.h"
#include "bindings.h"

namespace based::python {

namespace {

using Sequences = Arg<std::vector<int>>;

std::int64_t vocab_size(const Session& session) { return session.model()->config().vocab_size; }

// The core's form, in which no sequence means every one.
std::vector<int> listed(const Sequences& value) {
  auto sequences = value.get("sequences");
  if (sequences.empty() && !value.is_none())
    throw py::value_error("sequences is empty, expected at least one, or None for all");
  return sequences;
}

// f(last_interrupt) without the GIL. An interrupt that comes before it is back undoes it.
template <typename F>
auto interruptible(Session& session, F&& f) {
  const InterruptCheck last = last_interrupt_check();
  struct AfterCall {
    Session& session;
    bool looks;
    void check() const {
      if (!looks || PyErr_CheckSignals() == 0) return;
      const py::error_already_set error;
      {
        const ReleaseGil nogil;
        session.undo_last();
      }
      throw error;
    }
  } const after{session, static_cast<bool>(last)};
  const auto call = [&] {
    const ReleaseGil nogil;
    return f(last);
  };
  if constexpr (std::is_void_v<decltype(call())>) {
    call();
    after.check();
  } else {
    PyTensor result = call();
    after.check();
    return result;
  }
}

PyTensor prefill(Session& session, const Prompts& value, const Sequences& sequences) {
  const auto tokens = prompts(value, vocab_size(session));
  const auto which = listed(sequences);
  const InterruptCheck interrupt = interrupt_check();
  return interruptible(session,
                       [&](const InterruptCheck& last) { return session.prefill(tokens, which, interrupt, last); });
}

PyTensor step(Session& session, const TokenIds& ids, const Sequences& sequences) {
  const auto tokens = token_ids(ids, vocab_size(session), "tokens");
  const auto which = listed(sequences);
  return interruptible(session, [&](const InterruptCheck& last) { return session.step(tokens, which, last); });
}

// A State has only const methods, so that nothing is lost with the const that pybind11's holders do not take.
std::shared_ptr<State> mutable_holder(std::shared_ptr<const State> state) {
  return std::const_pointer_cast<State>(std::move(state));
}

/// The right to use something that has one user at a time. It ends with leave(), or when nobody holds it any more: what
/// a signal handler raises between the call that gave it and the assignment of its result leaves nothing locked.
class Turn {
 public:
  Turn(std::shared_ptr<bool> taken) : taken_(std::move(taken)) { *taken_ = true; }  // NOLINT: implicit is fine
  ~Turn() { leave(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  void leave() {
    if (taken_) *taken_ = false;
    taken_.reset();
  }

 private:
  std::shared_ptr<bool> taken_;  // guarded by the GIL
};

/// Gives turns, one at a time.
class Turns {
 public:
  std::unique_ptr<Turn> take(std::string why_others_fail) {
    if (*taken_) throw SessionBusyError(why_);
    why_ = std::move(why_others_fail);
    return std::make_unique<Turn>(taken_);
  }
  bool taken() const { return *taken_; }

 private:
  std::shared_ptr<bool> taken_ = std::make_shared<bool>(false);
  std::string why_;
};

}  // namespace

template <>
inline constexpr bool is_bound<Turn> = true;
template <>
inline constexpr bool is_bound<Turns> = true;

void bind_session(py::module_& m) {
  using NoGil = py::call_guard<ReleaseGil>;
  py::class_<Turn>(m, "Turn", "The right to use something that has one user at a time. Ends with the last reference.")
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](Turn& turn, const py::args&) { turn.leave(); })
      .def("leave", &Turn::leave, "Ends it. No effect on one that has ended.");
  py::class_<Turns>(m, "Turns", "Gives turns, one at a time.")
      .def(py::init<>())
      .def("take", &Turns::take, py::arg("why_others_fail"),
           "A Turn. Raises SessionBusyError with the reason that the holder of the turn gave.")
      .def_property_readonly("taken", &Turns::taken, "Whether somebody has a turn.");

  py::class_<State, std::shared_ptr<State>>(
      m, "State", "What one sequence has seen, at one moment. Immutable; any number of sessions may start from it.")
      .def_static(
          "load",
          [](const std::filesystem::path& path, const py::object& model, const Arg<std::optional<int>>& sequence) {
            const auto which = sequence.get("sequence");
            // A based.Model, or the core's.
            const py::object core = py::hasattr(model, "_core") ? py::object(model.attr("_core")) : model;
            if (!py::isinstance<Model>(core)) throw py::type_error("model must be a Model, not " + describe(model));
            const auto loaded_for = core.cast<std::shared_ptr<Model>>();
            const ReleaseGil nogil;
            return mutable_holder(State::load(path, loaded_for, which));
          },
          py::arg("path"), py::arg("model"), py::arg("sequence") = py::none(),
          "Sequence `sequence` of a state file; None: the only one. Raises StateError, FormatError, OSError.")
      .def_property_readonly("num_tokens", &State::num_tokens, "Tokens seen.")
      .def_property_readonly("nbytes", &State::nbytes, "Device memory that it holds; 0 when nothing has been seen.")
      .def("save", &State::save, py::arg("path"), NoGil(),
           "Saves it as a state file of one sequence: written aside, then renamed. Raises OSError.")
      .def("__repr__", [](const State& state) {
        return "<based.State: " + std::to_string(state.num_tokens()) + " tokens, " + std::to_string(state.nbytes()) +
               " bytes>";
      });

  py::class_<Checkpoint>(m, "Checkpoint", "The states of all sequences of one session at one moment.")
      .def_property_readonly(
          "num_tokens",
          [](const Checkpoint& c) { return std::vector<std::int64_t>(c.num_tokens().begin(), c.num_tokens().end()); })
      .def_property_readonly(
          "states",
          [](const Checkpoint& c) {
            std::vector<std::shared_ptr<State>> states;
            for (const auto& state : c.states()) states.push_back(mutable_holder(state));
            return states;
          },
          "By sequence; each may be restored alone.")
      .def_property_readonly("state_nbytes", &Checkpoint::state_nbytes);

  py::class_<Session>(m, "Session", "The states of B sequences that are advanced together. One thread at a time.")
      .def(py::init([](const std::shared_ptr<Model>& model, const std::vector<std::shared_ptr<State>>& states) {
             const std::vector<std::shared_ptr<const State>> list(states.begin(), states.end());
             if (std::ranges::count(list, nullptr) > 0) throw py::type_error("states must hold State, not None");
             const ReleaseGil nogil;
             return std::make_unique<Session>(model, list);
           }),
           py::arg("model").none(false), py::arg("states"), "Sequence i starts from states[i].")
      .def(py::init([](const std::shared_ptr<Model>& model, const Arg<int>& batch_size) {
             const int size = batch_size.get("batch_size");
             const ReleaseGil nogil;
             return std::make_unique<Session>(model, size);
           }),
           py::arg("model").none(false), py::arg("batch_size") = 1)
      .def_property_readonly("batch_size", &Session::batch_size)
      .def_property_readonly("num_tokens", &Session::num_tokens, "Tokens seen, by sequence.")
      .def_property_readonly("state_nbytes", &Session::state_nbytes)
      .def("prefill", &prefill, py::arg("prompts"), py::arg("sequences") = py::none(),
           "Feeds one prompt to each listed sequence. Logits at their last tokens, (B, padded_vocab_size) float32.")
      .def("step", &step, py::arg("tokens"), py::arg("sequences") = py::none(),
           "Feeds one token to each listed sequence. Logits (B, padded_vocab_size) float32.")
      .def("undo_last", &Session::undo_last, NoGil(),
           "Right after a step or a change of states in the main thread: makes it undone, unless the states take more "
           "than 64 MiB.")
      .def("fork", &Session::fork, NoGil())
      .def(
          "snapshot",
          [](const Session& session, const Arg<int>& sequence) {
            const int which = sequence.get("sequence");
            const ReleaseGil nogil;
            return mutable_holder(session.snapshot(which));
          },
          py::arg("sequence"), "The state of one sequence.")
      .def(
          "restore",
          [](Session& session, const Arg<int>& sequence, const State& state) {
            const int which = sequence.get("sequence");
            interruptible(session, [&](const InterruptCheck& last) { session.restore(which, state, last); });
          },
          py::arg("sequence"), py::arg("state"), "Makes a sequence what the state says.")
      .def("checkpoint", &Session::checkpoint, NoGil())
      .def(
          "rollback",
          [](Session& session, const Checkpoint& checkpoint) {
            interruptible(session, [&](const InterruptCheck& last) { session.rollback(checkpoint, last); });
          },
          py::arg("checkpoint"))
      .def(
          "reset",
          [](Session& session, const Arg<std::optional<int>>& sequence) {
            const auto which = sequence.get("sequence");
            interruptible(session, [&](const InterruptCheck& last) {
              which ? session.reset(*which, last) : session.reset(last);
            });
          },
          py::arg("sequence") = py::none(), "Forgets what one sequence, or every one, has seen.")
      .def(
          "copy",
          [](Session& session, const Arg<int>& source, const Arg<int>& target) {
            const int from = source.get("source"), to = target.get("target");
            interruptible(session, [&](const InterruptCheck& last) { session.copy(from, to, last); });
          },
          py::arg("source"), py::arg("target"), "Makes sequence `target` equal to `source`.")
      .def("save_state", &Session::save_state, py::arg("path"), NoGil())
      .def(
          "load_state",
          [](Session& session, const std::filesystem::path& path) {
            interruptible(session, [&](const InterruptCheck& last) { session.load_state(path, last); });
          },
          py::arg("path"));
}

}  // namespace based::python
