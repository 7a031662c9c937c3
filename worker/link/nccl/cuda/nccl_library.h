// The NCCL library of this machine, loaded at run time: nothing is linked against it.
#ifndef STAGECOACH_WORKER_LINK_NCCL_CUDA_NCCL_LIBRARY_H_
#define STAGECOACH_WORKER_LINK_NCCL_CUDA_NCCL_LIBRARY_H_

#include <memory>

#include "absl/status/statusor.h"
#include "worker/link/nccl/nccl_api.h"

namespace stagecoach {

// Stays loaded. Sets NCCL_NVLS_ENABLE=0 in this process's environment if it is not set: call it
// before threads that read the environment. Errors: UNAVAILABLE if it is not found or lacks a
// function; FAILED_PRECONDITION if it is too old.
absl::StatusOr<std::shared_ptr<NcclApi>> LoadNcclLibrary();

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_CUDA_NCCL_LIBRARY_H_
