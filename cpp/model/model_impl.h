#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>

#include "backend/backend.h"
#include "based/model.h"
#include "model/executor.h"
#include "model/transformer.h"

namespace based {

class Model::Impl {
 public:
  /// Loads the weights on `backend`, which becomes the first executor.
  Impl(const ModelConfig& config, std::unique_ptr<backend::Backend> backend, WeightSource& source, DType dtype);

  /// A model on this device with the weights of `source`. Throws as Model::load.
  static std::shared_ptr<Model> make(const ModelConfig& config, std::unique_ptr<backend::Backend> backend,
                                     WeightSource& source, DType dtype, std::optional<std::int64_t> max_context = {});

  /// Device memory of the state of a sequence that has seen num_tokens tokens.
  std::size_t state_nbytes_of(std::int64_t num_tokens) const {
    return executors.device().state_nbytes(transformer.config(), dtype, num_tokens);
  }

  /// Throws InvalidArgument unless a sequence of `seen` tokens has room for `more`. `what` opens the message.
  void check_context(std::int64_t seen, std::int64_t more, const std::string& what) const;

  /// What to do about max_context.
  std::string context_advice() const;

  mutable Executors executors;
  DType dtype;
  Transformer transformer;
  Fingerprints fingerprints;
  std::size_t context_nbytes = 0;           // of the state, for each token; 0: its size is fixed
  bool only_appends = false;                // a call writes behind what the state holds, and nothing else of it
  std::optional<std::int64_t> max_context;  // set where context_nbytes > 0 or ModelConfig::max_tokens says so
};

/// Throws InvalidArgument unless `tokens` is non-empty and every id is in [0, vocab_size). `what` opens the message.
void check_tokens(std::span<const std::int32_t> tokens, std::int64_t vocab_size, const std::string& what);

}  // namespace based
