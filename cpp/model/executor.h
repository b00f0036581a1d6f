#pragma once

#include <exception>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/transformer.h"

namespace based {

/// What a computation runs on: an instance of the device (stream, library handles, recorded steps) and the scratch
/// memory of a forward pass. It holds nothing of a sequence. One thread at a time.
class Executor {
 public:
  explicit Executor(std::unique_ptr<backend::Backend> backend) : backend_(std::move(backend)) {}
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  backend::Backend& backend() const { return *backend_; }
  Workspace& workspace() { return workspace_; }

  /// Gives back the memory that is only kept to be used again.
  void trim() {
    workspace_ = {};
    backend_->trim();
  }

 private:
  const std::unique_ptr<backend::Backend> backend_;
  Workspace workspace_;
};

/// The executors of one model: as many as were ever needed at once, shared by all its sessions and calls. Any thread.
/// States may be used by one executor after another, because a lease ends when its work is done.
class Executors {
 public:
  explicit Executors(std::unique_ptr<backend::Backend> first);

  /// For what any thread may ask a backend at any time: device, threads, counters, sizes.
  const backend::Backend& device() const { return *device_; }

  /// An executor for one caller, from the moment it is taken until the lease is destroyed.
  class Lease {
   public:
    Lease(Lease&& other) noexcept : owner_(other.owner_), executor_(std::move(other.executor_)) {}
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    Executor& operator*() const { return *executor_; }
    Executor* operator->() const { return executor_.get(); }

   private:
    friend class Executors;
    Lease(Executors& owner, std::unique_ptr<Executor> executor) : owner_(&owner), executor_(std::move(executor)) {}

    Executors* owner_;
    std::unique_ptr<Executor> executor_;
    int exceptions_ = std::uncaught_exceptions();
  };

  /// `preferred`, which has the recorded steps of its last caller, or another idle one, or a new one. Throws
  /// OutOfMemory.
  Lease lease(const Executor* preferred = nullptr);

  /// While one of these lives, executors keep their scratch memory between calls. Without any, the model holds what a
  /// fresh one holds.
  class Use {
   public:
    explicit Use(Executors& executors);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Executors& executors_;
  };

 private:
  static constexpr std::size_t kMaxIdle = 8;

  void give_back(std::unique_ptr<Executor> executor) noexcept;
  void trim_idle() noexcept;

  const backend::Backend* device_;  // of the first executor, which always stays
  std::vector<std::unique_ptr<Executor>> idle_;
  int num_uses_ = 0;
};

}  // namespace based
