#include "model/mlp.h"

namespace based {

Mlp::Mlp(const MlpConfig& config, std::int64_t hidden_size, WeightLoader& loader, const std::string& prefix)
    : fc1_(loader.linear({{prefix + "fc1", config.fc1_rows()}}, hidden_size, config.fc1_bias, config.activation,
                         config.gated)),
      fc2_(loader.linear({{prefix + "fc2", hidden_size}}, config.inner_size, config.fc2_bias)),
      activation_dtype_(loader.backend.activation_dtype(loader.dtype)) {}

void Mlp::forward(backend::Backend& backend, const Activations& a, const backend::Matrix& out) const {
  const auto h = a.scratch(1, fc2_->in_features(), activation_dtype_);
  backend.linear(*fc1_, a.x, h, false);
  backend.linear(*fc2_, h, out, true);
}

}  // namespace based
