#include "based/session.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "based/error.h"
#include "session/session_impl.h"
#include "session/state_io.h"

namespace based {

namespace {

constexpr int kMaxBatchSize = 1 << 20;

// States of some slots, put back unless commit() is called.
class Rollback {
 public:
  Rollback(Session::Impl& session, std::span<const std::int32_t> slots) : session_(session), slots_(slots) {
    // A fresh sequence is restored by making it fresh again: only the others are copied.
    const auto used = std::ranges::count_if(slots, [&](int slot) { return tokens(slot) > 0; });
    if (used == 0) return;
    saved_ = session.backend->make_states(session.config(), session.model->dtype(), static_cast<int>(used));
    int next = 0;
    for (const int slot : slots)
      if (tokens(slot) > 0) session.backend->copy_state(*session.states, slot, *saved_, next++);
  }
  ~Rollback() {
    if (committed_) return;
    int next = 0;
    for (const int slot : slots_) {
      if (tokens(slot) > 0)
        session_.backend->copy_state(*saved_, next++, *session_.states, slot);
      else
        session_.backend->reset_state(*session_.states, slot);
    }
  }
  Rollback(const Rollback&) = delete;
  Rollback& operator=(const Rollback&) = delete;

  void commit() { committed_ = true; }

 private:
  std::int64_t tokens(int slot) const { return session_.num_tokens[static_cast<std::size_t>(slot)]; }

  Session::Impl& session_;
  std::span<const std::int32_t> slots_;
  std::unique_ptr<backend::StatePool> saved_;
  bool committed_ = false;
};

}  // namespace

Session::Impl::Impl(std::shared_ptr<const Model> m, int batch_size)
    : model(std::move(m)), backend(model->impl().make_backend()) {
  if (batch_size < 1 || batch_size > kMaxBatchSize)
    throw InvalidArgument("batch_size is " + std::to_string(batch_size) + ", expected 1 to " +
                          std::to_string(kMaxBatchSize));
  states = backend->make_states(config(), model->dtype(), batch_size);
  num_tokens.assign(static_cast<std::size_t>(batch_size), 0);
}

Session::Impl::Turn::Turn(const Impl& impl) : impl_(impl) {
  if (impl.busy_.exchange(true, std::memory_order_acquire))
    throw SessionBusyError("this session is in another call: one thread at a time may use a session");
}

std::vector<std::int32_t> Session::Impl::check_sequences(std::span<const int> sequences, std::size_t count,
                                                         const char* what) const {
  std::vector<std::int32_t> slots(sequences.begin(), sequences.end());
  if (slots.empty()) {
    slots.resize(num_tokens.size());
    std::iota(slots.begin(), slots.end(), 0);
  }
  if (count != slots.size())
    throw InvalidArgument(std::string(what) + " for " + std::to_string(count) + " sequences, expected " +
                          std::to_string(slots.size()));
  std::vector<bool> seen(num_tokens.size());
  for (const std::int32_t slot : slots) {
    if (slot < 0 || slot >= batch_size())
      throw InvalidArgument("sequence " + std::to_string(slot) + " is outside [0, " + std::to_string(batch_size()) +
                            ")");
    if (seen[static_cast<std::size_t>(slot)])
      throw InvalidArgument("sequence " + std::to_string(slot) + " is listed twice");
    seen[static_cast<std::size_t>(slot)] = true;
  }
  return slots;
}

Tensor Session::Impl::prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const std::int32_t> slots,
                              const InterruptCheck& interrupt) {
  const auto count = static_cast<std::int64_t>(prompts.size());
  const std::int64_t d = config().hidden_size, chunk = backend->chunk_tokens();
  const DType activation = transformer().activation_dtype();
  const backend::Buffer last =
      backend->allocate(static_cast<std::size_t>(count * d) * size_of(activation), backend::MemoryKind::workspace);
  const backend::Matrix last_x{last.data.get(), activation, count, d};
  const Tensor logits = transformer().new_logits(*backend, count);

  // A batch holds up to `chunk` tokens, at most one piece of each prompt. Pieces end at multiples of `chunk` of their
  // own prompt, so how a prompt is cut does not depend on its neighbours.
  std::vector<std::size_t> fed(prompts.size(), 0);
  std::vector<std::size_t> waiting(prompts.size());
  std::iota(waiting.begin(), waiting.end(), 0u);
  std::vector<std::int32_t> tokens, offsets, batch_slots, rows;
  std::vector<std::int64_t> positions;
  std::vector<std::size_t> members;

  Rollback rollback(*this, slots);
  while (!waiting.empty()) {
    tokens.clear();
    offsets.assign(1, 0);
    batch_slots.clear();
    positions.clear();
    members.clear();
    for (const std::size_t i : waiting) {
      const std::size_t piece = std::min(prompts[i].size() - fed[i], static_cast<std::size_t>(chunk));
      if (tokens.size() + piece > static_cast<std::size_t>(chunk)) continue;
      const auto first = prompts[i].begin() + static_cast<std::ptrdiff_t>(fed[i]);
      tokens.insert(tokens.end(), first, first + static_cast<std::ptrdiff_t>(piece));
      offsets.push_back(static_cast<std::int32_t>(tokens.size()));
      batch_slots.push_back(slots[i]);
      positions.push_back(num_tokens[static_cast<std::size_t>(slots[i])] + static_cast<std::int64_t>(fed[i]));
      members.push_back(i);
    }
    const backend::RaggedBatch batch{tokens, offsets, batch_slots, positions};
    backend->begin(batch);
    const auto r = transformer().hidden(*backend, batch, *states, workspace_, interrupt);
    rows.assign(prompts.size(), -1);
    for (std::size_t b = 0; b < members.size(); ++b) {
      const std::size_t i = members[b];
      fed[i] += static_cast<std::size_t>(offsets[b + 1] - offsets[b]);
      if (fed[i] == prompts[i].size()) rows[i] = offsets[b + 1] - 1;
    }
    if (std::ranges::any_of(rows, [](std::int32_t row) { return row >= 0; }))
      transformer().final_norm(*backend, r, rows, last_x);
    std::erase_if(waiting, [&](std::size_t i) { return fed[i] == prompts[i].size(); });
  }
  transformer().logits(*backend, last_x, {logits.data(), DType::float32, count, config().padded_vocab_size});
  backend->synchronize();
  rollback.commit();
  for (std::size_t i = 0; i < prompts.size(); ++i)
    num_tokens[static_cast<std::size_t>(slots[i])] += static_cast<std::int64_t>(prompts[i].size());
  return logits;
}

