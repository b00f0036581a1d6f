#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "based/model.h"
#include "based/state.h"

namespace based {

/// The states of all sequences of one session at one moment. Immutable; outlives the session it came from.
class Checkpoint {
 public:
  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;
  std::span<const std::int64_t> num_tokens() const;

  /// By sequence. Each may be restored alone, into any sequence of any session of the model.
  std::span<const std::shared_ptr<const State>> states() const;

  /// Device memory of the states, bytes; what sequences that had seen nothing do not need is not held.
  std::size_t state_nbytes() const;

  class Impl;

 private:
  friend class Session;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Owns the states of `batch_size` sequences that are advanced together. One thread at a time: a call that finds
/// another one running throws SessionBusyError at once; num_tokens() may be read at any time. Different sessions of one
/// model are independent. A call that throws leaves everything as it was; when a step (or putting a state in its place)
/// fails half-way, as only a failing device or the end of the memory can make it, its sequences are broken: every use
/// of them throws Error until they are reset, rolled back or given a state.
///
/// `last_interrupt` of a call is called once, when all is done, by a thread that may still change its mind: what it
/// throws undoes the call. While the states that a call changes (a prompt excepted) take more than 64 MiB, it is not
/// called.
class Session {
 public:
  Session(std::shared_ptr<const Model> model, int batch_size);

  /// Sequence i starts from states[i], which is of this model; a state may stand several times. Throws StateError,
  /// OutOfMemory.
  Session(std::shared_ptr<const Model> model, std::span<const std::shared_ptr<const State>> states);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::shared_ptr<const Model>& model() const;
  int batch_size() const;

  /// Tokens seen by each sequence, (B). Any thread, also while another one is in a call.
  std::vector<std::int64_t> num_tokens() const;

  /// Device memory of all states, bytes.
  std::size_t state_nbytes() const;

  /// Feeds prompts[i] (non-empty) to sequence sequences[i] (all sequences in order when empty), after whatever each
  /// has seen. Returns the logits at each prompt's last token, (prompts.size(), padded_vocab_size) float32. Works in
  /// chunks: memory does not grow with the prompts' length. Throws InvalidArgument, and changes nothing, when a
  /// sequence has seen something, but fewer tokens than its model reads as a whole (ModelConfig::prefix_tokens).
  Tensor prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const int> sequences = {},
                 const InterruptCheck& interrupt = {}, const InterruptCheck& last_interrupt = {});

  /// Feeds one token to each listed sequence (all in order when empty). Returns logits as prefill.
  Tensor step(std::span<const std::int32_t> tokens, std::span<const int> sequences = {},
              const InterruptCheck& last_interrupt = {});

  /// Right after a step, reset, copy, restore or rollback that was given a last_interrupt: makes it undone, unless the
  /// states take more than 64 MiB.
  void undo_last();

  /// A new session with equal states.
  std::unique_ptr<Session> fork() const;

  /// The state of one sequence. Costs a copy, unless the sequence still is what a living State holds.
  std::shared_ptr<const State> snapshot(int sequence) const;

  /// Makes a sequence what the state says, bit for bit. Throws StateError for a state of another model.
  void restore(int sequence, const State& state, const InterruptCheck& last_interrupt = {});

  /// A snapshot of every sequence.
  std::unique_ptr<Checkpoint> checkpoint() const;

  /// Back to the checkpoint, bit for bit. Throws StateError when it comes from another model or batch size.
  void rollback(const Checkpoint& checkpoint, const InterruptCheck& last_interrupt = {});

  /// Forgets everything.
  void reset(const InterruptCheck& last_interrupt = {});

  /// Forgets everything that sequence has seen / makes sequence `to` equal to `from`.
  void reset(int sequence, const InterruptCheck& last_interrupt = {});
  void copy(int from, int to, const InterruptCheck& last_interrupt = {});

  /// Saves all states as one safetensors file (docs/state-format.md): written aside, then renamed.
  void save_state(const std::filesystem::path& path) const;

  /// Replaces all states by a saved file's. Throws StateError on another model, batch size or format version, and
  /// FormatError on a damaged file; then nothing has changed.
  void load_state(const std::filesystem::path& path, const InterruptCheck& last_interrupt = {});

  class Impl;
  Impl& impl() const { return *impl_; }

 private:
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace based
