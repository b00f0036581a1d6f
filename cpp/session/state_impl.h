#pragma once

#include <memory>

#include "backend/backend.h"
#include "based/state.h"
#include "session/progress.h"

namespace based {

class State::Impl {
 public:
  std::shared_ptr<const Model> model;
  std::shared_ptr<backend::StatePool> states;  // of one slot; none of a sequence that has seen nothing
  Progress progress;                           // `last` is this state's own, `seen` is settled
  std::shared_ptr<const backend::Point> made;  // when `states` and `last` are written; null: they are

  /// Returns when the state may be read by any executor.
  void wait() const {
    if (made) made->wait();
  }
};

}  // namespace based