// Everything that may fail comes before the states change: a step is too short to be interrupted, and copying the
// states to undo it would cost more than the step.
std::int64_t Session::Impl::reserve_step(std::size_t count) {
  const std::int64_t rows = backend->step_rows(static_cast<std::int64_t>(count));
  transformer().reserve(*backend, workspace_, rows);
  backend->reserve_step(config(), rows);
  const auto nbytes = static_cast<std::size_t>(rows * config().padded_vocab_size) * sizeof(float);
  if (nbytes > step_logits_.memory.nbytes) {
    step_logits_ = {};
    step_logits_.memory = backend->allocate(nbytes, backend::MemoryKind::workspace);
  }
  return rows;
}

void Session::Impl::advance(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots,
                            std::int64_t rows, backend::Sampler* sampler) {
  std::vector<std::int32_t> padded_tokens(tokens.begin(), tokens.end()), padded_slots(slots.begin(), slots.end());
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(rows) + 1);
  std::vector<std::int64_t> positions;
  for (const std::int32_t slot : slots) positions.push_back(num_tokens[static_cast<std::size_t>(slot)]);
  if (!tokens.empty()) padded_tokens.resize(static_cast<std::size_t>(rows), 0);
  padded_slots.resize(static_cast<std::size_t>(rows), -1);
  positions.resize(static_cast<std::size_t>(rows), 0);
  std::iota(offsets.begin(), offsets.end(), 0);

  const backend::RaggedBatch batch{padded_tokens, offsets, padded_slots, positions, tokens.empty() ? sampler : nullptr};
  backend->begin(batch);
  const backend::StepKey key{rows, {states->id(), workspace_.id(), step_logits_.id(), sampler ? sampler->id() : 0}};
  backend->replay(key, [&] {
    const auto r = transformer().hidden(*backend, batch, *states, workspace_, {});
    const backend::Matrix x{workspace_.x.data.get(), transformer().activation_dtype(), rows, config().hidden_size};
    transformer().final_norm(*backend, r, {}, x);
    const backend::Matrix logits{step_logits_.memory.data.get(), DType::float32, rows, config().padded_vocab_size};
    transformer().logits(*backend, x, logits);
    if (sampler) sampler->sample(logits, batch);
  });
  for (const std::int32_t slot : slots) ++num_tokens[static_cast<std::size_t>(slot)];
}

Tensor Session::Impl::step(std::span<const std::int32_t> tokens, std::span<const std::int32_t> slots) {
  const std::int64_t rows = reserve_step(tokens.size());
  const Tensor logits = transformer().new_logits(*backend, static_cast<std::int64_t>(tokens.size()));
  advance(tokens, slots, rows, nullptr);
  backend->copy(logits.data(), step_logits_.memory.data.get(), logits.nbytes());
  backend->synchronize();
  return logits;
}

void Session::Impl::step(std::span<const std::int32_t> slots, backend::Sampler& sampler) {
  advance({}, slots, reserve_step(slots.size()), &sampler);
}

void Session::Impl::reset(int slot) {
  backend->reset_state(*states, slot);
  num_tokens[static_cast<std::size_t>(slot)] = 0;
}

void Session::Impl::copy(int from, int to) {
  if (from == to) return;
  backend->copy_state(*states, from, *states, to);
  num_tokens[static_cast<std::size_t>(to)] = num_tokens[static_cast<std::size_t>(from)];
}

