#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <utility>
#include <variant>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "backend/cpu/cpu_operands.h"
#include "based/error.h"

namespace based::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

#if defined(__linux__)
constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Pages of zeros, which take memory when they are first written. A mapping of its own goes back to the system when it
// is freed. Huge pages: page faults dominate the time of filling fresh memory, and there are 512 times fewer. `flags`
// of mmap.
std::shared_ptr<void> map_pages(std::size_t nbytes, bool huge, int flags) {
  const std::size_t mapped = nbytes + (huge ? kHugePage : 0);
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  auto address = reinterpret_cast<std::uintptr_t>(base);
  if (huge) address = (address + kHugePage - 1) / kHugePage * kHugePage;
  void* data = reinterpret_cast<void*>(address);
  madvise(data, nbytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // may be refused: then pages are as the system likes
  return {data, [base, mapped](void*) { munmap(base, mapped); }};
}
#endif

std::shared_ptr<void> allocate_heap(std::size_t nbytes) {
  void* data = ::operator new(nbytes == 0 ? 1 : nbytes, std::align_val_t{kAlignment});
  return {data, [](void* p) { ::operator delete(p, std::align_val_t{kAlignment}); }};
}

// What `make` makes of nbytes bytes.
template <typename Make>
std::shared_ptr<void> or_out_of_memory(std::size_t nbytes, Make&& make) {
  try {
    if (nbytes > std::numeric_limits<std::size_t>::max() / 2) throw std::bad_alloc();
    return make();
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("out of memory: " + std::to_string(nbytes) + " bytes are needed");
  }
}

// The widest row of x that linear() is given.
std::int64_t max_in_features(const ModelConfig& config) {
  std::int64_t most = std::max(config.hidden_size, config.mlp ? config.mlp->inner_size : 0);
  for (const MixerConfig& mixer : config.layers)
    for (const Projection& p : mixer_projections(mixer, config.hidden_size)) most = std::max(most, p.cols);
  return most;
}

}  // namespace

CpuBackend::CpuBackend(std::shared_ptr<ThreadPool> pool, Isa isa, std::shared_ptr<backend::MemoryCounters> counters)
    : pool_(std::move(pool)), isa_(isa), counters_(std::move(counters)) {}

std::unique_ptr<backend::Backend> CpuBackend::sibling() const {
  return std::make_unique<CpuBackend>(pool_, isa_, counters_);
}

std::string CpuBackend::kernel_isa() const { return std::string(name_of(isa_)); }

backend::Buffer CpuBackend::allocate(std::size_t nbytes, backend::MemoryKind kind) {
  auto data = or_out_of_memory(nbytes, [&] {
#if defined(__linux__)
    if (nbytes >= 2 * kHugePage) return map_pages(nbytes, true, 0);
#endif
    return allocate_heap(nbytes);
  });
  return backend::counted({std::move(data), nbytes}, counters_, kind);
}

std::shared_ptr<void> CpuBackend::allocate_host(std::size_t nbytes) const {
  return or_out_of_memory(nbytes, [&] { return allocate_heap(nbytes); });
}

backend::Buffer CpuBackend::allocate_states(std::size_t nbytes, bool sparse) {
  auto data = or_out_of_memory(nbytes, [&] {
#if defined(__linux__)
    const bool huge = !sparse && nbytes >= 2 * kHugePage;
    if (nbytes >= kHugePage / 2) return map_pages(nbytes, huge, sparse ? MAP_NORESERVE : 0);
#endif
    auto zeros = allocate_heap(nbytes);
    std::memset(zeros.get(), 0, nbytes);
    return zeros;
  });
  return backend::counted({std::move(data), nbytes}, counters_, backend::MemoryKind::states);
}

// What a long prompt needs beside a large window may be as large as its states: a step gives it back.
constexpr std::size_t kKeptScratch = std::size_t{64} << 20;

std::byte* CpuBackend::scratch(std::size_t nbytes) {
  if (scratch_.nbytes < nbytes) {
    const std::size_t grown = std::max(nbytes, std::min(scratch_.nbytes * 3 / 2, kKeptScratch));
    scratch_ = {};
    scratch_ = allocate(grown, backend::MemoryKind::workspace);
  }
  return static_cast<std::byte*>(scratch_.data.get());
}

void CpuBackend::reserve_step(const ModelConfig& config, std::int64_t num_sequences) {
  const Lengths lengths = Lengths::of_step(num_sequences);
  // Of linear(): rows of float32, an even number of columns. That of embed() is less.
  std::size_t nbytes = static_cast<std::size_t>(num_sequences * round_up(max_in_features(config), 2)) * sizeof(float);
  for (const MixerConfig& mixer : config.layers)
    nbytes = std::max(
        nbytes, std::visit([&](const auto& c) { return scratch_nbytes(c, lengths, isa_, num_threads()); }, mixer));
  if (scratch_.nbytes > kKeptScratch && scratch_.nbytes / 4 > nbytes) scratch_ = {};
  scratch(nbytes);
}

void CpuBackend::zero(void* data, std::size_t nbytes) { std::memset(data, 0, nbytes); }

void CpuBackend::copy(void* to, const void* from, std::size_t nbytes) { std::memcpy(to, from, nbytes); }

void CpuBackend::copy_from_host(void* device, const void* host, std::size_t nbytes) {
  std::memcpy(device, host, nbytes);
}

void CpuBackend::copy_to_host(void* host, const void* device, std::size_t nbytes) { std::memcpy(host, device, nbytes); }

}  // namespace based::cpu
