#pragma once

// What asks for memory by operator new can be counted, and refused. Not with a sanitizer, which has an operator new of
// its own.

#include <atomic>
#include <functional>
#include <thread>

namespace based::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kReplacesNew = false;
#else
inline constexpr bool kReplacesNew = true;
#endif

/// How often f calls operator new, in any thread.
int count_allocations(const std::function<void()>& f);

/// Calls of operator new that throw std::bad_alloc, in all threads but the one that arms it.
class Shortage {
 public:
  /// The call after the next k fails, and `times` in all.
  void arm(long k, long times);
  void disarm() { armed_ = false; }
  bool fired() const { return fired_; }

  bool refuses();  // for operator new

 private:
  std::atomic<bool> armed_ = false, fired_ = false;
  std::atomic<long> left_ = 0, times_ = 0;
  std::atomic<std::thread::id> spared_;
};

extern Shortage shortage;

}  // namespace based::test
