#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "based/session.h"
#include "based/state.h"
#include "model/executor.h"
#include "model/model_impl.h"
#include "session/progress.h"

namespace based {

class Checkpoint::Impl {
 public:
  std::vector<std::shared_ptr<const State>> states;
  std::vector<std::int64_t> num_tokens;
};

/// Owns a pool of states and what is kept beside each slot; computes on an executor of its model, which it takes for
/// one call (Turn), or for as long as a Generator keeps work under way on it (Hold).
class Session::Impl {
 public:
  /// keeps_seen: penalties of later calls count the tokens of earlier ones.
  Impl(std::shared_ptr<const Model> model, std::int64_t batch_size, bool keeps_seen = true);

  /// A copy of `other`, whose Turn the caller holds.
  explicit Impl(const Impl& other);
  Impl& operator=(const Impl&) = delete;

  /// Owns the session for one call; throws SessionBusyError when another call does.
  class Turn {
   public:
    explicit Turn(const Impl& impl);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    const Impl& impl_;
  };

  /// Keeps the executor from call to call: work may be under way on it between them.
  class Hold {
   public:
    explicit Hold(const Impl& impl) : impl_(impl) { ++impl_.num_holds_; }
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    const Impl& impl_;
  };

  /// Another executor while it lives: for a step of other sequences in the middle of a step, where no operation is
  /// under way (Transformer::hidden's interrupt). Not on an asynchronous device. The caller holds a Turn.
  class Aside {
   public:
    explicit Aside(const Impl& impl);
    ~Aside();
    Aside(const Aside&) = delete;
    Aside& operator=(const Aside&) = delete;

   private:
    const Impl& impl_;
    Executors::Lease outer_;
  };

  int batch_size() const { return static_cast<int>(slots_.size()); }
  std::vector<std::int32_t> all_slots() const;
  const Transformer& transformer() const { return model->impl().transformer; }
  const ModelConfig& config() const { return model->config(); }

  /// Any thread, at any time.
  std::int64_t num_tokens(int slot) const { return at(slot).num_tokens.load(std::memory_order_relaxed); }
  std::size_t state_nbytes() const;

  // The caller of these holds a Turn.

  backend::Backend& backend() const { return (*lease_)->backend(); }

  /// `sequences`, or all in order when empty; throws InvalidArgument unless they are `count` different valid ones.
  std::vector<std::int32_t> check_sequences(std::span<const int> sequences, std::size_t count, const char* what) const;
  void check_sequence(int sequence, const char* what) const;

  /// Throws InvalidArgument unless slots[i] has room for more[i] tokens.
  void check_context(std::span<const std::int32_t> slots, std::span<const std::int64_t> more, const char* what) const;

  /// Throws Error when a call on this sequence failed half-way.
  void check_whole(int slot) const;
  bool is_broken(int slot) const { return at(slot).broken != nullptr; }

  /// Throws InvalidArgument, opened by `what`, when the sequence is inside its model's prefix: no further prompt then.
  void check_prefix(int slot, const std::string& what) const;

  /// See Session::prefill; arguments checked already.
  Tensor prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const std::int32_t> slots,
                 const InterruptCheck& interrupt, const InterruptCheck& last_interrupt = {});

  /// Logits (slots.size(), padded_vocab_size) float32 at each sequence's last token, made again.
  Tensor last_logits(std::span<const std::int32_t> slots);
  bool has_last_logits(int slot) const { return at(slot).last.rows.data != nullptr; }

  /// Memory for a step of these sequences; returns the rows that it takes. Throws OutOfMemory.
  std::int64_t reserve_step(std::span<const std::int32_t> slots);

  /// See Session::step; arguments checked already.
  Tensor step(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots,
              const InterruptCheck& last_interrupt);

  /// Feeds each listed sequence the token that the sampler chose last for row `slot`, and samples its next; the caller
  /// takes it. Nothing is waited for where the device is asynchronous.
  void step(std::span<const std::int32_t> slots, backend::Sampler& sampler);

  /// What one sequence is fed in a step of several tokens each.
  struct Piece {
    std::int32_t slot;
    std::span<const std::int32_t> tokens;         // empty: the one that the sampler chose last for row `slot`
    std::span<const std::int32_t> samplers = {};  // rows of the sampler that choose a token behind the last one
    std::int64_t num_tokens() const { return tokens.empty() ? 1 : static_cast<std::int64_t>(tokens.size()); }
  };

  /// Memory for such a step. Throws OutOfMemory, and then nothing has changed.
  void reserve(std::span<const Piece> pieces);

  /// Feeds all pieces in one batch, and samples for them in their order; the caller takes it, if any piece samples.
  /// Nothing is waited for where the device is asynchronous. reserve() comes before.
  /// `interrupt` is called before each layer: what it throws breaks the sequences.
  void step(std::span<const Piece> pieces, backend::Sampler& sampler, const InterruptCheck& interrupt = {});

  /// Samples behind what these sequences have seen; `tokens` are not read.
  void sample_again(std::span<const Piece> pieces, backend::Sampler& sampler);

  /// More sequences, which have seen nothing. The others stay as they are. Throws OutOfMemory, and then nothing has
  /// changed.
  void grow(std::int64_t batch_size);

