#include "model/executor.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "based/error.h"

namespace based {

namespace {

// Guards every model's idle executors. A fork waits for it: the child would find a mutex that another thread of the
// parent held locked for ever.
std::mutex idle_mutex;
const int fork_handlers_error =
    pthread_atfork([] { idle_mutex.lock(); }, [] { idle_mutex.unlock(); }, [] { idle_mutex.unlock(); });

}  // namespace

Executors::Executors(std::unique_ptr<backend::Backend> first) : device_(first.get()) {
  if (fork_handlers_error != 0) throw IoError(fork_handlers_error, "registering handlers of forks");
  idle_.reserve(kMaxIdle + 1);  // giving back does not allocate
  idle_.push_back(std::make_unique<Executor>(std::move(first)));
}

Executors::Lease Executors::lease(const Executor* preferred) {
  {
    const std::lock_guard lock(idle_mutex);
    if (!idle_.empty()) {
      auto entry = std::ranges::find(idle_, preferred, [](const auto& executor) { return executor.get(); });
      if (entry == idle_.end()) entry = std::prev(idle_.end());
      std::unique_ptr<Executor> executor = std::move(*entry);
      idle_.erase(entry);
      return {*this, std::move(executor)};
    }
  }
  return {*this, std::make_unique<Executor>(device_->sibling())};
}

// A caller that fails may leave work under way: the next one must not run beside it.
Executors::Lease::~Lease() {
  if (!executor_) return;
  if (std::uncaught_exceptions() > exceptions_) {
    try {
      executor_->backend().synchronize();
    } catch (...) {  // the device has failed: the next call says so
    }
  }
  owner_->give_back(std::move(executor_));
}

void Executors::give_back(std::unique_ptr<Executor> executor) noexcept {
  std::unique_ptr<Executor> surplus;  // destroyed outside of the lock
  const std::lock_guard lock(idle_mutex);
  if (num_uses_ == 0) executor->trim();
  const bool keeps = idle_.size() < kMaxIdle || &executor->backend() == device_;
  keeps ? idle_.push_back(std::move(executor)) : surplus.swap(executor);
}

void Executors::trim_idle() noexcept {
  const std::lock_guard lock(idle_mutex);
  if (--num_uses_ > 0) return;
  std::erase_if(idle_, [&](const auto& executor) { return &executor->backend() != device_; });
  for (const auto& executor : idle_) executor->trim();
}

Executors::Use::Use(Executors& executors) : executors_(executors) {
  const std::lock_guard lock(idle_mutex);
  ++executors_.num_uses_;
}

Executors::Use::~Use() { executors_.trim_idle(); }

}  // namespace based
