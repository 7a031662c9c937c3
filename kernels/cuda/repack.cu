// From the file's blocks to tiles (tile_format.cuh). One block of threads per tile.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/tile_format.cuh"
#include "model/block_decode.h"

namespace stagecoach::cuda {
namespace {

constexpr int kRepackThreads = 128;

// A matrix as in the file; beyond its edges everything is zero.
template <typename Block>
struct RawMatrix {
  const Block* blocks;
  int n;
  int k;

  __device__ const Block* Find(int row, int column) const {
    if (row >= n || column >= k) return nullptr;
    return blocks + (static_cast<size_t>(row) * k + column) / Block::kElements;
  }
  // `count` bits of the quant from bit `first` on.
  __device__ uint32_t Bits(int row, int column, int first, int count) const {
    const Block* block = Find(row, column);
    if (block == nullptr) return 0;
    return (static_cast<uint32_t>(block->quant(column % Block::kElements)) >> first) &
           ((1u << count) - 1);
  }
};

// Registers a[0] .. a[3] of a lane hold bytes of these rows and columns of a group.
__device__ int RegisterRow(int lane, int j) { return lane / 4 + j % 2 * 8; }
__device__ int RegisterColumn(int lane, int j, int byte) {
  return j / 2 * 16 + lane % 4 * 4 + byte;
}

// Writes the planes of quants. row, column: where the tile begins.
template <typename Tile, typename Block>
__device__ void PackQuants(const RawMatrix<Block>& raw, int row, int column, uint8_t* tile) {
  // `count` bits from `first` on of registers [first_j, first_j + registers), `step` bits apart.
  const auto word = [&](int group, int lane, int first_j, int registers, int step, int first,
                        int count) {
    uint32_t result = 0;
    for (int r = 0; r < registers; ++r) {
      const int j = first_j + r;
      for (int byte = 0; byte < 4; ++byte) {
        const uint32_t bits =
            raw.Bits(row + RegisterRow(lane, j),
                     column + group * 32 + RegisterColumn(lane, j, byte), first, count);
        result |= bits << (8 * byte + step * r);
      }
    }
    return result;
  };
  auto* words = reinterpret_cast<uint32_t*>(tile);
  for (int i = threadIdx.x; i < 8 * 32; i += kRepackThreads) {
    const int group = i / 32, lane = i % 32, p = group / 2, second = group % 2;
    if constexpr (Tile::kHasNibbles) {
      uint32_t* target = words + Tile::kNibbles / 4 + (p * 32 + lane) * 4 + second * 2;
      target[0] = word(group, lane, 0, 2, 4, 0, 4);
      target[1] = word(group, lane, 2, 2, 4, 0, 4);
    }
    if constexpr (Tile::kHasCrumbs) {
      words[Tile::kCrumbs / 4 + (p * 32 + lane) * 2 + second] =
          word(group, lane, 0, 4, 2, Tile::kHasNibbles ? 4 : 0, 2);
    }
    if constexpr (Tile::kHasBits) {
      if (second == 0) {
        words[Tile::kBitPlane / 4 + p * 32 + lane] =
            word(group, lane, 0, 4, 1, Tile::kBits - 1, 1) |
            word(group + 1, lane, 0, 4, 1, Tile::kBits - 1, 1) << 4;
      }
    }
    if constexpr (Tile::kBits == 8) {
      for (int j = 0; j < 4; ++j) {
        words[Tile::kBytePlane / 4 + (group * 32 + lane) * 4 + j] =
            word(group, lane, j, 1, 0, 0, 8);
      }
    }
  }
}

// Writes scales and deltas.
template <typename Tile, typename Block>
__device__ void PackScales(const RawMatrix<Block>& raw, int row, int column, uint8_t* tile) {
  if constexpr (!Tile::kFloatScales) {
    for (int i = threadIdx.x; i < 16 * 16; i += kRepackThreads) {
      const int r = i / 16, j = i % 16;
      const Block* block = raw.Find(row + r, column);
      int value = 0;
      if (block != nullptr) {
        if constexpr (Tile::kScaling == Scaling::kInteger32) {
          value = j < 8 ? block->scale(j) : block->min(j - 8);
        } else {
          value = block->scale(j) | (Tile::kHasMin ? block->min(j) << 4 : 0);
        }
      }
      tile[Tile::kScales + r % 8 * 32 + r / 8 * 16 + j] = static_cast<uint8_t>(value);
    }
  }
  constexpr int kDeltaGroups = Tile::kFloatScales ? 8 : 1;
  auto* halves = reinterpret_cast<uint16_t*>(tile + Tile::kDeltas);
  for (int i = threadIdx.x; i < kDeltaGroups * 16; i += kRepackThreads) {
    const int group = i / 16, r = i % 16;
    const Block* block = raw.Find(row + r, column + group * 32);
    const uint16_t delta = block == nullptr ? 0 : FloatToHalf(block->delta());
    const uint16_t delta_min = block == nullptr ? 0 : FloatToHalf(block->delta_min());
    if constexpr (Tile::kFloatScales) {
      halves[group * 16 + r % 8 * 2 + r / 8] = delta;
      if constexpr (Tile::kHasMin) {
        halves[(Tile::kDeltaMins - Tile::kDeltas) / 2 + group * 16 + r % 8 * 2 + r / 8] = delta_min;
      }
    } else if constexpr (Tile::kHasMin) {
      halves[r % 8 * 4 + r / 8 * 2] = delta;
      halves[r % 8 * 4 + r / 8 * 2 + 1] = delta_min;
    } else {
      halves[r % 8 * 2 + r / 8] = delta;
    }
  }
}

template <TensorType type>
__global__ void __launch_bounds__(kRepackThreads)
    RepackKernel(const void* raw, int n, int k, int superblocks, uint8_t* packed) {
  using Tile = TileOf<type>;
  const RawMatrix<BlockOf<type>> matrix = {static_cast<const BlockOf<type>*>(raw), n, k};
  const int row = static_cast<int>(blockIdx.x / superblocks) * kTileRows;
  const int column = static_cast<int>(blockIdx.x % superblocks) * kTileColumns;
  uint8_t* tile = packed + static_cast<size_t>(blockIdx.x) * Tile::kBytes;
  PackQuants<Tile>(matrix, row, column, tile);
  PackScales<Tile>(matrix, row, column, tile);
}

size_t ElementBytes(TensorType type) { return type == TensorType::kF32 ? 4 : 2; }

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

}  // namespace

size_t PackedBytes(TensorType type, int n, int k) {
  const size_t float_bytes = ElementBytes(type) * n * k;
  return VisitTileType(type, (float_bytes + 15) / 16 * 16, [&]<TensorType tile_type>() {
    return static_cast<size_t>(CeilDivide(n, kTileRows)) * CeilDivide(k, kTileColumns) *
           TileOf<tile_type>::kBytes;
  });
}

cudaError_t LaunchRepack(TensorType type, int n, int k, const void* raw, void* packed,
                         cudaStream_t stream) {
  if (FormFor(type) == ActivationForm::kFloat) {
    return cudaMemcpyAsync(packed, raw, ElementBytes(type) * n * k, cudaMemcpyDeviceToDevice,
                           stream);
  }
  const int superblocks = CeilDivide(k, kTileColumns);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(CeilDivide(n, kTileRows)) * superblocks);
  shape.threads = kRepackThreads;
  shape.overlap = false;
  return VisitTileType(type, cudaErrorInvalidValue, [&]<TensorType tile_type>() {
    return LaunchKernel(RepackKernel<tile_type>, shape, stream, raw, n, k, superblocks,
                        static_cast<uint8_t*>(packed));
  });
}

}  // namespace stagecoach::cuda
