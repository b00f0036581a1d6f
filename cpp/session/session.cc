#include "based/session.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "based/error.h"
#include "session/session_impl.h"
#include "session/state_impl.h"
#include "session/state_io.h"

namespace based {

namespace {

constexpr std::int64_t kMaxBatchSize = 1 << 20;

constexpr const char* kStepFailed = "a step failed half-way";

// An interrupted call on more bytes of states is finished instead: copies to undo it would cost as much as the call.
constexpr std::size_t kMostUndone = std::size_t{64} << 20;

std::size_t checked_batch_size(std::int64_t batch_size) {
  if (batch_size < 1 || batch_size > kMaxBatchSize)
    throw InvalidArgument("batch_size is " + std::to_string(batch_size) + ", expected 1 to " +
                          std::to_string(kMaxBatchSize));
  return static_cast<std::size_t>(batch_size);
}

}  // namespace

Session::Impl::Impl(std::shared_ptr<const Model> m, std::int64_t batch_size, bool keeps_seen)
    : model(std::move(m)),
      keeps_seen_(keeps_seen),
      use_(model->impl().executors),
      slots_(checked_batch_size(batch_size)) {
  const auto lease = model->impl().executors.lease();
  states_ = lease->backend().make_states(config(), model->dtype(), this->batch_size());
  lease->backend().synchronize();
}

Session::Impl::Impl(const Impl& other)
    : model(other.model), keeps_seen_(other.keeps_seen_), use_(model->impl().executors), slots_(other.slots_.size()) {
  backend::Backend& backend = other.backend();
  states_ = backend.make_states(config(), model->dtype(), batch_size());
  for (int slot = 0; slot < batch_size(); ++slot) {
    other.check_whole(slot);
    backend.copy_state(*other.states_, slot, *states_, slot, other.num_tokens(slot));
    Progress progress = other.at(slot).progress();
    if (progress.last.rows.data && progress.last.rows.data == other.step_output_.hidden.data)
      progress.last = other.own_copy(progress.last);
    at(slot).set(std::move(progress));
    at(slot).snapshot = other.at(slot).snapshot;
  }
  backend.synchronize();
}

Session::Impl::Turn::Turn(const Impl& impl) : impl_(impl) {
  if (impl.busy_.exchange(true, std::memory_order_acquire))
    throw SessionBusyError("this session is in another call: one thread at a time may use a session");
  try {
    if (!impl.lease_) impl.lease_.emplace(impl.model->impl().executors.lease(impl.last_executor_));
    impl.last_executor_ = &**impl.lease_;
  } catch (...) {
    impl.busy_.store(false, std::memory_order_release);
    throw;
  }
}

Session::Impl::Turn::~Turn() {
  const bool is_held = impl_.num_holds_ != 0;
  if (!is_held) impl_.lease_.reset();
  impl_.busy_ = false;
  if (is_held && impl_.num_holds_ == 0) impl_.give_back_executor();  // the hold has ended meanwhile
}

Session::Impl::Aside::Aside(const Impl& impl) : impl_(impl), outer_(std::move(*impl.lease_)) {
  impl_.lease_.reset();
  try {
    impl_.lease_.emplace(impl_.model->impl().executors.lease());
  } catch (...) {
    impl_.lease_.emplace(std::move(outer_));
    throw;
  }
}

Session::Impl::Aside::~Aside() {
  impl_.lease_.reset();
  impl_.lease_.emplace(std::move(outer_));
}

Session::Impl::Hold::~Hold() {
  --impl_.num_holds_;
  impl_.give_back_executor();
}

// Of a session that nobody holds. Whoever holds or uses it when it is to be given back gives it back in the end.
void Session::Impl::give_back_executor() const noexcept {
  bool was_held = true;
  while (was_held && num_holds_ == 0) {
    if (busy_.exchange(true)) return;  // the call under way does it
    was_held = num_holds_ != 0;
    if (!was_held && lease_) {
      try {
        backend().synchronize();
      } catch (...) {  // the device has failed: the next call says so
      }
      lease_.reset();
    }
    busy_ = false;
  }
}

void Session::Impl::Slot::set(Progress progress) {
  num_tokens.store(progress.num_tokens);
  last = std::move(progress.last);
  seen = std::move(progress.seen);
}

// ---- checks --------------------------------------------------------------------------------------------------------

void Session::Impl::check_sequence(int sequence, const char* what) const {
  if (sequence < 0 || sequence >= batch_size())
    throw InvalidArgument(std::string(what) + ": sequence " + std::to_string(sequence) + " is outside [0, " +
                          std::to_string(batch_size()) + ")");
}

std::vector<std::int32_t> Session::Impl::all_slots() const {
  std::vector<std::int32_t> slots(slots_.size());
  std::iota(slots.begin(), slots.end(), 0);
  return slots;
}

std::vector<std::int32_t> Session::Impl::check_sequences(std::span<const int> sequences, std::size_t count,
                                                         const char* what) const {
  std::vector<std::int32_t> slots(sequences.begin(), sequences.end());
  if (slots.empty()) slots = all_slots();
  if (count != slots.size())
    throw InvalidArgument(std::string(what) + " for " + std::to_string(count) + " sequences, expected " +
                          std::to_string(slots.size()));
  std::vector<bool> listed(slots_.size());
  for (const std::int32_t slot : slots) {
    check_sequence(slot, what);
    if (listed[static_cast<std::size_t>(slot)])
      throw InvalidArgument("sequence " + std::to_string(slot) + " is listed twice");
    listed[static_cast<std::size_t>(slot)] = true;
    check_whole(slot);
  }
  return slots;
}

void Session::Impl::check_whole(int slot) const {
  if (at(slot).broken == nullptr) return;
  throw Error("sequence " + std::to_string(slot) + " is broken: " + at(slot).broken +
              ". Its state is neither the old nor the new one: reset it, roll it back or load a state");
}

void Session::Impl::check_prefix(int slot, const std::string& what) const {
  const std::int64_t prefix = transformer().prefix_tokens(), seen = num_tokens(slot);
  if (seen == 0 || seen >= prefix) return;
  throw InvalidArgument(
      what + ": sequence " + std::to_string(slot) + " has seen " + std::to_string(seen) +
      " tokens, and this model reads the first " + std::to_string(prefix) +
      " tokens of a sequence as a whole: expected a prompt for a sequence that has seen nothing, or " +
      std::to_string(prefix) +
      " tokens or more. Reset the sequence and give the whole text as one prompt, or feed single "
      "tokens with step()");
}

std::size_t Session::Impl::state_nbytes() const {
  std::size_t total = 0;
  for (int slot = 0; slot < batch_size(); ++slot) total += model->impl().state_nbytes_of(num_tokens(slot));
  return total;
}

void Session::Impl::check_context(std::span<const std::int32_t> slots, std::span<const std::int64_t> more,
                                  const char* what) const {
  for (std::size_t i = 0; i < slots.size(); ++i)
    model->impl().check_context(num_tokens(slots[i]), more[i],
                                std::string(what) + ": sequence " + std::to_string(slots[i]));
}

// Memory for `more` tokens of each of these sequences.
void Session::Impl::reserve_states(std::span<const std::int32_t> slots, std::span<const std::int64_t> more) {
  std::vector<std::int64_t> lengths;
  for (std::size_t i = 0; i < slots.size(); ++i) lengths.push_back(num_tokens(slots[i]) + more[i]);
  backend().reserve_states(*states_, slots, lengths);
}

// ---- failures ------------------------------------------------------------------------------------------------------

// Calls f, which changes these slots. When f throws, they are broken: copying them first would cost more than f.
template <typename F>
void Session::Impl::change(std::span<const std::int32_t> slots, const char* what, F&& f) {
  for (const std::int32_t slot : slots) at(slot).snapshot.reset();
  try {
    f();
  } catch (...) {
    for (const std::int32_t slot : slots) at(slot).broken = what;
    throw;
  }
}

// Puts slots back to what they were: states[i], or fresh where that is null.
void Session::Impl::undo(std::span<const std::int32_t> slots,
                         std::span<const std::shared_ptr<const State>> states) noexcept {
  constexpr const char* kBroken = "a prompt failed, and so did putting back the state before it";
  for (std::size_t i = 0; i < slots.size(); ++i) {
    Slot& slot = at(slots[i]);
    try {
      if (states[i])
        put(slots[i], *states[i]);
      else
        backend().reset_state(*states_, slots[i]);
      slot.snapshot = states[i];
    } catch (...) {
      slot.broken = kBroken;
    }
  }
  try {
    backend().synchronize();
  } catch (...) {
    for (const std::int32_t slot : slots) at(slot).broken = kBroken;
  }
}

Session::Impl::Undo Session::Impl::undo_of(std::int32_t slot) {
  Undo undo{slot, at(slot).progress(), at(slot).snapshot.lock(), at(slot).broken};
  LastHidden& last = undo.progress.last;
  if (last.rows.data && last.rows.data == step_output_.hidden.data) last = own_copy(last);
  return undo;
}

void Session::Impl::forget_undo() {
  undo_.clear();
  replaced_.reset();
}

template <typename F>
void Session::Impl::interruptible(std::span<const std::int32_t> slots, const InterruptCheck& last_interrupt, F&& f,
                                  bool appends) {
  forget_undo();
  const bool copies = !(appends && model->impl().only_appends);
  std::size_t nbytes = slots.size() * states_->nbytes_per_slot();
  for (const std::int32_t slot : slots)
    nbytes += static_cast<std::size_t>(num_tokens(slot)) * model->impl().context_nbytes;
  if (!last_interrupt || (copies && nbytes > kMostUndone)) return f();
  if (copies && (!spare_ || static_cast<std::size_t>(spare_->capacity()) < slots.size()))
    spare_ = backend().make_states(config(), model->dtype(), static_cast<int>(slots.size()));
  std::vector<Undo> before;
  for (const std::int32_t slot : slots) {
    before.push_back(undo_of(slot));
    before.back().copied = copies;
    if (copies) backend().copy_state(*states_, slot, *spare_, static_cast<int>(before.size()) - 1, num_tokens(slot));
  }
  f();
  undo_ = std::move(before);
  try {
    last_interrupt();
  } catch (...) {
    undo_last();
    throw;
  }
}

void Session::Impl::undo_last() {
  if (replaced_) states_ = std::move(replaced_);
  std::vector<std::int32_t> slots;
  for (const Undo& undo : undo_) slots.push_back(undo.slot);
  change(slots, "undoing an interrupted call failed", [&] {
    for (std::size_t i = 0; i < undo_.size(); ++i) {
      if (undo_[i].state) put(slots[i], *undo_[i].state);
      if (!undo_[i].copied) continue;
      const std::int64_t count = undo_[i].progress.num_tokens;
      if (count > 0)
        backend().copy_state(*spare_, static_cast<int>(i), *states_, slots[i], count);
      else
        backend().reset_state(*states_, slots[i]);
    }
    backend().synchronize();
  });
  for (Undo& undo : undo_) {
    Slot& slot = at(undo.slot);
    slot.set(std::move(undo.progress));
    slot.snapshot = undo.snapshot;
    slot.broken = undo.broken;
  }
  forget_undo();
}

// ---- prompts -------------------------------------------------------------------------------------------------------

std::size_t Session::Impl::hidden_nbytes() const {
  return static_cast<std::size_t>(config().hidden_size) * size_of(transformer().activation_dtype());
}

Tensor Session::Impl::prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const std::int32_t> slots,
                              const InterruptCheck& interrupt, const InterruptCheck& last_interrupt) {
  const auto count = static_cast<std::int64_t>(prompts.size());
  std::size_t most = 0;
  std::vector<std::int64_t> lengths;
  for (const auto& prompt : prompts) {
    most += prompt.size();
    lengths.push_back(static_cast<std::int64_t>(prompt.size()));
  }
  check_context(slots, lengths, "prefill");
  forget_undo();
  const backend::Buffer last = backend().allocate(prompts.size() * hidden_nbytes(), backend::MemoryKind::workspace);
  const backend::Matrix last_x{last.data.get(), transformer().activation_dtype(), count, config().hidden_size};
  const Tensor logits = transformer().new_logits(backend(), count);
  transformer().reserve(backend(), workspace(),
                        std::min(static_cast<std::int64_t>(most), transformer().piece_tokens(backend(), true)));
  reserve_states(slots, lengths);
  std::vector<SeenTokens> seen;
  if (keeps_seen_) {
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      seen.push_back(at(slots[i]).seen);
      seen.back().add_prompt(prompts[i]);
    }
  }

  // A fresh sequence is put back by making it fresh again: only the others are copied. A state that only grows is as it
  // was while the number of its tokens is.
  const bool only_appends = model->impl().only_appends;
  std::vector<std::int32_t> used(slots.begin(), slots.end());
  std::erase_if(used, [&](std::int32_t slot) { return num_tokens(slot) == 0 || only_appends; });
  const auto copies = snapshots(used);
  std::vector<std::shared_ptr<const State>> before;
  std::vector<Undo> after_call;  // for an interrupt that comes behind the last look at them
  std::size_t nbytes = 0;
  for (auto copy = copies.begin(); const std::int32_t slot : slots) {
    before.push_back(num_tokens(slot) > 0 && !only_appends ? *copy++ : nullptr);
    if (!last_interrupt) continue;
    after_call.push_back(undo_of(slot));
    after_call.back().state = before.back();
    after_call.back().copied = !before.back() && !only_appends;  // fresh
    if (before.back()) nbytes += before.back()->nbytes();
  }
  try {
    feed(prompts, slots, last_x, interrupt);
    transformer().logits(backend(), last_x, {logits.data(), DType::float32, count, config().padded_vocab_size});
    backend().synchronize();
    if (last_interrupt) last_interrupt();
  } catch (...) {
    if (!only_appends) undo(slots, before);
    throw;
  }
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    Slot& slot = at(slots[i]);
    slot.snapshot.reset();
    slot.num_tokens.fetch_add(static_cast<std::int64_t>(prompts[i].size()));
    slot.last = {last, static_cast<std::int64_t>(i)};
    if (keeps_seen_) slot.seen = std::move(seen[i]);
  }
  if (nbytes <= kMostUndone) undo_ = std::move(after_call);
  return logits;
}

