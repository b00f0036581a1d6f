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
};

}  // namespace based
