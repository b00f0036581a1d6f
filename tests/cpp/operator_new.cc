#include "operator_new.h"

#include <cstddef>
#include <cstdlib>
#include <new>

namespace based::test {
namespace {

std::atomic<bool> counting{false};
std::atomic<int> num_calls{0};

}  // namespace

Shortage shortage;

int count_allocations(const std::function<void()>& f) {
  num_calls = 0;
  counting = true;
  f();
  counting = false;
  return num_calls;
}

void Shortage::arm(long k, long times) {
  spared_ = std::this_thread::get_id();
  left_ = k;
  times_ = times;
  fired_ = false;
  armed_ = true;
}

bool Shortage::refuses() {
  if (!armed_.load(std::memory_order_relaxed) || std::this_thread::get_id() == spared_.load()) return false;
  if (left_.fetch_sub(1) > 0) return false;
  fired_ = true;
  if (times_.fetch_sub(1) <= 1) armed_ = false;
  return true;
}

namespace {

[[maybe_unused]] void* allocate(std::size_t nbytes, std::size_t alignment) {
  if (counting) ++num_calls;
  if (shortage.refuses()) throw std::bad_alloc();
  const std::size_t rounded = (nbytes + alignment - 1) / alignment * alignment;
  if (void* data = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded)) return data;
  throw std::bad_alloc();
}

}  // namespace
}  // namespace based::test

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
void* operator new(std::size_t nbytes) { return based::test::allocate(nbytes, alignof(std::max_align_t)); }
void* operator new(std::size_t nbytes, std::align_val_t alignment) {
  return based::test::allocate(nbytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }
#endif