// A batch holds up to `chunk` tokens, at most one piece of each prompt, or one longer piece, with a prefix that is read
// as a whole. Pieces end at multiples of `chunk` of their own prompt, so how a prompt is cut does not depend on its
// neighbours. last_x[i]: the final norm at prompt i's last token.
void Session::Impl::feed(std::span<const std::vector<std::int32_t>> prompts, std::span<const std::int32_t> slots,
                         const backend::Matrix& last_x, const InterruptCheck& interrupt) {
  const auto chunk = static_cast<std::size_t>(backend().chunk_tokens());
  std::vector<std::size_t> fed(prompts.size(), 0);
  std::vector<std::size_t> waiting(prompts.size());
  std::iota(waiting.begin(), waiting.end(), 0u);
  std::vector<std::int32_t> tokens, offsets, batch_slots, rows;
  std::vector<std::int64_t> positions;
  std::vector<std::size_t> members;
  while (!waiting.empty()) {
    tokens.clear();
    offsets.assign(1, 0);
    batch_slots.clear();
    positions.clear();
    members.clear();
    for (const std::size_t i : waiting) {
      const bool begins = fed[i] == 0 && num_tokens(slots[i]) == 0;
      const auto most = static_cast<std::size_t>(transformer().piece_tokens(backend(), begins));
      const std::size_t piece = std::min(prompts[i].size() - fed[i], most);
      if (!tokens.empty() && tokens.size() + piece > chunk) continue;
      const auto first = prompts[i].begin() + static_cast<std::ptrdiff_t>(fed[i]);
      tokens.insert(tokens.end(), first, first + static_cast<std::ptrdiff_t>(piece));
      offsets.push_back(static_cast<std::int32_t>(tokens.size()));
      batch_slots.push_back(slots[i]);
      positions.push_back(num_tokens(slots[i]) + static_cast<std::int64_t>(fed[i]));
      members.push_back(i);
    }
    const backend::RaggedBatch batch{tokens, offsets, batch_slots, positions};
    backend().begin(batch);
    const auto r = transformer().hidden(backend(), batch, *states_, workspace(), interrupt);
    rows.assign(prompts.size(), -1);
    for (std::size_t b = 0; b < members.size(); ++b) {
      const std::size_t i = members[b];
      fed[i] += static_cast<std::size_t>(offsets[b + 1] - offsets[b]);
      if (fed[i] == prompts[i].size()) rows[i] = offsets[b + 1] - 1;
    }
    if (std::ranges::any_of(rows, [](std::int32_t row) { return row >= 0; }))
      transformer().final_norm(backend(), r, rows, last_x);
    std::erase_if(waiting, [&](std::size_t i) { return fed[i] == prompts[i].size(); });
  }
}

