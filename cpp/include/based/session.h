#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "based/model.h"

namespace based {

/// A copy of all states of one session at one moment. Immutable; outlives the session it came from.
class Checkpoint {
 public:
  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;
  std::span<const std::int64_t> num_tokens() const;
  std::size_t state_nbytes() const;

  class Impl;

 private:
  friend class Session;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Owns the states of `batch_size` sequences that are advanced together. One thread at a time: a call that finds
/// another one running throws SessionBusyError at once. Different sessions of one model are independent.
class Session {
 public:
  Session(std::shared_ptr<const Model> model, int batch_size);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::shared_ptr<const Model>& model() const;
  int batch_size() const;

  /// Tokens seen by each sequence, (B).
  std::vector<std::int64_t> num_tokens() const;

  /// Device memory of all states, bytes.
  std::size_t state_nbytes() const;

  /// Feeds prompts[i] (non-empty) to sequence sequences[i] (all sequences in order when empty), after whatever each
  /// has seen. Returns the logits at each prompt's last token, (prompts.size(), padded_vocab_size) float32. Works in
  /// chunks: memory does not grow with the prompts' length.
  Tensor prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const int> sequences = {},
                 const InterruptCheck& interrupt = {});

  /// Feeds one token to each listed sequence (all in order when empty). Returns logits as prefill.
  Tensor step(std::span<const std::int32_t> tokens, std::span<const int> sequences = {});

  /// A new session with equal states.
  std::unique_ptr<Session> fork() const;

  std::unique_ptr<Checkpoint> checkpoint() const;

  /// Back to the checkpoint, bit for bit. Throws StateError when it comes from another model or batch size.
  void rollback(const Checkpoint& checkpoint);

  /// Forgets everything.
  void reset();

  /// Forgets everything that sequence has seen / makes sequence `to` equal to `from`.
  void reset(int sequence);
  void copy(int from, int to);

  /// Saves all states as one safetensors file (docs/state-format.md): written aside, then renamed.
  void save_state(const std::filesystem::path& path) const;

  /// Replaces all states by a saved file's. Throws StateError on another model, batch size or format version, and
  /// FormatError on a damaged file; then nothing has changed.
  void load_state(const std::filesystem::path& path);

  class Impl;
  Impl& impl() const { return *impl_; }

 private:
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
