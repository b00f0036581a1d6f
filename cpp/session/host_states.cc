#include "session/host_states.h"

#include <algorithm>
#include <span>
#include <utility>

#include "based/error.h"
#include "model/model_impl.h"
#include "session/state_impl.h"

namespace based {

namespace {

constexpr std::size_t kSlabNbytes = std::size_t{64} << 20;
constexpr std::size_t kGrowingBlock = std::size_t{2} << 20;
constexpr std::size_t kAlignment = 64;

std::size_t block_of(const Model& model) {
  const std::size_t small = model.impl().state_nbytes_of(1),
                    large = model.impl().state_nbytes_of(std::int64_t{1} << 20);
  return small == large ? (small + kAlignment - 1) / kAlignment * kAlignment : kGrowingBlock;
}

std::vector<backend::MemoryPiece> pieces_of(const State& state) {
  const backend::Backend& device = state.model()->impl().executors.device();
  return device.state_pieces(*state.impl().states, 0, state.num_tokens());
}

// Calls visit(device, host, nbytes) for the parts of the pieces, laid one behind the other, that lie in one block each.
template <typename Visit>
void for_each_part(std::span<const backend::MemoryPiece> pieces, std::span<std::byte* const> blocks,
                   std::size_t block_nbytes, Visit&& visit) {
  std::size_t block = 0, used = 0;
  for (const backend::MemoryPiece& piece : pieces) {
    for (std::size_t done = 0; done < piece.nbytes;) {
      if (used == block_nbytes) {
        ++block;
        used = 0;
      }
      const std::size_t nbytes = std::min(piece.nbytes - done, block_nbytes - used);
      visit(piece.data + done, blocks[block] + used, nbytes);
      done += nbytes;
      used += nbytes;
    }
  }
}

}  // namespace

HostMemory::HostMemory(const Model& model, std::size_t max_nbytes)
    : block_nbytes_(block_of(model)), max_blocks_(max_nbytes / block_nbytes_) {}

std::size_t HostMemory::count_of(const State& state) const {
  std::size_t nbytes = 0;
  for (const backend::MemoryPiece& piece : pieces_of(state)) nbytes += piece.nbytes;
  return (nbytes + block_nbytes_ - 1) / block_nbytes_;
}

std::vector<std::byte*> HostMemory::take(const Model& model, std::size_t count) {
  const std::lock_guard lock(mutex_);
  while (free_.size() < count) {
    const std::size_t blocks =
        std::min(std::max<std::size_t>(1, kSlabNbytes / block_nbytes_), max_blocks_ - num_blocks_);
    if (blocks == 0) throw OutOfMemory("out of memory: the host's states take all that they may");
    slabs_.reserve(slabs_.size() + 1);
    free_.reserve(num_blocks_ + blocks);  // giving back does not allocate
    slabs_.push_back(model.impl().executors.device().allocate_host(blocks * block_nbytes_));
    auto* const slab = static_cast<std::byte*>(slabs_.back().get());
    for (std::size_t i = blocks; i-- > 0;) free_.push_back(slab + i * block_nbytes_);
    num_blocks_ += blocks;
  }
  std::vector<std::byte*> taken(free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
  free_.resize(free_.size() - count);
  return taken;
}

void HostMemory::give_back(const std::vector<std::byte*>& blocks) noexcept {
  const std::lock_guard lock(mutex_);
  free_.insert(free_.end(), blocks.begin(), blocks.end());
}

HostState::HostState(const State& state, std::shared_ptr<HostMemory> memory)
    : model_(state.model()), memory_(std::move(memory)), num_tokens_(state.num_tokens()) {
  const State::Impl& from = state.impl();
  from.wait();
  const auto lease = model_->impl().executors.lease();
  backend::Backend& backend = lease->backend();
  const auto pieces = pieces_of(state);
  const backend::Buffer& last = from.progress.last.rows;
  last_hidden_.resize(last.nbytes);
  blocks_ = memory_->take(*model_, memory_->count_of(state));
  try {
    for_each_part(
        pieces, blocks_, memory_->block_nbytes(),
        [&](std::byte* device, std::byte* host, std::size_t nbytes) { backend.copy_to_host(host, device, nbytes); });
    backend.copy_to_host(last_hidden_.data(), last.data.get(), last.nbytes);
  } catch (...) {
    memory_->give_back(blocks_);
    throw;
  }
}

HostState::~HostState() { memory_->give_back(blocks_); }

std::shared_ptr<const State> HostState::to_device() const {
  const auto lease = model_->impl().executors.lease();
  backend::Backend& backend = lease->backend();
  auto impl = std::make_unique<State::Impl>();
  impl->model = model_;
  impl->states = backend.make_states(model_->config(), model_->dtype(), 1);
  const std::int32_t slots[] = {0};
  const std::int64_t lengths[] = {num_tokens_};
  backend.reserve_states(*impl->states, slots, lengths);
  const auto pieces = backend.state_pieces(*impl->states, 0, num_tokens_);
  for_each_part(pieces, blocks_, memory_->block_nbytes(), [&](std::byte* device, std::byte* host, std::size_t nbytes) {
    backend.copy_from_host(device, host, nbytes);
  });
  impl->progress.num_tokens = num_tokens_;
  impl->progress.last.rows = backend.allocate(last_hidden_.size(), backend::MemoryKind::workspace);
  backend.copy_from_host(impl->progress.last.rows.data.get(), last_hidden_.data(), last_hidden_.size());
  backend.synchronize();
  return std::make_shared<State>(std::move(impl));
}

}  // namespace based