// ---- steps ---------------------------------------------------------------------------------------------------------

// Everything that is likely to fail comes before the states change: a step is too short to be stopped half-way.
std::int64_t Session::Impl::reserve_step(std::span<const std::int32_t> slots) {
  const std::int64_t rows = backend().step_rows(static_cast<std::int64_t>(slots.size()));
  transformer().reserve(backend(), workspace(), rows);
  backend().reserve_step(config(), rows);
  if (rows > step_output_.capacity) {
    const auto allocate = [&](std::size_t row_nbytes) {
      return backend().allocate(static_cast<std::size_t>(rows) * row_nbytes, backend::MemoryKind::workspace);
    };
    StepOutput grown;
    grown.hidden = allocate(hidden_nbytes());
    grown.logits = allocate(static_cast<std::size_t>(config().padded_vocab_size) * sizeof(float));
    grown.capacity = rows;
    step_output_ = std::move(grown);
  }
  reserve_states(slots, std::vector<std::int64_t>(slots.size(), 1));
  return rows;
}

LastHidden Session::Impl::own_copy(const LastHidden& last) const {
  const std::size_t nbytes = hidden_nbytes();
  const LastHidden copy{backend().allocate(nbytes, backend::MemoryKind::workspace), 0};
  const auto* rows = static_cast<const std::byte*>(last.rows.data.get());
  backend().copy(copy.rows.data.get(), rows + static_cast<std::size_t>(last.row) * nbytes, nbytes);
  return copy;
}

