#include "stream.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "based/error.h"
#include "cuda_error.h"

namespace based::cuda {

namespace {

// One pool per device for the whole process, never destroyed: the driver may be gone before static objects are. Memory
// stays in it between uses, and goes back to the device when an allocation fails and by MemoryReturn.
cudaMemPool_t pool_of(int device) {
  static auto& pools = *new std::map<int, cudaMemPool_t>;
  const std::lock_guard lock(recording_mutex());
  const auto [entry, fresh] = pools.try_emplace(device, nullptr);
  if (!fresh) return entry->second;
  try {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device};
    check(cudaMemPoolCreate(&entry->second, &properties), "creating a memory pool");
    std::uint64_t keep = ~std::uint64_t{0};
    check(cudaMemPoolSetAttribute(entry->second, cudaMemPoolAttrReleaseThreshold, &keep), "creating a memory pool");
  } catch (...) {
    pools.erase(entry);
    throw;
  }
  return entry->second;
}

// One allocation, from allocate() on. When its owner lets go it is listed in `waiting`, in memory that is there
// already, until it can be freed.
struct Allocation {
  std::shared_ptr<const Stream> stream;
  void* data = nullptr;
  bool captured = false;  // the stream was being captured
  Allocation* next = nullptr;
};

Allocation* waiting = nullptr;  // guarded by recording_mutex()

// Whether it is done with: freed, or failed.
bool try_free(const Allocation& allocation) noexcept {
  constexpr const char* kDoing = "freeing device memory";
  const cudaStream_t stream = allocation.stream->get();
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaError_t status = cudaStreamIsCapturing(stream, &capturing);
  if (status == cudaErrorStreamCaptureImplicit) {  // the legacy stream, while another one is captured
    cudaGetLastError();
    return false;
  }
  if (status == cudaSuccess) {
    if (capturing != cudaStreamCaptureStatusNone && !allocation.captured) return false;
    // Memory of a capture that failed goes with its graph.
    if (capturing != cudaStreamCaptureStatusInvalidated) status = cudaFreeAsync(allocation.data, stream);
  }
  if (status == cudaErrorInvalidValue && allocation.captured) {  // of a graph that never ran: it never had the memory
    cudaGetLastError();
    return true;
  }
  keep_failure(status, kDoing);
  return true;
}

void release(Allocation* allocation) noexcept {
  const std::lock_guard lock(recording_mutex());
  allocation->next = std::exchange(waiting, allocation);
  free_waiting();
}

void free_lent();

}  // namespace

void free_waiting() noexcept {
  const std::lock_guard lock(recording_mutex());
  // Ending a stream comes back here by none of its ways, so the list is ours alone.
  for (Allocation** at = &waiting; *at != nullptr;) {
    Allocation* const allocation = *at;
    bool done = true;
    try {
      const UseDevice use(allocation->stream->device());  // which the legacy stream belongs to
      done = try_free(*allocation);
    } catch (const std::exception&) {
      keep_failure(cudaErrorInvalidDevice, "freeing device memory");
    }
    if (done) {
      *at = allocation->next;
      delete allocation;
    } else {
      at = &allocation->next;
    }
  }
}

UseDevice::UseDevice(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}

UseDevice::~UseDevice() {
  if (changed_) keep_failure(cudaSetDevice(previous_), "going back to a thread's device");
}

Stream::Stream(int device) : device_(device) {
  const UseDevice use(device);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
}

Stream::~Stream() {
  const std::lock_guard lock(recording_mutex());
  if (owned_) keep_failure(cudaStreamDestroy(stream_), "ending a stream");
}

std::shared_ptr<void> Stream::allocate(std::size_t nbytes) {
  report_failures();
  const UseDevice use(device_);
  free_lent();
  free_waiting();
  const cudaMemPool_t pool = pool_of(device_);
  auto allocation = std::make_unique<Allocation>(shared_from_this());
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (!owned_) check(cudaStreamIsCapturing(stream_, &capturing), "allocate");
  allocation->captured = capturing != cudaStreamCaptureStatusNone;
  const std::size_t size = std::max<std::size_t>(nbytes, 1);
  void* data = nullptr;
  cudaError_t status = cudaMallocFromPoolAsync(&data, size, pool, stream_);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return_unused(device_, "allocate");
    status = cudaMallocFromPoolAsync(&data, size, pool, stream_);
  }
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw_out_of_memory(device_, nbytes);
  }
  check(status, "allocate");
  allocation->data = data;
  return {data, [held = allocation.release()](void*) { release(held); }};
}

void Stream::synchronize(const char* doing) const { check(cudaStreamSynchronize(stream_), doing); }

std::recursive_mutex& recording_mutex() {
  static auto& mutex = *new std::recursive_mutex;  // never destroyed: memory may be freed after static objects are
  return mutex;
}