  /// The last steps of this sequence were left out, because their token could not be sampled.
  void set_num_tokens(int slot, std::int64_t num_tokens);

  /// Says that what was under way on this sequence failed.
  void mark_broken(int slot) noexcept;

  /// Counts a token that was sampled for this sequence.
  void add_output(int slot, std::int32_t token);
  std::span<const backend::SeenToken> seen(int slot) const { return at(slot).seen.entries(); }

  // Both return before they are done where the device is asynchronous; settle() waits.
  void reset(int slot);
  void copy(int from, int to);
  void settle(int changed_slot);
  std::vector<std::shared_ptr<const State>> snapshots(std::span<const std::int32_t> slots) const;
  void restore(std::span<const std::int32_t> slots, std::span<const State* const> states);

  // These, too: states say when they are made (State::Impl::made). A restore from a state that this executor made is
  // enqueued, and what follows comes after it; for any other state begin_restore() waits.
  std::vector<std::shared_ptr<const State>> begin_snapshots(std::span<const std::int32_t> slots) const;
  void begin_restore(std::span<const std::int32_t> slots, std::span<const State* const> states);

  /// A copy of a sequence, of which penalties count `seen`.
  std::shared_ptr<const State> snapshot(int slot, SeenTokens seen) const;

  void reset_all();
  void restore_all(std::span<const std::shared_ptr<const State>> states);

  void save(const std::filesystem::path& path) const;
  void load(const std::filesystem::path& path, const InterruptCheck& last_interrupt);

  /// Calls f, which changes these slots, and then last_interrupt, whose exception undoes it; undo() does so later. A
  /// few large states are too many bytes for that: then last_interrupt is not called. `appends`: f feeds tokens and
  /// does nothing else, so that a state that only grows needs no copy.
  template <typename F>
  void interruptible(std::span<const std::int32_t> slots, const InterruptCheck& last_interrupt, F&& f,
                     bool appends = false);
  void undo_last();

  const std::shared_ptr<const Model> model;

 private:
  struct Slot {
    std::atomic<std::int64_t> num_tokens{0};
    LastHidden last;
    SeenTokens seen;
    mutable std::weak_ptr<const State> snapshot;  // of the slot as it is
    const char* broken = nullptr;                 // what failed half-way; null: the slot is whole

    Progress progress() const { return {num_tokens.load(), last, seen}; }
    void set(Progress progress);
  };

  // What a call changed, as it was: the state is `state`, or in spare_ if it was copied, or in replaced_.
  struct Undo {
    std::int32_t slot;
    Progress progress;
    std::shared_ptr<const State> snapshot;
    const char* broken;
    bool copied = false;
    std::shared_ptr<const State> state = nullptr;
  };
  Undo undo_of(std::int32_t slot);
  void forget_undo();
  std::unique_ptr<State::Impl> copy_of(int slot) const;
  void sample(std::span<const Piece> pieces, const Tensor& logits, backend::Sampler& sampler);

  // What a step writes, in a place that outlives it: recorded steps hold its address.
  struct StepOutput : backend::Identified {
    std::int64_t capacity = 0;  // rows
    backend::Buffer hidden;     // (rows, d) activation: the final norm
    backend::Buffer logits;     // (rows, padded_vocab_size) float32
  };

  void check_model(const State& state) const;
  void restore(std::span<const std::int32_t> slots, std::span<const State* const> states, bool waits);
  void put(int slot, const State& state);
  Slot& at(int slot) { return slots_[static_cast<std::size_t>(slot)]; }
  const Slot& at(int slot) const { return slots_[static_cast<std::size_t>(slot)]; }
  Workspace& workspace() const { return (*lease_)->workspace(); }
  std::size_t hidden_nbytes() const;
  LastHidden own_copy(const LastHidden& last) const;
  void keep_hidden_of_others(std::span<const std::int32_t> slots);
  void reserve_states(std::span<const std::int32_t> slots, std::span<const std::int64_t> more);
  void feed(std::span<const std::vector<std::int32_t>> prompts, std::span<const std::int32_t> slots,
            const backend::Matrix& last_x, const InterruptCheck& interrupt);
  void advance(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots, std::int64_t rows,
               backend::Sampler* sampler);
  void undo(std::span<const std::int32_t> slots, std::span<const std::shared_ptr<const State>> states) noexcept;
  template <typename F>
  void change(std::span<const std::int32_t> slots, const char* what, F&& f);

  const bool keeps_seen_;
  const Executors::Use use_;
  std::unique_ptr<backend::StatePool> states_;
  std::unique_ptr<backend::StatePool> spare_;     // made at first use
  std::unique_ptr<backend::StatePool> replaced_;  // by the last load
  std::vector<Undo> undo_;                        // of the last call; undo_[i]: the state in slot i of spare_
  std::vector<Slot> slots_;
  StepOutput step_output_;

  mutable std::optional<Executors::Lease> lease_;
  mutable const Executor* last_executor_ = nullptr;
  void give_back_executor() const noexcept;

  mutable std::atomic<int> num_holds_{0};
  mutable std::atomic<bool> busy_{false};
};

}  // namespace based