// A step overwrites the step output: what lies there of sequences that it does not advance moves.
void Session::Impl::keep_hidden_of_others(std::span<const std::int32_t> slots) {
  const void* const output = step_output_.hidden.data.get();
  if (slots.size() == slots_.size() || output == nullptr) return;
  std::vector<bool> advanced(slots_.size());
  for (const std::int32_t slot : slots) advanced[static_cast<std::size_t>(slot)] = true;
  for (std::size_t i = 0; i < slots_.size(); ++i)
    if (!advanced[i] && slots_[i].last.rows.data.get() == output) slots_[i].last = own_copy(slots_[i].last);
}

void Session::Impl::advance(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots,
                            std::int64_t rows, backend::Sampler* sampler) {
  std::vector<std::int32_t> padded_tokens(tokens.begin(), tokens.end()), padded_slots(slots.begin(), slots.end());
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(rows) + 1);
  std::vector<std::int64_t> positions;
  for (const std::int32_t slot : slots) positions.push_back(num_tokens(slot));
  if (!tokens.empty()) padded_tokens.resize(static_cast<std::size_t>(rows), 0);
  padded_slots.resize(static_cast<std::size_t>(rows), -1);
  positions.resize(static_cast<std::size_t>(rows), 0);
  std::iota(offsets.begin(), offsets.end(), 0);
  keep_hidden_of_others(slots);

  const backend::RaggedBatch batch{padded_tokens, offsets, padded_slots, positions, tokens.empty() ? sampler : nullptr};
  backend().begin(batch);
  change(slots, kStepFailed, [&] {
    const backend::StepKey key{rows,
                               {states_->id(), workspace().id(), step_output_.id(), sampler ? sampler->id() : 0},
                               transformer().prefix_tokens() > 0 && batch.begins_a_sequence()};
    backend().replay(key, [&] {
      const auto r = transformer().hidden(backend(), batch, *states_, workspace(), {});
      const backend::Matrix x{step_output_.hidden.data.get(), transformer().activation_dtype(), rows,
                              config().hidden_size};
      transformer().final_norm(backend(), r, {}, x);
      const backend::Matrix logits{step_output_.logits.data.get(), DType::float32, rows, config().padded_vocab_size};
      transformer().logits(backend(), x, logits);
      if (sampler) sampler->sample(logits, batch);
    });
  });
  for (std::size_t b = 0; b < slots.size(); ++b) {
    at(slots[b]).num_tokens.fetch_add(1);
    at(slots[b]).last = {step_output_.hidden, static_cast<std::int64_t>(b)};
  }
}

