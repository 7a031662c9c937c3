// How attention with tensor cores merges chunks in shared memory: a block's own, or those of all
// blocks of a cluster.
//
// A cluster deals out the dims: each of its blocks gets its share of everybody's values, and all
// maxima and sums, before it merges them. So a block reads nobody else's memory, and may be gone
// when others still merge.
#ifndef STAGECOACH_KERNELS_CUDA_ATTENTION_MERGE_CUH_
#define STAGECOACH_KERNELS_CUDA_ATTENTION_MERGE_CUH_

#include <cstddef>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/query_tile.cuh"

namespace stagecoach::cuda {

// In a block's shared memory: partial results as MergeChunks takes them,
//   [query][chunk]{ values [kDims / blocks], maximum, sum }
template <int kDims>
struct SharedPartials {
  float* memory;    // 8-byte aligned
  unsigned blocks;  // that share the dims, a power of two; of block i: those from i * length() on
  int chunks;       // that there is room for

  static constexpr size_t Bytes(int queries, int blocks, int chunks) {
    return sizeof(float) * queries * chunks * (kDims / blocks + 2);
  }
  // Divisions by what the compiler does not know take long.
  __device__ int length() const {
    return blocks == 1 ? kDims : blocks == 2 ? kDims / 2 : blocks == 4 ? kDims / 4 : kDims / 8;
  }
  __device__ float* At(int query, int chunk) const {
    return memory + (query * chunks + chunk) * (length() + 2);
  }
  // Dims d and d + 1 of a query, d even, or its maximum and sum (d = kDims), to whom they concern:
  // in this block, which is alone,
  __device__ void StoreHere(int query, int chunk, int d, float2 pair) const {
    *reinterpret_cast<float2*>(At(query, chunk) + d) = pair;
  }
  // or in the cluster, all of whose blocks have started.
  __device__ void StoreInBlocks(int query, int chunk, int d, float2 pair) const {
    const float* const place = At(query, chunk);
    if (d == kDims) {
      for (unsigned block = 0; block < blocks; ++block) {
        StoreInCluster(AddressInCluster(place + length(), block), pair);
      }
    } else {
      const unsigned block = d * blocks / kDims;
      StoreInCluster(AddressInCluster(place + d - block * length(), block), pair);
    }
  }
};

// Merges this block's share of the dims of the tile's queries, by all its kThreads threads. chunks:
// that each of the queries sees, 0 if it is none.
template <int kThreads, int kDims>
__device__ void MergeQueries(const AttentionTask& task, const QueryTile& tile, const int* chunks,
                             const SharedPartials<kDims>& partials) {
  const int length = partials.length(), values = tile.rows * tile.heads * length;
  const int first_dim = blockIdx.x * length;
  for (int i = threadIdx.x; i < values; i += kThreads) {
    const int query = i * partials.blocks / kDims, d = i - query * length;
    if (chunks[query] == 0) continue;
    tile.Out(query, task, kDims)
        .Store(first_dim + d, MergeChunks(partials.At(query, 0), chunks[query], length, d));
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ATTENTION_MERGE_CUH_
