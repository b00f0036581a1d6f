#include "based/session.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <vector>

#include "arguments.h"
#include "based/state.h"
#include "bindings.h"

namespace based::python {

namespace {

using Sequences = Arg<std::vector<int>>;

std::int64_t vocab_size(const Session& session) { return session.model()->config().vocab_size; }

PyTensor prefill(Session& session, const Prompts& value, const Sequences& sequences) {
  const auto tokens = prompts(value, vocab_size(session));
  const auto which = sequences.get("sequences");
  const py::gil_scoped_release nogil;
  return session.prefill(tokens, which, interrupt_check());
}

PyTensor step(Session& session, const TokenIds& ids, const Sequences& sequences) {
  const auto tokens = token_ids(ids, vocab_size(session), "tokens");
  const auto which = sequences.get("sequences");
  const py::gil_scoped_release nogil;
  return session.step(tokens, which);
}

// A State has only const methods, so that nothing is lost with the const that pybind11's holders do not take.
std::shared_ptr<State> mutable_holder(std::shared_ptr<const State> state) {
  return std::const_pointer_cast<State>(std::move(state));
}

}  // namespace

void bind_session(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
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
            const py::gil_scoped_release nogil;
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
             const py::gil_scoped_release nogil;
             return std::make_unique<Session>(model, list);
           }),
           py::arg("model"), py::arg("states"), "Sequence i starts from states[i].")
      .def(py::init([](const std::shared_ptr<Model>& model, const Arg<int>& batch_size) {
             const int size = batch_size.get("batch_size");
             const py::gil_scoped_release nogil;
             return std::make_unique<Session>(model, size);
           }),
           py::arg("model"), py::arg("batch_size") = 1)
      .def_property_readonly("batch_size", &Session::batch_size)
      .def_property_readonly("num_tokens", &Session::num_tokens, "Tokens seen, by sequence.")
      .def_property_readonly("state_nbytes", &Session::state_nbytes)
      .def("prefill", &prefill, py::arg("prompts"), py::arg("sequences") = py::none(),
           "Feeds one prompt to each listed sequence. Logits at their last tokens, (B, padded_vocab_size) float32.")
      .def("step", &step, py::arg("tokens"), py::arg("sequences") = py::none(),
           "Feeds one token to each listed sequence. Logits (B, padded_vocab_size) float32.")
      .def("fork", &Session::fork, NoGil())
      .def(
          "snapshot",
          [](const Session& session, const Arg<int>& sequence) {
            const int which = sequence.get("sequence");
            const py::gil_scoped_release nogil;
            return mutable_holder(session.snapshot(which));
          },
          py::arg("sequence"), "The state of one sequence.")
      .def(
          "restore",
          [](Session& session, const Arg<int>& sequence, const std::shared_ptr<State>& state) {
            const int which = sequence.get("sequence");
            if (!state) throw py::type_error("state must be a State, not None");
            const py::gil_scoped_release nogil;
            session.restore(which, *state);
          },
          py::arg("sequence"), py::arg("state"), "Makes a sequence what the state says.")
      .def("checkpoint", &Session::checkpoint, NoGil())
      .def("rollback", &Session::rollback, py::arg("checkpoint"), NoGil())
      .def(
          "reset",
          [](Session& session, const Arg<std::optional<int>>& sequence) {
            const auto which = sequence.get("sequence");
            const py::gil_scoped_release nogil;
            which ? session.reset(*which) : session.reset();
          },
          py::arg("sequence") = py::none(), "Forgets what one sequence, or every one, has seen.")
      .def(
          "copy",
          [](Session& session, const Arg<int>& source, const Arg<int>& target) {
            const int from = source.get("source"), to = target.get("target");
            const py::gil_scoped_release nogil;
            session.copy(from, to);
          },
          py::arg("source"), py::arg("target"), "Makes sequence `target` equal to `source`.")
      .def("save_state", &Session::save_state, py::arg("path"), NoGil())
      .def("load_state", &Session::load_state, py::arg("path"), NoGil());
}

}  // namespace based::python