Tensor Session::Impl::step(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots,
                           const InterruptCheck& last_interrupt) {
  check_context(slots, std::vector<std::int64_t>(slots.size(), 1), "step");
  const std::int64_t rows = reserve_step(slots);
  const Tensor logits = transformer().new_logits(backend(), static_cast<std::int64_t>(tokens.size()));
  if (keeps_seen_)
    for (const std::int32_t slot : slots) at(slot).seen.reserve_one();
  interruptible(
      slots, last_interrupt,
      [&] {
        advance(tokens, slots, rows, nullptr);
        change(slots, kStepFailed, [&] {
          backend().copy(logits.data(), step_output_.logits.data.get(), logits.nbytes());
          backend().synchronize();
        });
      },
      /*appends=*/true);
  if (keeps_seen_)
    for (std::size_t i = 0; i < slots.size(); ++i) at(slots[i]).seen.add_prompt(tokens.subspan(i, 1));
  return logits;
}

void Session::Impl::step(std::span<const std::int32_t> slots, backend::Sampler& sampler) {
  forget_undo();
  if (keeps_seen_)
    for (const std::int32_t slot : slots) at(slot).seen.reserve_one();
  advance({}, slots, reserve_step(slots), &sampler);
}

void Session::Impl::reserve(std::span<const Piece> pieces) {
  std::vector<std::int32_t> slots;
  std::vector<std::int64_t> more;
  for (const Piece& piece : pieces) {
    slots.push_back(piece.slot);
    more.push_back(piece.num_tokens());
  }
  transformer().reserve(backend(), workspace(), std::accumulate(more.begin(), more.end(), std::int64_t{0}));
  reserve_states(slots, more);
}

void Session::Impl::step(std::span<const Piece> pieces, backend::Sampler& sampler, const InterruptCheck& interrupt) {
  forget_undo();
  std::vector<std::int32_t> tokens, offsets{0}, slots, rows, others;  // rows: those that are sampled come first
  std::vector<std::int64_t> positions;
  for (const Piece& piece : pieces) {
    if (piece.tokens.empty()) tokens.push_back(backend::kChosenToken);
    tokens.insert(tokens.end(), piece.tokens.begin(), piece.tokens.end());
    offsets.push_back(static_cast<std::int32_t>(tokens.size()));
    slots.push_back(piece.slot);
    positions.push_back(num_tokens(piece.slot));
    (piece.samplers.empty() ? others : rows).push_back(offsets.back() - 1);
  }
  const auto count = static_cast<std::int64_t>(rows.size());
  rows.insert(rows.end(), others.begin(), others.end());
  const backend::Buffer last = backend().allocate(rows.size() * hidden_nbytes(), backend::MemoryKind::workspace);
  const Tensor logits = transformer().new_logits(backend(), count);
  const backend::RaggedBatch batch{tokens, offsets, slots, positions, &sampler};
  backend().begin(batch);
  change(slots, kStepFailed, [&] {
    const auto r = transformer().hidden(backend(), batch, *states_, workspace(), interrupt);
    backend::Matrix x{last.data.get(), transformer().activation_dtype(), static_cast<std::int64_t>(rows.size()),
                      config().hidden_size};
    transformer().final_norm(backend(), r, rows, x);
    std::int64_t sampled = 0, other = count;
    for (const Piece& piece : pieces) {
      at(piece.slot).num_tokens.fetch_add(piece.num_tokens());
      at(piece.slot).last = {last, piece.samplers.empty() ? other++ : sampled++};
    }
    if (count == 0) return;
    x.rows = count;
    transformer().logits(backend(), x, {logits.data(), DType::float32, count, config().padded_vocab_size});
    sample(pieces, logits, sampler);
  });
}

// logits: a row for each piece that samples.
void Session::Impl::sample(std::span<const Piece> pieces, const Tensor& logits, backend::Sampler& sampler) {
  std::vector<std::int32_t> offsets{0}, samplers, rows;
  std::vector<std::int64_t> positions;
  std::int32_t row = 0;
  for (const Piece& piece : pieces) {
    if (piece.samplers.empty()) continue;
    for (const std::int32_t each : piece.samplers) {
      samplers.push_back(each);
      offsets.push_back(offsets.back() + 1);
      positions.push_back(num_tokens(piece.slot) - 1);  // of the last token
      rows.push_back(row);
    }
    ++row;
  }
  const backend::RaggedBatch batch{{}, offsets, samplers, positions, nullptr, rows};
  backend().begin(batch);
  sampler.sample({logits.data(), DType::float32, logits.shape()[0], logits.shape()[1]}, batch);
}

