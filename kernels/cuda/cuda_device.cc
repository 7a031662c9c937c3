#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <cstdint>

#include "fmt/format.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device_check.h"
#include "model/checked_math.h"
#include "model/direct_file.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

// Left to the driver, to graphs and to the fragmentation of the memory pool.
constexpr uint64_t kReserveBytes = uint64_t{512} << 20;

DriverState ReadDriverState() {
  DriverState state;
  state.error = cudaGetDeviceCount(&state.gpus);
  cudaDriverGetVersion(&state.driver);
  cudaRuntimeGetVersion(&state.runtime);
  return state;
}

// Pages of the system, huge ones if it has them, pinned where they are: much sooner there than what
// the driver allocates. nullptr if they are refused.
std::shared_ptr<HostMemory> PinPages(size_t bytes, int device) {
  std::shared_ptr<HostMemory> pages = NewPageMemory(bytes);
  if (pages == nullptr) return nullptr;
  std::byte* const data = pages->data();
  const size_t size = pages->size();
  if (cudaHostRegister(data, size, cudaHostRegisterDefault) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return std::make_shared<HostMemory>(data, size, /*direct=*/true,
                                      [pages = std::move(pages), device] {
                                        cudaSetDevice(device);  // whichever thread comes last
                                        cudaHostUnregister(pages->data());
                                      });
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Open(int index) {
  STAGECOACH_RETURN_IF_ERROR(CheckDriver(ReadDriverState(), index));
  std::unique_ptr<CudaDevice> device(new CudaDevice);
  STAGECOACH_RETURN_IF_ERROR(device->Init(index));
  return device;
}

absl::Status CudaDevice::Init(int index) {
  index_ = index;
  STAGECOACH_RETURN_IF_ERROR(MakeCurrent());
  cudaDeviceProp properties;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, index));
  name_ = properties.name;
  for (const char byte : properties.uuid.bytes) {
    uuid_ += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  }
  traits_.multiprocessors = properties.multiProcessorCount;
  major_ = properties.major;
  const bool has_kernels = ProbeKernels(&traits_.kernels) == cudaSuccess;
  cudaGetLastError();
  STAGECOACH_RETURN_IF_ERROR(CheckGpu({.name = name_,
                                       .major = properties.major,
                                       .minor = properties.minor,
                                       .shared_bytes = properties.sharedMemPerBlockOptin,
                                       .has_kernels = has_kernels,
                                       .kernels = traits_.kernels},
                                      index, STAGECOACH_CUDA_ARCHITECTURES));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&compute_, cudaStreamNonBlocking));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&copy_, cudaStreamNonBlocking));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&inputs_, cudaStreamNonBlocking));
  int least = 0, greatest = 0;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      cudaStreamCreateWithPriority(&pack_, cudaStreamNonBlocking, greatest));
  // Freed memory stays with the process: giving it back would stall streaming weights.
  cudaMemPool_t pool = nullptr;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaDeviceGetDefaultMemPool(&pool, index));
  uint64_t keep = UINT64_MAX;
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  size_t free_bytes = 0, total_bytes = 0;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  memory_bytes_ = free_bytes - std::min<uint64_t>(free_bytes, kReserveBytes);
  return absl::OkStatus();
}

CudaDevice::~CudaDevice() {
  if (!MakeCurrent().ok()) return;
  for (const cudaStream_t stream : {copy_, inputs_, pack_, compute_}) {
    if (stream == nullptr) continue;
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
}

absl::Status CudaDevice::MakeCurrent() const {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaSetDevice(index_));
  return absl::OkStatus();
}

absl::StatusOr<Event> CudaDevice::NewEvent() const {
  cudaEvent_t event = nullptr;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Event(event);
}

absl::StatusOr<Event> CudaDevice::NewTimedEvent() const {
  cudaEvent_t event = nullptr;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventCreate(&event));
  return Event(event);
}

absl::StatusOr<std::shared_ptr<HostMemory>> CudaDevice::NewPinnedMemory(size_t bytes) const {
  if (bytes > SIZE_MAX / 2) return absl::ResourceExhaustedError("size of pinned memory overflows");
  if (auto pages = PinPages(bytes, index_)) return pages;
  const size_t size =
      (std::max<size_t>(bytes, 1) + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
  // The driver promises no alignment.
  STAGECOACH_ASSIGN_OR_RETURN(void* const data, AllocatePinned(size + kDirectAlignment, 1));
  std::byte* const begin = static_cast<std::byte*>(data);
  const size_t before = -reinterpret_cast<uintptr_t>(begin) % kDirectAlignment;
  return std::make_shared<HostMemory>(begin + before, size, /*direct=*/true,
                                      [data, index = index_] {
                                        cudaSetDevice(index);  // whichever thread comes last
                                        cudaFreeHost(data);
                                      });
}

absl::StatusOr<void*> CudaDevice::Allocate(size_t count, size_t element,
                                           cudaStream_t stream) const {
  const std::optional<uint64_t> bytes = CheckedMul(count, element);
  if (!bytes) return absl::ResourceExhaustedError("size of a device buffer overflows");
  void* data = nullptr;
  const cudaError_t error = cudaMallocAsync(&data, std::max<size_t>(*bytes, 1), stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(fmt::format("no {} bytes left on cuda:{}", *bytes, index_));
  }
  STAGECOACH_RETURN_IF_CUDA_ERROR(error);
  return data;
}

absl::StatusOr<void*> CudaDevice::AllocatePinned(size_t count, size_t element) const {
  const std::optional<uint64_t> bytes = CheckedMul(count, element);
  if (!bytes) return absl::ResourceExhaustedError("size of a pinned buffer overflows");
  void* data = nullptr;
  const cudaError_t error = cudaMallocHost(&data, std::max<size_t>(*bytes, 1));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(fmt::format("no {} bytes of pinned host memory", *bytes));
  }
  STAGECOACH_RETURN_IF_CUDA_ERROR(error);
  return data;
}

}  // namespace stagecoach::cuda
