#include "kernels/cuda/top_logits.h"

#include <algorithm>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRunKeys = 4096;  // that a block sorts
static_assert(kMostTopLogits * 2 <= kRunKeys, "every pass must shrink the list");

constexpr uint32_t kExponent = 0x7f800000u;

int Runs(int size, int run = kRunKeys) { return (size + run - 1) / run; }

// Few rows are sooner done by many blocks, many by fewer that have more to do.
int LargestRun(int rows) { return rows <= 8 ? 1024 : kRunKeys; }

__device__ TopKey MakeKey(float logit, int id) {
  const uint32_t bits = FloatToBits(logit + 0.0f);  // -0 is no less than 0
  uint32_t ordered = bits & kTopKeySign ? ~bits : bits | kTopKeySign;
  if ((bits & kExponent) == kExponent) ordered = 0xffffffffu;
  return static_cast<TopKey>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

// Descending, by a bitonic network; length: a power of two.
__device__ void Sort(TopKey* keys, int length) {
  for (int size = 2; size <= length; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < length / 2; i += kThreads) {
        const int low = i / stride * stride * 2 + i % stride, high = low + stride;
        const bool descending = (low & size) == 0;
        const TopKey a = keys[low], b = keys[high];
        if (descending ? a < b : a > b) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
}

__device__ TopKey KeyAt(const float* logits, int i) { return MakeKey(logits[i], i); }
__device__ TopKey KeyAt(const TopKey* keys, int i) { return keys[i]; }

// As SortRunsKernel with a count of 1, which is what greedy sampling asks for, for runs of `run`.
template <typename From>
__global__ void LargestKernel(const From* from, int size, int run, TopKey* to) {
  __shared__ TopKey warp_largest[kThreads / kWarpLanes];
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y;
  from += row * size;
  const int first = static_cast<int>(blockIdx.x) * run, last = min(first + run, size);
  TopKey largest = 0;
  for (int i = first + threadIdx.x; i < last; i += kThreads) {
    largest = max(largest, KeyAt(from, i));
  }
  largest = WarpMax(largest);
  if (threadIdx.x % kWarpLanes == 0) warp_largest[threadIdx.x / kWarpLanes] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const TopKey key : warp_largest) largest = max(largest, key);
  to[row * gridDim.x + blockIdx.x] = largest;
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
  const int first = blockIdx.x * kRunKeys;
  int length = 1;  // of what is sorted
  while (length < max(count, min(kRunKeys, size - first))) length *= 2;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    keys[i] = first + i < size ? KeyAt(from, first + i) : 0;
  }
  Sort(keys, length);
  to += (row * gridDim.x + blockIdx.x) * count;
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = keys[i];
}

template <typename From>
cudaError_t LaunchLargest(const From* from, int size, int rows, int run, TopKey* to,
                          cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(Runs(size, run), rows), .threads = kThreads};
  return LaunchKernel(LargestKernel<From>, shape, stream, from, size, run, to);
}

template <typename From>
cudaError_t LaunchRuns(const From* from, int size, int rows, int count, TopKey* to,
                       cudaStream_t stream) {
  if (count == 1) return LaunchLargest(from, size, rows, kRunKeys, to, stream);
  const LaunchShape shape = {.grid = dim3(Runs(size), rows), .threads = kThreads};
  return LaunchKernel(SortRunsKernel<From>, shape, stream, from, size, count, to);
}

}  // namespace

size_t TopScratchKeys(int rows, int vocab, int count) {
  return 2 * static_cast<size_t>(rows) * Runs(vocab) * count;
}

int LargestRuns(int vocab, int all_rows) { return Runs(vocab, LargestRun(all_rows)); }

cudaError_t FindLargest(const float* logits, int rows, int all_rows, int vocab, TopKey* keys,
                        cudaStream_t stream) {
  return LaunchLargest(logits, vocab, rows, LargestRun(all_rows), keys, stream);
}

cudaError_t FindTop(const float* logits, int rows, int vocab, int count, TopKey* scratch,
                    TopKey* top, cudaStream_t stream) {
  TopKey* other = scratch + TopScratchKeys(rows, vocab, count) / 2;
  int runs = Runs(vocab);
  TopKey* to = runs == 1 ? top : scratch;
  cudaError_t error = LaunchRuns(logits, vocab, rows, count, to, stream);
  while (error == cudaSuccess && runs > 1) {
    const int size = runs * count;
    runs = Runs(size);
    const TopKey* from = to;
    to = runs == 1 ? top : from == scratch ? other : scratch;
    error = LaunchRuns(from, size, rows, count, to, stream);
  }
  return error;
}

}  // namespace stagecoach::cuda