void Session::Impl::sample_again(std::span<const Piece> pieces, backend::Sampler& sampler) {
  std::vector<std::int32_t> slots;
  for (const Piece& piece : pieces) slots.push_back(piece.slot);
  sample(pieces, last_logits(slots), sampler);
}

Tensor Session::Impl::last_logits(std::span<const std::int32_t> slots) {
  const auto count = static_cast<std::int64_t>(slots.size());
  const std::size_t nbytes = hidden_nbytes();
  const backend::Buffer hidden = backend().allocate(slots.size() * nbytes, backend::MemoryKind::workspace);
  const Tensor logits = transformer().new_logits(backend(), count);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const LastHidden& last = at(slots[i]).last;
    const auto* rows = static_cast<const std::byte*>(last.rows.data.get());
    backend().copy(static_cast<std::byte*>(hidden.data.get()) + i * nbytes,
                   rows + static_cast<std::size_t>(last.row) * nbytes, nbytes);
  }
  const backend::Matrix x{hidden.data.get(), transformer().activation_dtype(), count, config().hidden_size};
  transformer().logits(backend(), x, {logits.data(), DType::float32, count, config().padded_vocab_size});
  backend().synchronize();
  return logits;
}

void Session::Impl::set_num_tokens(int slot, std::int64_t count) {
  if (num_tokens(slot) == count) return;
  at(slot).num_tokens.store(count);
  at(slot).last = {};  // the step that was left out has written its place
}

void Session::Impl::mark_broken(int slot) noexcept {
  at(slot).snapshot.reset();
  at(slot).broken = kStepFailed;
}

void Session::Impl::add_output(int slot, std::int32_t token) {
  if (keeps_seen_) at(slot).seen.add_output(token);
}

// ---- states --------------------------------------------------------------------------------------------------------

void Session::Impl::reset(int slot) {
  const std::int32_t one[] = {slot};
  change(one, "a reset failed", [&] { backend().reset_state(*states_, slot); });
  at(slot).set({});
  at(slot).broken = nullptr;
}

void Session::Impl::copy(int from, int to) {
  check_whole(from);
  if (from == to) return;
  Progress progress = at(from).progress();
  if (progress.last.rows.data && progress.last.rows.data == step_output_.hidden.data)
    progress.last = own_copy(progress.last);
  const std::int32_t one[] = {to};
  const std::int64_t length[] = {num_tokens(from)};
  backend().reserve_states(*states_, one, length);
  change(one, "a copy failed", [&] { backend().copy_state(*states_, from, *states_, to, num_tokens(from)); });
  at(to).set(std::move(progress));
  at(to).broken = nullptr;
  at(to).snapshot = at(from).snapshot;
}

void Session::Impl::settle(int changed_slot) {
  const std::int32_t one[] = {changed_slot};
  const auto snapshot = at(changed_slot).snapshot;
  change(one, "a reset or copy failed", [&] { backend().synchronize(); });
  at(changed_slot).snapshot = snapshot;
}

// Returns before it is done where the device is asynchronous.
std::unique_ptr<State::Impl> Session::Impl::copy_of(int slot) const {
  const Slot& source = at(slot);
  auto impl = std::make_unique<State::Impl>();
  impl->model = model;
  impl->progress = source.progress();
  impl->progress.seen.settle();
  if (num_tokens(slot) > 0) {
    impl->states = backend().make_states(config(), model->dtype(), 1);
    backend().copy_state(*states_, slot, *impl->states, 0, num_tokens(slot));
    if (source.last.rows.data) impl->progress.last = own_copy(source.last);
  }
  return impl;
}

std::shared_ptr<const State> Session::Impl::snapshot(int slot, SeenTokens seen) const {
  check_whole(slot);
  auto impl = copy_of(slot);
  seen.settle();
  impl->progress.seen = std::move(seen);
  backend().synchronize();
  return std::make_shared<State>(std::move(impl));
}

void Session::Impl::grow(std::int64_t count) {
  std::vector<Slot> slots(checked_batch_size(count));
  auto states = backend().make_states(config(), model->dtype(), static_cast<int>(count));
  for (int slot = 0; slot < batch_size(); ++slot) {
    if (num_tokens(slot) > 0) backend().copy_state(*states_, slot, *states, slot, num_tokens(slot));
    Slot& to = slots[static_cast<std::size_t>(slot)];
    to.set(at(slot).progress());
    to.snapshot = at(slot).snapshot;
    to.broken = at(slot).broken;
  }
  backend().synchronize();
  forget_undo();
  states_ = std::move(states);
  slots_ = std::move(slots);
}

std::vector<std::shared_ptr<const State>> Session::Impl::snapshots(std::span<const std::int32_t> slots) const {
  auto result = begin_snapshots(slots);
  for (const auto& state : result) state->impl().wait();
  return result;
}

