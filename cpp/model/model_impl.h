#pragma once

#include <memory>
#include <span>
#include <string>

#include "backend/backend.h"
#include "based/model.h"
#include "model/transformer.h"

namespace based {

class Model::Impl {
 public:
  Impl(const ModelConfig& config, std::unique_ptr<backend::Backend> backend, WeightSource& source, DType dtype);

  /// A backend of the same device and threads, for one session.
  std::unique_ptr<backend::Backend> make_backend() const;

  std::unique_ptr<backend::Backend> backend;  // loads weights; not used after
  DType dtype;
  Transformer transformer;
  std::string fingerprint;
  std::size_t state_nbytes = 0;
};

/// Throws InvalidArgument unless `tokens` is non-empty and every id is in [0, vocab_size). `what` opens the message.
void check_tokens(std::span<const std::int32_t> tokens, std::int64_t vocab_size, const std::string& what);

}  // namespace based