std::unique_ptr<backend::StatePool> Session::Impl::copy_states() const {
  auto copy = backend->make_states(config(), model->dtype(), batch_size());
  for (int slot = 0; slot < batch_size(); ++slot) backend->copy_state(*states, slot, *copy, slot);
  return copy;
}

// ---- Checkpoint ----------------------------------------------------------------------------------------------------

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::~Checkpoint() = default;
std::span<const std::int64_t> Checkpoint::num_tokens() const { return impl_->num_tokens; }
std::size_t Checkpoint::state_nbytes() const {
  return impl_->states->nbytes_per_slot() * static_cast<std::size_t>(impl_->states->capacity());
}

// ---- Session -------------------------------------------------------------------------------------------------------

Session::Session(std::shared_ptr<const Model> model, int batch_size)
    : impl_(std::make_unique<Impl>(std::move(model), batch_size)) {}
Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

const std::shared_ptr<const Model>& Session::model() const { return impl_->model; }
int Session::batch_size() const { return impl_->batch_size(); }
std::size_t Session::state_nbytes() const {
  return impl_->model->state_nbytes() * static_cast<std::size_t>(impl_->batch_size());
}

std::vector<std::int64_t> Session::num_tokens() const {
  const Impl::Turn turn(*impl_);
  return impl_->num_tokens;
}

Tensor Session::prefill(std::span<const std::vector<std::int32_t>> prompts, std::span<const int> sequences,
                        const InterruptCheck& interrupt) {
  const Impl::Turn turn(*impl_);
  const auto slots = impl_->check_sequences(sequences, prompts.size(), "prefill: prompts");
  for (std::size_t i = 0; i < prompts.size(); ++i)
    check_tokens(prompts[i], impl_->config().vocab_size, "prefill: prompt " + std::to_string(i));
  return impl_->prefill(prompts, slots, interrupt);
}

Tensor Session::step(std::span<const std::int32_t> tokens, std::span<const int> sequences) {
  const Impl::Turn turn(*impl_);
  const auto slots = impl_->check_sequences(sequences, tokens.size(), "step: tokens");
  check_tokens(tokens, impl_->config().vocab_size, "step: tokens");
  return impl_->step(tokens, slots);
}

std::unique_ptr<Session> Session::fork() const {
  const Impl::Turn turn(*impl_);
  auto forked = std::make_unique<Impl>(impl_->model, impl_->batch_size());
  for (int slot = 0; slot < impl_->batch_size(); ++slot)
    impl_->backend->copy_state(*impl_->states, slot, *forked->states, slot);
  forked->num_tokens = impl_->num_tokens;
  return std::unique_ptr<Session>(new Session(std::move(forked)));
}

std::unique_ptr<Checkpoint> Session::checkpoint() const {
  const Impl::Turn turn(*impl_);
  auto saved = std::make_unique<Checkpoint::Impl>();
  saved->model = impl_->model;
  saved->states = impl_->copy_states();
  saved->num_tokens = impl_->num_tokens;
  return std::unique_ptr<Checkpoint>(new Checkpoint(std::move(saved)));
}

void Session::rollback(const Checkpoint& checkpoint) {
  const Impl::Turn turn(*impl_);
  const Checkpoint::Impl& saved = *checkpoint.impl_;
  if (saved.model != impl_->model) throw StateError("rollback: the checkpoint was taken on another model");
  if (saved.num_tokens.size() != impl_->num_tokens.size())
    throw StateError("rollback: the checkpoint has " + std::to_string(saved.num_tokens.size()) +
                     " sequences, the session " + std::to_string(impl_->batch_size()));
  for (int slot = 0; slot < impl_->batch_size(); ++slot)
    impl_->backend->copy_state(*saved.states, slot, *impl_->states, slot);
  impl_->num_tokens = saved.num_tokens;
}

void Session::reset() {
  const Impl::Turn turn(*impl_);
  for (int slot = 0; slot < impl_->batch_size(); ++slot) impl_->reset(slot);
}

void Session::reset(int sequence) {
  const Impl::Turn turn(*impl_);
  const int one[] = {sequence};
  impl_->check_sequences(one, 1, "reset: a sequence");
  impl_->reset(sequence);
}

void Session::copy(int from, int to) {
  const Impl::Turn turn(*impl_);
  for (const int sequence : {from, to}) {
    const int one[] = {sequence};
    impl_->check_sequences(one, 1, "copy: a sequence");
  }
  impl_->copy(from, to);
}

void Session::save_state(const std::filesystem::path& path) const {
  const Impl::Turn turn(*impl_);
  save_states(path, *impl_->model, *impl_->backend, *impl_->states, impl_->num_tokens);
}

void Session::load_state(const std::filesystem::path& path) {
  const Impl::Turn turn(*impl_);
  auto [states, num_tokens] = load_states(path, *impl_->model, *impl_->backend, impl_->batch_size());
  impl_->states = std::move(states);
  impl_->num_tokens = std::move(num_tokens);
}

}  // namespace based