std::vector<std::shared_ptr<const State>> Session::Impl::begin_snapshots(std::span<const std::int32_t> slots) const {
  std::vector<std::shared_ptr<const State>> result;
  std::vector<std::unique_ptr<State::Impl>> copies(slots.size());
  bool copied = false;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check_whole(slots[i]);
    result.push_back(at(slots[i]).snapshot.lock());
    if (result.back()) continue;
    copies[i] = copy_of(slots[i]);
    copied |= copies[i]->states != nullptr;
  }
  const auto made = copied ? backend().point() : nullptr;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (!copies[i]) continue;
    copies[i]->made = made;
    result[i] = std::make_shared<State>(std::move(copies[i]));
  }
  for (std::size_t i = 0; i < slots.size(); ++i) at(slots[i]).snapshot = result[i];
  return result;
}

void Session::Impl::check_model(const State& state) const {
  if (state.model() != model)
    throw StateError(
        "found the state of another model, expected one of the model of this session (a model that was "
        "loaded twice is two models: a state goes from one to the other through a file)");
}

void Session::Impl::restore(std::span<const std::int32_t> slots, std::span<const State* const> states) {
  restore(slots, states, /*waits=*/true);
}

void Session::Impl::begin_restore(std::span<const std::int32_t> slots, std::span<const State* const> states) {
  restore(slots, states, /*waits=*/false);
}

void Session::Impl::restore(std::span<const std::int32_t> slots, std::span<const State* const> states, bool waits) {
  std::vector<Progress> progress;
  std::vector<std::int64_t> lengths;
  for (const State* state : states) {
    check_model(*state);
    progress.push_back(state->impl().progress);
    lengths.push_back(state->num_tokens());
  }
  backend().reserve_states(*states_, slots, lengths);
  change(slots, "restoring a state failed", [&] {
    for (std::size_t i = 0; i < slots.size(); ++i) {
      // Memory of another executor's might be freed, in that one's order, before it is read.
      const auto& made = states[i]->impl().made;
      const bool is_own = made && made->is_before(backend());
      if (!is_own) states[i]->impl().wait();
      waits |= !is_own;
      put(slots[i], *states[i]);
    }
    if (waits) backend().synchronize();
  });
  for (std::size_t i = 0; i < slots.size(); ++i) {
    at(slots[i]).set(std::move(progress[i]));
    at(slots[i]).broken = nullptr;
    at(slots[i]).snapshot = states[i]->weak_from_this();
  }
}

// Returns before it is done where the device is asynchronous.
void Session::Impl::put(int slot, const State& state) {
  if (state.impl().states)
    backend().copy_state(*state.impl().states, 0, *states_, slot, state.num_tokens());
  else
    backend().reset_state(*states_, slot);
}

void Session::Impl::reset_all() {
  change(all_slots(), "a reset failed", [&] {
    for (int slot = 0; slot < batch_size(); ++slot) reset(slot);
    backend().synchronize();
  });
}

void Session::Impl::restore_all(std::span<const std::shared_ptr<const State>> states) {
  std::vector<const State*> pointers;
  for (const auto& state : states) pointers.push_back(state.get());
  restore(all_slots(), pointers);
}

void Session::Impl::save(const std::filesystem::path& path) const {
  std::vector<Progress> progress;
  for (int slot = 0; slot < batch_size(); ++slot) {
    check_whole(slot);
    progress.push_back(at(slot).progress());
  }
  std::vector<SequenceView> sequences;
  for (int slot = 0; slot < batch_size(); ++slot)
    sequences.push_back({states_.get(), slot, &progress[static_cast<std::size_t>(slot)]});
  save_states(path, *model, backend(), sequences);
}

void Session::Impl::load(const std::filesystem::path& path, const InterruptCheck& last_interrupt) {
  const StateFileReader reader(path, *model);
  if (reader.num_sequences() != slots_.size())
    throw StateError(path.string() + ": holds " + std::to_string(reader.num_sequences()) +
                     " sequences, the session has " + std::to_string(batch_size()));
  auto loaded = backend().make_states(config(), model->dtype(), batch_size());
  std::vector<Progress> progress;
  for (int b = 0; b < batch_size(); ++b) progress.push_back(reader.read(b, backend(), *loaded, b));
  backend().synchronize();
  forget_undo();
  std::vector<Undo> before;
  std::size_t nbytes = 0;
  for (int b = 0; last_interrupt && b < batch_size(); ++b) {
    before.push_back(undo_of(b));
    nbytes += model->impl().state_nbytes_of(num_tokens(b));
  }
  if (last_interrupt) last_interrupt();
  states_.swap(loaded);
  if (last_interrupt && nbytes <= kMostUndone) {
    undo_ = std::move(before);
    replaced_ = std::move(loaded);
  }
  for (int b = 0; b < batch_size(); ++b) {
    Slot& slot = at(b);
    slot.set(std::move(progress[static_cast<std::size_t>(b)]));
    slot.snapshot.reset();
    slot.broken = nullptr;
  }
}

