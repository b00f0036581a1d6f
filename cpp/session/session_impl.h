#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "based/session.h"
#include "model/model_impl.h"

namespace based {

class Checkpoint::Impl {
 public:
  std::shared_ptr<const Model> model;
  std::unique_ptr<backend::StatePool> states;
  std::vector<std::int64_t> num_tokens;
};

class Session::Impl {
 public:
  Impl(std::shared_ptr<const Model> model, int batch_size);

  /// Owns the session for one call; throws SessionBusyError when another call does.
  class Turn {
   public:
    explicit Turn(const Impl& impl);
    ~Turn() { impl_.busy_.store(false, std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    const Impl& impl_;
  };

  int batch_size() const { return static_cast<int>(num_tokens.size()); }
  const Transformer& transformer() const { return model->impl().transformer; }
  const ModelConfig& config() const { return model->config(); }

  // The caller of these holds a Turn.

  /// `sequences`, or all in order when empty; throws InvalidArgument unless they are `count` different valid ones.
  std::vector<std::int32_t> check_sequences(std::span<const int> sequences, std::size_t count, const char* what) const;

  /// See Session::prefill; arguments checked already.
  Tensor prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const std::int32_t> slots,
                 const InterruptCheck& interrupt);

  /// Memory for a step of `count` sequences; returns the rows that it takes. Throws OutOfMemory.
  std::int64_t reserve_step(std::size_t count);

  /// See Session::step; arguments checked already.
  Tensor step(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots);

  /// Feeds each listed sequence the token that the sampler chose last for row `slot`, and samples its next; the caller
  /// takes it. Nothing is waited for where the device is asynchronous.
  void step(std::span<const std::int32_t> slots, backend::Sampler& sampler);

  void reset(int slot);
  void copy(int from, int to);

  /// A copy of all states.
  std::unique_ptr<backend::StatePool> copy_states() const;

  const std::shared_ptr<const Model> model;
  const std::unique_ptr<backend::Backend> backend;
  std::unique_ptr<backend::StatePool> states;
  std::vector<std::int64_t> num_tokens;

 private:
  // Logits of a step, in a place that outlives it.
  struct StepLogits : backend::Identified {
    backend::Buffer memory;
  };

  void advance(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots, std::int64_t rows,
               backend::Sampler* sampler);

  Workspace workspace_;
  StepLogits step_logits_;
  mutable std::atomic<bool> busy_{false};
};

}  // namespace based
