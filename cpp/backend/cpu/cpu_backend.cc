#include "backend/cpu/cpu_backend.h"

#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "based/error.h"

namespace based::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

#if defined(__linux__)
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Page faults dominate the time of filling fresh memory: 512 times fewer with huge pages. A mapping of its own also
// goes back to the system when it is freed.
std::shared_ptr<void> map_pages(std::size_t nbytes) {
  const std::size_t mapped = nbytes + kHugePage;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(base);
  const std::uintptr_t start = (address + kHugePage - 1) / kHugePage * kHugePage;
  void* data = reinterpret_cast<void*>(start);
  madvise(data, nbytes, MADV_HUGEPAGE);  // may be refused: then small pages
  return {data, [base, mapped](void*) { munmap(base, mapped); }};
}
#endif

std::shared_ptr<void> allocate_host(std::size_t nbytes) {
  try {
    if (nbytes > std::numeric_limits<std::size_t>::max() / 2) throw std::bad_alloc();
#if defined(__linux__)
    if (nbytes >= 2 * kHugePage) return map_pages(nbytes);
#endif
    void* data = ::operator new(nbytes == 0 ? 1 : nbytes, std::align_val_t{kAlignment});
    return {data, [](void* p) { ::operator delete(p, std::align_val_t{kAlignment}); }};
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("out of memory: " + std::to_string(nbytes) + " bytes are needed");
  }
}

}  // namespace

CpuBackend::CpuBackend(std::shared_ptr<ThreadPool> pool, Isa isa, std::shared_ptr<backend::MemoryCounters> counters)
    : pool_(std::move(pool)), isa_(isa), counters_(std::move(counters)) {}

std::unique_ptr<backend::Backend> CpuBackend::sibling() const {
  return std::make_unique<CpuBackend>(pool_, isa_, counters_);
}

std::string CpuBackend::kernel_isa() const { return std::string(name_of(isa_)); }

backend::Buffer CpuBackend::allocate(std::size_t nbytes, backend::MemoryKind kind) {
  return backend::counted({allocate_host(nbytes), nbytes}, counters_, kind);
}

void CpuBackend::zero(void* data, std::size_t nbytes) { std::memset(data, 0, nbytes); }

void CpuBackend::copy(void* to, const void* from, std::size_t nbytes) { std::memcpy(to, from, nbytes); }

void CpuBackend::copy_from_host(void* device, const void* host, std::size_t nbytes) {
  std::memcpy(device, host, nbytes);
}

void CpuBackend::copy_to_host(void* host, const void* device, std::size_t nbytes) { std::memcpy(host, device, nbytes); }

}  // namespace based::cpu
