#include "backend/backend.h"

#include "based/error.h"

namespace based::backend {

namespace {

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

Identified::Identified() : id_(next_id()) {}

void Backend::throw_unsupported(const std::string& where, std::string_view mixer) const {
  throw UnsupportedError(where + "the mixer " + std::string(mixer) + " is not implemented on " + device().str() +
                         ": run the model on another device");
}

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
