#include "backend/backend.h"

namespace based::backend {

namespace {

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

Identified::Identified() : id_(next_id()) {}

Buffer counted(Buffer buffer, std::shared_ptr<MemoryCounters> counters, MemoryKind kind) {
  auto& count = counters->nbytes[static_cast<std::size_t>(kind)];
  const std::size_t nbytes = buffer.nbytes;
  void* data = buffer.data.get();
  count += nbytes;
  const auto discount = [inner = std::move(buffer.data), counters = std::move(counters), &count,
                         nbytes](void*) mutable {
    inner.reset();
    count -= nbytes;
  };
  return {std::shared_ptr<void>(data, discount), nbytes};
}

}  // namespace based::backend
