#include "stream.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>

#include "based/error.h"
#include "cuda_error.h"

namespace based::cuda {

namespace {

// One pool per device for the whole process, never destroyed: the driver may be gone before static objects are. Memory
// stays in it between uses, and goes back to the device in trim_memory().
cudaMemPool_t pool_of(int device) {
  static std::mutex mutex;
  static auto& pools = *new std::map<int, cudaMemPool_t>;
  const std::lock_guard lock(mutex);
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

}  // namespace

UseDevice::UseDevice(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  changed_ = true;
}

UseDevice::~UseDevice() {
  if (changed_) cudaSetDevice(previous_);
}

Stream::Stream(int device) : device_(device) {
  const UseDevice use(device);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
}

Stream::~Stream() {
  const std::lock_guard lock(recording_mutex());
  if (owned_) cudaStreamDestroy(stream_);
}

std::shared_ptr<void> Stream::allocate(std::size_t nbytes) {
  const UseDevice use(device_);
  const cudaMemPool_t pool = pool_of(device_);
  const std::size_t size = std::max<std::size_t>(nbytes, 1);
  void* data = nullptr;
  cudaError_t status = cudaMallocFromPoolAsync(&data, size, pool, stream_);
  if (status == cudaErrorMemoryAllocation) {
    // What other streams have freed, and what the pool keeps in pieces too small, may do.
    cudaGetLastError();
    synchronize_device("allocate");
    check(cudaMemPoolTrimTo(pool, 0), "allocate");
    status = cudaMallocFromPoolAsync(&data, size, pool, stream_);
  }
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "allocate");
    throw OutOfMemory("out of memory on cuda:" + std::to_string(device_) + ": " + std::to_string(nbytes) +
                      " bytes are needed, " + std::to_string(free) + " of " + std::to_string(total) + " are free");
  }
  check(status, "allocate");
  return {data, [self = shared_from_this()](void* p) { cudaFreeAsync(p, self->stream_); }};
}

void Stream::synchronize(const char* doing) const { check(cudaStreamSynchronize(stream_), doing); }

std::recursive_mutex& recording_mutex() {
  static auto& mutex = *new std::recursive_mutex;  // never destroyed: memory may be freed after static objects are
  return mutex;
}

void synchronize_device(const char* doing) {
  const std::lock_guard lock(recording_mutex());
  check(cudaDeviceSynchronize(), doing);
}

void trim_memory(int device) {
  const std::lock_guard lock(recording_mutex());
  const UseDevice use(device);
  check(cudaMemPoolTrimTo(pool_of(device), 0), "returning memory");
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
            cudaFreeHost(p);
          }};
}

Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

void Event::record(cudaStream_t stream, const char* doing) {
  if (event_ == nullptr) check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), doing);
  check(cudaEventRecord(event_, stream), doing);
}

void Event::wait(const char* doing) const {
  if (event_ != nullptr) check(cudaEventSynchronize(event_), doing);
}

}  // namespace based::cuda
