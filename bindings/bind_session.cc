#include "based/session.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <vector>

#include "arguments.h"
#include "bindings.h"

namespace based::python {

namespace {

using Sequences = Arg<std::vector<int>>;

std::int64_t vocab_size(const Session& session) { return session.model()->config().vocab_size; }

Array prefill(Session& session, const Prompts& value, const Sequences& sequences) {
  const auto tokens = prompts(value, vocab_size(session));
  const auto which = sequences.get("sequences");
  const py::gil_scoped_release nogil;
  return session.prefill(tokens, which, interrupt_check());
}

Array step(Session& session, const TokenIds& ids, const Sequences& sequences) {
  const auto tokens = token_ids(ids, vocab_size(session), "tokens");
  const auto which = sequences.get("sequences");
  const py::gil_scoped_release nogil;
  return session.step(tokens, which);
}

}  // namespace

void bind_session(py::module_& m) {
  py::class_<Checkpoint>(m, "Checkpoint", "A copy of all states of one session at one moment.")
      .def_property_readonly(
          "num_tokens",
          [](const Checkpoint& c) { return std::vector<std::int64_t>(c.num_tokens().begin(), c.num_tokens().end()); })
      .def_property_readonly("state_nbytes", &Checkpoint::state_nbytes);

  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<Session>(m, "Session", "The states of B sequences that are advanced together. One thread at a time.")
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