namespace {

// Memory that another library may still use. `event`, on the legacy stream, comes after that use; without one only
// synchronize_device() does.
struct Lent {
  int device = 0;
  std::shared_ptr<void> memory;
  bool on_legacy_stream = false;
  std::unique_ptr<Event> event;
};

struct AllLent {
  std::mutex mutex;
  std::list<Lent> list;
};
AllLent& all_lent() {
  static auto& all = *new AllLent;  // never destroyed: memory may be freed after static objects are
  return all;
}

// Whether the memory may be freed. The caller's device is the memory's.
bool is_done(Lent& lent) {
  if (!lent.on_legacy_stream) return false;
  if (lent.event == nullptr) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(cudaStreamLegacy, &capturing) != cudaSuccess) {  // another stream is captured
      cudaGetLastError();
      return false;
    }
    auto event = std::make_unique<Event>();
    event->record(cudaStreamLegacy, "freeing a tensor's memory");
    lent.event = std::move(event);
  }
  return lent.event->reached("freeing a tensor's memory");
}

void free_lent() {
  std::list<Lent> done;  // freed without the lock
  AllLent& all = all_lent();
  {
    const std::lock_guard lock(all.mutex);
    if (all.list.empty()) return;
    const OutsideCapture outside;
    for (auto it = all.list.begin(); it != all.list.end();) {
      const auto next = std::next(it);
      const UseDevice use(it->device);
      if (is_done(*it)) done.splice(done.end(), all.list, it);
      it = next;
    }
  }
}

}  // namespace

void release_lent(int device, std::shared_ptr<void> memory, bool on_legacy_stream) noexcept {
  try {
    const UseDevice use(device);
    {
      const std::lock_guard lock(all_lent().mutex);
      all_lent().list.push_back({device, std::move(memory), on_legacy_stream, nullptr});
    }
    on_legacy_stream ? free_lent() : synchronize_device("freeing a tensor's memory");
  } catch (const std::exception&) {
    // The memory stays listed (or, where there is no memory for the list, is freed by its owner here).
  }
}

OutsideCapture::OutsideCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "leaving a capture"); }

OutsideCapture::~OutsideCapture() {
  keep_failure(cudaThreadExchangeStreamCaptureMode(&mode_), "going back to a capture");
}

void synchronize_device(const char* doing) {
  int device = 0;
  check(cudaGetDevice(&device), doing);
  std::list<Lent> done;
  {
    const std::lock_guard lock(recording_mutex());
    std::list<Lent> before;  // what is lent from here on may be used after the wait
    {
      const std::lock_guard listing(all_lent().mutex);
      for (auto it = all_lent().list.begin(); it != all_lent().list.end();) {
        const auto next = std::next(it);
        if (it->device == device) before.splice(before.end(), all_lent().list, it);
        it = next;
      }
    }
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) {
      const std::lock_guard listing(all_lent().mutex);
      all_lent().list.splice(all_lent().list.end(), before);
    }
    check(status, doing);
    done.swap(before);
  }
}

void return_unused(int device, const char* doing) {
  const std::lock_guard lock(recording_mutex());
  synchronize_device(doing);
  check(cudaMemPoolTrimTo(pool_of(device), 0), doing);
}

DeviceMemory device_memory() {
  DeviceMemory memory;
  check(cudaMemGetInfo(&memory.free, &memory.total), "asking for free memory");
  return memory;
}

void throw_out_of_memory(int device, std::size_t nbytes) {
  const auto [free, total] = device_memory();
  throw OutOfMemory("out of memory on cuda:" + std::to_string(device) + ": " + std::to_string(nbytes) +
                    " bytes are needed, " + std::to_string(free) + " of " + std::to_string(total) + " are free");
}

MemoryReturn::~MemoryReturn() {
  try {
    const std::lock_guard lock(recording_mutex());
    const UseDevice use(device_);
    free_waiting();
    keep_failure(cudaMemPoolTrimTo(pool_of(device_), 0), "returning memory");
  } catch (const std::exception&) {
    keep_failure(cudaErrorInvalidDevice, "returning memory");
  }
}

std::shared_ptr<void> allocate_pinned(std::size_t nbytes) {
  const std::lock_guard lock(recording_mutex());
  void* data = nullptr;
  const cudaError_t status = cudaHostAlloc(&data, std::max<std::size_t>(nbytes, 1), cudaHostAllocPortable);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw OutOfMemory("out of memory: " + std::to_string(nbytes) + " bytes of page-locked host memory are needed");
  }
  check(status, "allocating page-locked memory");
  return {data, [](void* p) {
            const std::lock_guard freeing(recording_mutex());
            keep_failure(cudaFreeHost(p), "freeing page-locked memory");
          }};
}

Event::~Event() {
  if (event_ != nullptr) keep_failure(cudaEventDestroy(event_), "ending an event");
}

void Event::record(cudaStream_t stream, const char* doing) {
  if (event_ == nullptr) check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), doing);
  check(cudaEventRecord(event_, stream), doing);
}

void Event::hold(cudaStream_t stream, const char* doing) const {
  if (event_ != nullptr) check(cudaStreamWaitEvent(stream, event_, 0), doing);
}

bool Event::reached(const char* doing) const {
  if (event_ == nullptr) return true;
  const cudaError_t status = cudaEventQuery(event_);
  if (status == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  check(status, doing);
  return true;
}

void Event::wait(const char* doing) const {
  if (event_ != nullptr) check(cudaEventSynchronize(event_), doing);
}

}  // namespace based::cuda
