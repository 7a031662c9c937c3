// Where a warp of attention with tensor cores reads the keys and values of a chunk: in the KV
// cache, or in shared memory, where it has staged them.
//
// Both are read in vectors of 8 halves. Of one head of a KV block there are keys [kDims / 8][32
// positions], 8 dims each, and values [kDims][4], 8 positions each. With g = lane / 4 and t = lane
// % 4, a lane reads keys of dims t of 4 and values of dim g of 8 at once.
#ifndef STAGECOACH_KERNELS_CUDA_KV_CHUNK_CUH_
#define STAGECOACH_KERNELS_CUDA_KV_CHUNK_CUH_

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {

inline constexpr int kTilesOfChunk = kTensorChunkPositions / kKvBlockPositions;

// Vectors of keys, and as many of values.
template <int kDims>
inline constexpr int kKeyVectors = kDims / 8 * kKvBlockPositions;

// In the KV cache. Tiles: the head's part of each KV block.
template <int kDims>
struct CachedChunk {
  const uint4* tiles[kTilesOfChunk];

  __device__ uint4 Key(int tile, int vector, int position) const {
    return tiles[tile][vector * kKvBlockPositions + position];
  }
  __device__ uint4 Value(int tile, int dim, int vector) const {
    return tiles[tile][kKeyVectors<kDims> + dim * 4 + vector];
  }
};

// In shared memory, 16-byte aligned. Positions of keys are turned around so that lanes that read
// vectors of different dims at once find them in different banks.
template <int kDims>
struct StagedChunk {
  static constexpr int kTileVectors = 2 * kKeyVectors<kDims>;
  static constexpr int kBytes = kTilesOfChunk * kTileVectors * static_cast<int>(sizeof(uint4));
  uint4* memory;

  __device__ static int KeyPlace(int vector, int position) {
    return vector * kKvBlockPositions + (position ^ vector % 4 * 2);
  }
  __device__ uint4 Key(int tile, int vector, int position) const {
    return memory[tile * kTileVectors + KeyPlace(vector, position)];
  }
  __device__ uint4 Value(int tile, int dim, int vector) const {
    return memory[tile * kTileVectors + kKeyVectors<kDims> + dim * 4 + vector];
  }

  // The first `tiles` of the chunk, and zeros for the rest, by all lanes of a warp. There when all
  // of them have called AwaitCopies, and met.
  __device__ void Fetch(const CachedChunk<kDims>& chunk, int tiles) const {
    static_assert(kKvBlockPositions == kWarpLanes);
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int tile = 0; tile < kTilesOfChunk; ++tile) {
      uint4* const own = memory + tile * kTileVectors;
#pragma unroll
      for (int i = 0; i < kDims / 8; ++i) {
        CopyVector(own + KeyPlace(i, lane), chunk.tiles[tile] + i * kWarpLanes + lane,
                   tile < tiles);
      }
#pragma unroll
      for (int i = 0; i < kDims / 8; ++i) {
        const int place = kKeyVectors<kDims> + i * kWarpLanes + lane;
        CopyVector(own + place, chunk.tiles[tile] + place, tile < tiles);
      }
    }
  }
  // Where in a tile dims 2i and 2i + 1 of the key of a position lie, and dim d of its value.
  __device__ static __half2* KeyPair(uint4* tile, int i, int position) {
    return reinterpret_cast<__half2*>(tile + KeyPlace(i / 4, position)) + i % 4;
  }
  __device__ static uint16_t* ValueOf(uint4* tile, int d, int position) {
    return reinterpret_cast<uint16_t*>(tile + kKeyVectors<kDims>) + d * kKvBlockPositions +
           position;
  }
};

// Warps of a block that is alone on its multiprocessor that stage their chunks, as there is room
// for: all that have one up to 256 positions in a block, 2048 in a cluster of eight.
inline constexpr int kStagedWarps = 4;

template <int kDims>
__host__ __device__ constexpr size_t StagedBytes(bool alone) {
  return alone ? size_t{kStagedWarps} * StagedChunk<kDims>::kBytes : 0;
}

// Where the row's own key and value are staged: in this tile, if in any.
template <int kDims>
struct StagedHead {
  static constexpr bool kStaged = true;
  uint4* tile;

  __device__ void StoreKey(int i, int position, float2 pair) const {
    if (tile == nullptr) return;
    *StagedChunk<kDims>::KeyPair(tile, i, position) = __floats2half2_rn(pair.x, pair.y);
  }
  __device__ void StoreValue(int d, int position, uint16_t value) const {
    if (tile == nullptr) return;
    *StagedChunk<kDims>::ValueOf(tile, d, position) = value;
  }
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_KV_CHUNK_CUH_
