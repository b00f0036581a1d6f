#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "based/model.h"
#include "based/state.h"

namespace based {

/// Memory of the host that states of a device are copied to, in blocks of one size: a state whose size is fixed takes
/// one, another one as many as it needs. Blocks are taken from the system when they are first needed, 64 MiB at a time,
/// and kept, because page-locked memory is slow to get. Any thread.
class HostMemory : public std::enable_shared_from_this<HostMemory> {
 public:
  HostMemory(const Model& model, std::size_t max_nbytes);

  std::size_t block_nbytes() const { return block_nbytes_; }
  /// Bytes of the blocks that a copy of the state takes.
  std::size_t nbytes_of(const State& state) const { return count_of(state) * block_nbytes_; }

 private:
  friend class HostState;
  std::size_t count_of(const State& state) const;
  std::vector<std::byte*> take(const Model& model, std::size_t count);
  void give_back(const std::vector<std::byte*>& blocks) noexcept;

  const std::size_t block_nbytes_, max_blocks_;
  std::mutex mutex_;
  std::size_t num_blocks_ = 0;  // taken from the system
  std::vector<std::shared_ptr<void>> slabs_;
  std::vector<std::byte*> free_;
};

/// A copy of a state's bytes there. Immutable; any thread.
class HostState {
 public:
  /// Waits for the copy. Throws OutOfMemory, DeviceError.
  HostState(const State& state, std::shared_ptr<HostMemory> memory);
  ~HostState();
  HostState(const HostState&) = delete;
  HostState& operator=(const HostState&) = delete;

  /// A state with the same bytes, on the device. Throws OutOfMemory, DeviceError.
  std::shared_ptr<const State> to_device() const;

  std::int64_t num_tokens() const { return num_tokens_; }

 private:
  const std::shared_ptr<const Model> model_;
  const std::shared_ptr<HostMemory> memory_;
  const std::int64_t num_tokens_;
  std::vector<std::byte*> blocks_;
  std::vector<std::byte> last_hidden_;
};

}  // namespace based
