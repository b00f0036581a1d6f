#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "based/config.h"
#include "model/mixer.h"
#include "model/weights.h"

namespace based {

/// out += W₂ act(W₁ x), gated or plain (MlpConfig). Immutable.
class Mlp {
 public:
  /// `prefix` is "layers.{i}.mlp.".
  Mlp(const MlpConfig& config, std::int64_t hidden_size, WeightLoader& loader, const std::string& prefix);

  void forward(backend::Backend& backend, const Activations& a, const backend::Matrix& out) const;

  /// As Mixer::scratch.
  std::vector<ScratchSize> scratch() const { return {{}, {fc2_->in_features(), activation_dtype_}}; }

 private:
  std::shared_ptr<const backend::LinearWeight> fc1_;
  std::shared_ptr<const backend::LinearWeight> fc2_;
  DType activation_dtype_;
};

}  // namespace based
