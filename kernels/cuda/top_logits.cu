#include "kernels/cuda/top_logits.h"

#include <algorithm>
#include <limits>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "model/half.h"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRunKeys = 4096;  // that a block sorts
static_assert(kMostTopLogits * 2 <= kRunKeys, "every pass must shrink the list");

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kExponent = 0x7f800000u;

int Runs(int size) { return (size + kRunKeys - 1) / kRunKeys; }

__device__ TopKey MakeKey(float logit, int id) {
  const uint32_t bits = FloatToBits(logit + 0.0f);  // -0 is no less than 0
  uint32_t ordered = bits & kSign ? ~bits : bits | kSign;
  if ((bits & kExponent) == kExponent) ordered = 0xffffffffu;
  return static_cast<TopKey>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

// Descending, by a bitonic network.
__device__ void Sort(TopKey* keys) {
  for (int size = 2; size <= kRunKeys; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < kRunKeys / 2; i += kThreads) {
        const int low = i / stride * stride * 2 + i % stride, high = low + stride;
        const bool descending = (low & size) == 0;
        const TopKey a = keys[low], b = keys[high];
        if (descending ? a < b : a > b) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
}

// Grid: x = runs of kRunKeys of a row, y = rows. from: [rows][size] logits or keys; to:
// [rows][runs][count], the best of each run.
template <typename From>
__global__ void SortRunsKernel(const From* from, int size, int count, TopKey* to) {
  __shared__ TopKey keys[kRunKeys];
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y;
  from += row * size;
  for (int i = threadIdx.x; i < kRunKeys; i += kThreads) {
    const int j = blockIdx.x * kRunKeys + i;
    if constexpr (sizeof(From) == sizeof(TopKey)) {
      keys[i] = j < size ? from[j] : 0;
    } else {
      keys[i] = j < size ? MakeKey(from[j], j) : 0;
    }
  }
  Sort(keys);
  to += (row * gridDim.x + blockIdx.x) * count;
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = keys[i];
}

}  // namespace

TopLogit FromTopKey(TopKey key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const auto id = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
  if (ordered == 0xffffffffu) return {std::numeric_limits<float>::quiet_NaN(), id};
  return {FloatFromBits(ordered & kSign ? ordered & ~kSign : ~ordered), id};
}

size_t TopScratchKeys(int rows, int vocab, int count) {
  return 2 * static_cast<size_t>(rows) * Runs(vocab) * count;
}

cudaError_t FindTop(const float* logits, int rows, int vocab, int count, TopKey* scratch,
                    TopKey* top, cudaStream_t stream) {
  TopKey* other = scratch + TopScratchKeys(rows, vocab, count) / 2;
  int runs = Runs(vocab);
  TopKey* to = runs == 1 ? top : scratch;
  cudaError_t error = LaunchKernel(SortRunsKernel<float>,
                                   LaunchShape{.grid = dim3(runs, rows), .threads = kThreads},
                                   stream, logits, vocab, count, to);
  while (error == cudaSuccess && runs > 1) {
    const int size = runs * count;
    runs = Runs(size);
    const TopKey* from = to;
    to = runs == 1 ? top : from == scratch ? other : scratch;
    error = LaunchKernel(SortRunsKernel<TopKey>,
                         LaunchShape{.grid = dim3(runs, rows), .threads = kThreads}, stream, from,
                         size, count, to);
  }
  return error;
}

}  // namespace stagecoach::cuda
