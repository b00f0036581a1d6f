#include "based/state.h"

#include <utility>

#include "based/error.h"
#include "model/model_impl.h"
#include "session/state_impl.h"
#include "session/state_io.h"

namespace based {

State::State(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
State::~State() = default;

const std::shared_ptr<const Model>& State::model() const { return impl_->model; }
std::int64_t State::num_tokens() const { return impl_->progress.num_tokens; }
std::size_t State::nbytes() const {
  const std::size_t nbytes = impl_->states ? impl_->model->impl().state_nbytes_of(num_tokens()) : 0;
  return nbytes + impl_->progress.last.rows.nbytes;
}

void State::save(const std::filesystem::path& path) const {
  const Model& model = *impl_->model;
  impl_->wait();
  const auto lease = model.impl().executors.lease();
  const SequenceView sequence{impl_->states.get(), 0, &impl_->progress};
  save_states(path, model, lease->backend(), {&sequence, 1});
}

std::shared_ptr<const State> State::load(const std::filesystem::path& path, std::shared_ptr<const Model> model,
                                         std::optional<int> sequence) {
  const auto lease = model->impl().executors.lease();
  backend::Backend& backend = lease->backend();
  StateFileReader reader(path, *model);
  const auto count = static_cast<int>(reader.num_sequences());
  if (!sequence && count != 1)
    throw StateError(path.string() + ": holds " + std::to_string(count) + " sequences: say which one, 0 to " +
                     std::to_string(count - 1));
  const int which = sequence.value_or(0);
  if (which < 0 || which >= count)
    throw StateError(path.string() + ": holds " + std::to_string(count) + " sequences, found a request for sequence " +
                     std::to_string(which));
  auto impl = std::make_unique<Impl>();
  impl->states = backend.make_states(model->config(), model->dtype(), 1);
  impl->progress = reader.read(which, backend, *impl->states, 0);
  backend.synchronize();
  impl->model = std::move(model);
  return std::make_shared<State>(std::move(impl));
}

}  // namespace based