// ---- Checkpoint ----------------------------------------------------------------------------------------------------

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::~Checkpoint() = default;
std::span<const std::int64_t> Checkpoint::num_tokens() const { return impl_->num_tokens; }
std::span<const std::shared_ptr<const State>> Checkpoint::states() const { return impl_->states; }
std::size_t Checkpoint::state_nbytes() const {
  std::size_t total = 0;
  for (const auto& state : impl_->states)
    if (state->impl().states) total += state->model()->impl().state_nbytes_of(state->num_tokens());
  return total;
}

// ---- Session -------------------------------------------------------------------------------------------------------

Session::Session(std::shared_ptr<const Model> model, int batch_size)
    : impl_(std::make_unique<Impl>(std::move(model), batch_size)) {}

Session::Session(std::shared_ptr<const Model> model, std::span<const std::shared_ptr<const State>> states)
    : impl_(std::make_unique<Impl>(std::move(model), static_cast<std::int64_t>(states.size()))) {
  const Impl::Turn turn(*impl_);
  impl_->restore_all(states);
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

const std::shared_ptr<const Model>& Session::model() const { return impl_->model; }
int Session::batch_size() const { return impl_->batch_size(); }
std::size_t Session::state_nbytes() const { return impl_->state_nbytes(); }

std::vector<std::int64_t> Session::num_tokens() const {
  std::vector<std::int64_t> result;
  for (int slot = 0; slot < impl_->batch_size(); ++slot) result.push_back(impl_->num_tokens(slot));
  return result;
}

Tensor Session::prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const int> sequences,
                        const InterruptCheck& interrupt, const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  const auto slots = impl_->check_sequences(sequences, prompts.size(), "prefill: prompts");
  for (std::size_t i = 0; i < prompts.size(); ++i)
    check_tokens(prompts[i], impl_->config().vocab_size, "prefill: prompt " + std::to_string(i));
  for (std::size_t i = 0; i < prompts.size(); ++i)
    impl_->check_prefix(slots[i], "prefill: prompt " + std::to_string(i));
  return impl_->prefill(prompts, slots, interrupt, last_interrupt);
}

Tensor Session::step(std::span<const std::int32_t> tokens, std::span<const int> sequences,
                     const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  const auto slots = impl_->check_sequences(sequences, tokens.size(), "step: tokens");
  check_tokens(tokens, impl_->config().vocab_size, "step: tokens");
  return impl_->step(tokens, slots, last_interrupt);
}

void Session::undo_last() {
  const Impl::Turn turn(*impl_);
  impl_->undo_last();
}

std::unique_ptr<Session> Session::fork() const {
  const Impl::Turn turn(*impl_);
  return std::unique_ptr<Session>(new Session(std::make_unique<Impl>(*impl_)));
}

std::shared_ptr<const State> Session::snapshot(int sequence) const {
  const Impl::Turn turn(*impl_);
  impl_->check_sequence(sequence, "snapshot");
  const std::int32_t one[] = {sequence};
  return impl_->snapshots(one).front();
}

void Session::restore(int sequence, const State& state, const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  impl_->check_sequence(sequence, "restore");
  const std::int32_t one[] = {sequence};
  const State* const states[] = {&state};
  impl_->interruptible(one, last_interrupt, [&] { impl_->restore(one, states); });
}

std::unique_ptr<Checkpoint> Session::checkpoint() const {
  const Impl::Turn turn(*impl_);
  auto saved = std::make_unique<Checkpoint::Impl>();
  saved->states = impl_->snapshots(impl_->all_slots());
  for (const auto& state : saved->states) saved->num_tokens.push_back(state->num_tokens());
  return std::unique_ptr<Checkpoint>(new Checkpoint(std::move(saved)));
}

void Session::rollback(const Checkpoint& checkpoint, const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  const auto states = checkpoint.states();
  if (states.size() != static_cast<std::size_t>(impl_->batch_size()))
    throw StateError("rollback: the checkpoint has " + std::to_string(states.size()) + " sequences, the session " +
                     std::to_string(impl_->batch_size()) + ": restore() takes the state of one sequence");
  impl_->interruptible(impl_->all_slots(), last_interrupt, [&] { impl_->restore_all(states); });
}

void Session::reset(const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  impl_->interruptible(impl_->all_slots(), last_interrupt, [&] { impl_->reset_all(); });
}

void Session::reset(int sequence, const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  impl_->check_sequence(sequence, "reset");
  const std::int32_t one[] = {sequence};
  impl_->interruptible(one, last_interrupt, [&] {
    impl_->reset(sequence);
    impl_->settle(sequence);
  });
}

void Session::copy(int from, int to, const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  for (const int sequence : {from, to}) impl_->check_sequence(sequence, "copy");
  const std::int32_t one[] = {to};
  impl_->interruptible(one, last_interrupt, [&] {
    impl_->copy(from, to);
    impl_->settle(to);
  });
}

void Session::save_state(const std::filesystem::path& path) const {
  const Impl::Turn turn(*impl_);
  impl_->save(path);
}

void Session::load_state(const std::filesystem::path& path, const InterruptCheck& last_interrupt) {
  const Impl::Turn turn(*impl_);
  impl_->load(path, last_interrupt);
}

}  // namespace based
