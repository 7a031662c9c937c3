// DeviceApi over the CUDA runtime.
#ifndef STAGECOACH_WORKER_LINK_NCCL_CUDA_CUDA_DEVICE_API_H_
#define STAGECOACH_WORKER_LINK_NCCL_CUDA_CUDA_DEVICE_API_H_

#include <memory>

#include "worker/link/nccl/nccl_api.h"

namespace stagecoach {

std::shared_ptr<DeviceApi> MakeCudaDeviceApi();

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_CUDA_CUDA_DEVICE_API_H_
