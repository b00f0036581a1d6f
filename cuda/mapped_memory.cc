#include "mapped_memory.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>

#include "based/error.h"
#include "cuda_error.h"
#include "stream.h"

namespace based::cuda {

namespace {

// The driver's functions, asked of the runtime: the library must load where there is no driver.
struct Driver {
  PFN_cuMemGetAllocationGranularity_v10020 granularity;
  PFN_cuMemAddressReserve_v10020 reserve;
  PFN_cuMemAddressFree_v10020 free;
  PFN_cuMemCreate_v10020 create;
  PFN_cuMemRelease_v10020 release;
  PFN_cuMemMap_v10020 map;
  PFN_cuMemUnmap_v10020 unmap;
  PFN_cuMemSetAccess_v10020 set_access;

  Driver() {
    find("cuMemGetAllocationGranularity", granularity);
    find("cuMemAddressReserve", reserve);
    find("cuMemAddressFree", free);
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemMap", map);
    find("cuMemUnmap", unmap);
    find("cuMemSetAccess", set_access);
  }

 private:
  template <typename Function>
  static void find(const char* name, Function& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion(name, &found, 10020, cudaEnableDefault, &result), name);
    if (result != cudaDriverEntryPointSuccess)
      throw UnsupportedError("the CUDA driver lacks " + std::string(name) +
                             ", which long states need: install a driver "
                             "of CUDA 12 or later");
    function = reinterpret_cast<Function>(found);
  }
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

// The codes of the driver are those of the runtime.
cudaError_t status_of(CUresult result) { return static_cast<cudaError_t>(result); }

CUmemAllocationProp properties_of(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return properties;
}

CUdeviceptr address_of(const std::byte* data) {
  return static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(data));
}

}  // namespace

std::size_t AddressRange::granularity(int device) {
  const UseDevice use(device);
  int supported = 0;  // of an attribute that the runtime's enumeration does not name, but passes on
  check(cudaDeviceGetAttribute(
            &supported, static_cast<cudaDeviceAttr>(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED), device),
        "asking whether a device maps memory");
  if (supported == 0)
    throw UnsupportedError("cuda:" + std::to_string(device) +
                           " cannot map memory when it is used, which states with "
                           "a long window need: run this model on another device");
  const CUmemAllocationProp properties = properties_of(device);
  std::size_t nbytes = 0;
  check(status_of(driver().granularity(&nbytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)), "granularity");
  return nbytes;
}

AddressRange::AddressRange(int device, std::size_t nbytes) : device_(device), nbytes_(nbytes) {
  const UseDevice use(device);
  CUdeviceptr data = 0;
  const cudaError_t status = status_of(driver().reserve(&data, nbytes, 0, 0, 0));
  if (status == cudaErrorMemoryAllocation || status == cudaErrorInvalidValue)
    throw OutOfMemory("out of memory on cuda:" + std::to_string(device) + ": there are no " + std::to_string(nbytes) +
                      " bytes of addresses for the states; take fewer sequences or a shorter window");
  check(status, "reserving addresses");
  data_ = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(data));
}

AddressRange::~AddressRange() {
  keep_failure(status_of(driver().free(address_of(data_), nbytes_)), "freeing addresses");
}

std::shared_ptr<void> AddressRange::map(std::size_t offset, std::size_t nbytes) {
  constexpr const char* kDoing = "mapping memory";
  const UseDevice use(device_);
  const std::lock_guard lock(recording_mutex());
  const CUmemAllocationProp properties = properties_of(device_);
  CUmemGenericAllocationHandle memory{};
  cudaError_t status = status_of(driver().create(&memory, nbytes, &properties, 0));
  if (status == cudaErrorMemoryAllocation) {
    return_unused(device_, kDoing);
    status = status_of(driver().create(&memory, nbytes, &properties, 0));
  }
  if (status == cudaErrorMemoryAllocation) throw_out_of_memory(device_, nbytes);
  check(status, kDoing);

  const CUdeviceptr address = address_of(data_) + offset;
  status = status_of(driver().map(address, nbytes, 0, memory, 0));
  keep_failure(status_of(driver().release(memory)), kDoing);  // the mapping keeps the memory
  check(status, kDoing);
  std::shared_ptr<void> mapped(data_ + offset, [range = shared_from_this(), nbytes](void* data) {
    const std::lock_guard unmapping(recording_mutex());
    keep_failure(status_of(driver().unmap(address_of(static_cast<std::byte*>(data)), nbytes)), "unmapping memory");
  });
  const CUmemAccessDesc access{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  check(status_of(driver().set_access(address, nbytes, &access, 1)), kDoing);
  return mapped;
}

}  // namespace based::cuda
