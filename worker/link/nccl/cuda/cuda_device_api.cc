#include "worker/link/nccl/cuda/cuda_device_api.h"

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_status.h"

namespace stagecoach {
namespace {

cudaStream_t ToStream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t ToEvent(void* event) { return static_cast<cudaEvent_t>(event); }

class CudaDeviceApi : public DeviceApi {
 public:
  absl::Status Use(int device) override {
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaSetDevice(device));
    return absl::OkStatus();
  }
  // A higher priority than the stage's own work: a payload on its way holds up two stages.
  absl::StatusOr<void*> NewStream() override {
    int least = 0, greatest = 0;
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    cudaStream_t stream = nullptr;
    STAGECOACH_RETURN_IF_CUDA_ERROR(
        cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
    return stream;
  }
  absl::StatusOr<void*> NewEvent() override {
    cudaEvent_t event = nullptr;
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  absl::StatusOr<float*> NewBuffer(size_t floats) override {
    float* data = nullptr;
    STAGECOACH_RETURN_IF_CUDA_ERROR(
        cudaMalloc(reinterpret_cast<void**>(&data), floats * sizeof(float)));
    return data;
  }
  void FreeStream(void* stream) override { cudaStreamDestroy(ToStream(stream)); }
  void FreeEvent(void* event) override { cudaEventDestroy(ToEvent(event)); }
  void FreeBuffer(float* data) override { cudaFree(data); }
  absl::Status Copy(float* to, const float* from, size_t floats, void* stream) override {
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(to, from, floats * sizeof(float),
                                                    cudaMemcpyDeviceToDevice, ToStream(stream)));
    return absl::OkStatus();
  }
  absl::Status Record(void* event, void* stream) override {
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(ToEvent(event), ToStream(stream)));
    return absl::OkStatus();
  }
  absl::Status Await(void* stream, void* event) override {
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamWaitEvent(ToStream(stream), ToEvent(event)));
    return absl::OkStatus();
  }
  absl::StatusOr<bool> Reached(void* event) override {
    const cudaError_t error = cudaEventQuery(ToEvent(event));
    if (error == cudaErrorNotReady) return false;
    STAGECOACH_RETURN_IF_CUDA_ERROR(error);
    return true;
  }
};

}  // namespace

std::shared_ptr<DeviceApi> MakeCudaDeviceApi() { return std::make_shared<CudaDeviceApi>(); }

}  // namespace stagecoach
