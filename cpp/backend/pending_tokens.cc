#include <cmath>

#include "backend/backend.h"

namespace based::backend {

std::optional<PendingTokens> take_pending(std::span<const NamedView>::iterator& tensor,
                                          std::span<const NamedView>::iterator end) {
  if (tensor == end || !tensor->name.ends_with(".pending_keys")) return std::nullopt;
  const TensorView& keys = (tensor++)->view;
  const TensorView& values = (tensor++)->view;
  return PendingTokens{keys, values};
}

void fold_pending(const LinearAttentionConfig& config, std::span<float> taylor, std::span<const float> keys,
                  std::span<const float> values) {
  const auto f = static_cast<std::size_t>(config.feature_dim), head_dim = static_cast<std::size_t>(config.head_dim);
  const auto heads = static_cast<std::size_t>(config.num_heads);
  const auto scale = static_cast<float>(std::pow(static_cast<double>(config.feature_dim), -0.25));
  std::vector<float> y(f);
  for (std::size_t row = 0; row * f < keys.size(); ++row) {  // token, head
    for (std::size_t i = 0; i < f; ++i) y[i] = keys[row * f + i] * scale;
    const float* v = values.data() + row * head_dim;
    float* s = taylor.data() + row % heads * static_cast<std::size_t>(config.num_features()) * (head_dim + 1);
    const auto add = [&](float phi) {
      for (std::size_t n = 0; n < head_dim; ++n) s[n] += phi * v[n];
      s[head_dim] += phi;
      s += head_dim + 1;
    };
    add(1.0f);
    for (std::size_t i = 0; i < f; ++i) add(y[i]);
    for (std::size_t i = 0; i < f; ++i)
      for (std::size_t j = i; j < f; ++j) add(y[i] * y[j] * (i == j ? 0.70710678f : 1.0f));
  }
}

}  // namespace based::backend
