// From the file's blocks to tiles (tile_format.cuh). One block of threads per tile.
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/tile_format.cuh"
#include "kernels/cuda/weight_bounds.h"
#include "model/block_decode.h"

namespace stagecoach::cuda {
namespace {

constexpr int kRepackThreads = 128;

// What is not a half any more.
constexpr float kBeyondHalves = 65536;
using TileOfQ4_K = TileOf<TensorType::kQ4_K>;
static_assert(kScaleBound4Bits * TileOfQ4_K::kQuantFactor * TileOfQ4_K::kLowerFactor ==
              kBeyondHalves);
static_assert(1024 * kDeltaBoundQ4K * TileOfQ4_K::kQuantFactor == kBeyondHalves);

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
  // `count` bits from bit `first` on of the quant less the type's least one.
  __device__ uint32_t Bits(int row, int column, int least, int first, int count) const {
    const Block* block = Find(row, column);
    if (block == nullptr) return 0;
    return (static_cast<uint32_t>(block->quant(column % Block::kElements) - least) >> first) &
           ((1u << count) - 1);
  }
};

// The place of one lane's values in a tile.
__device__ int RowOf(int lane, int r) { return lane / 4 + r * 8; }
__device__ int ColumnOf(int lane, int group, int j) { return group * 32 + lane % 4 * 8 + 2 * j; }

// Writes the planes of quants. row, column: where the tile begins.
template <typename Tile, typename Block>
__device__ void PackQuants(const RawMatrix<Block>& raw, int row, int column, uint8_t* tile) {
  const auto bits = [&](int lane, int r, int tile_column, int first, int count) {
    return raw.Bits(row + RowOf(lane, r), column + tile_column, Tile::kLeastQuant, first, count);
  };
  // Both columns of pair j, `width` bits from `first` on, as field f of a word.
  const auto field = [&](int lane, int group, int r, int j, int f, int first, int width) {
    const int tile_column = ColumnOf(lane, group, j);
    const uint32_t low = bits(lane, r, tile_column, first, width);
    const uint32_t high = bits(lane, r, tile_column + 1, first, width);
    return (low | high << 16) << PlaceField(width, f);
  };
  auto* words = reinterpret_cast<uint32_t*>(tile);
  for (int i = threadIdx.x; i < 8 * 32; i += kRepackThreads) {
    const int group = i / 32, lane = i % 32, place = group / 2 * 32 + lane;
    for (int r = 0; r < 2; ++r) {
      if constexpr (Tile::kHasNibbles) {
        uint32_t word = 0;
        for (int j = 0; j < 4; ++j) word |= field(lane, group, r, j, j, 0, 4);
        word = __funnelshift_l(word, word, Tile::kNibbleTurn);
        words[Tile::kNibbles / 4 + place * 4 + group % 2 * 2 + r] = word;
      }
      if constexpr (Tile::kBits == 8) {
        for (int c = 0; c < 8; ++c) {
          tile[Tile::kBytePlane + (i * 2 + r) * 8 + c] =
              static_cast<uint8_t>(bits(lane, r, ColumnOf(lane, group, 0) + c, 0, 8));
        }
      }
    }
    if constexpr (Tile::kHasCrumbs) {
      uint32_t word = 0;
      for (int rj = 0; rj < 8; ++rj) {
        word |= field(lane, group, rj / 4, rj % 4, rj, Tile::kCrumbShift, 2);
      }
      words[Tile::kCrumbs / 4 + place * 2 + group % 2] = word;
    }
    if constexpr (Tile::kHasBits) {
      if (group % 2 != 0) continue;
      uint32_t word = 0;
      for (int irj = 0; irj < 16; ++irj) {
        word |= field(lane, group + irj / 8, irj / 4 % 2, irj % 4, irj, Tile::kBitShift, 1);
      }
      words[Tile::kBitPlane / 4 + place] = word;
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
          const int half_group = j % 8 * 2 + j / 8;
          value = (block->scale(half_group) - Tile::kLeastScale) |
                  (Tile::kHasMin ? block->min(half_group) << 4 : 0);
        }
      }
      tile[Tile::kScales + r % 8 * 32 + r / 8 * 16 + PlaceScale(j)] = static_cast<uint8_t>(value);
    }
  }
  constexpr int kDeltaGroups = Tile::kFloatScales ? 8 : 1;
  auto* halves = reinterpret_cast<uint16_t*>(tile + Tile::kDeltas);
  for (int i = threadIdx.x; i < kDeltaGroups * 16; i += kRepackThreads) {
    const int group = i / 16, r = i % 16, place = group * 16 + r % 8 * 2 + r / 8;
    const Block* block = raw.Find(row + r, column + group * 32);
    const uint16_t delta = block == nullptr ? 0 : FloatToHalf(block->delta() * Tile::kQuantFactor);
    const uint16_t delta_min = block == nullptr ? 0 : FloatToHalf(block->delta_min());
    if constexpr (Tile::kFloatScales) {
      halves[place] = delta;
      if constexpr (Tile::kHasMin) {
        halves[(Tile::kDeltaMins - Tile::kDeltas) / 2 + place] = delta_min;
      }
    } else if constexpr (Tile::kHasMin) {
      halves[place * 2] = delta;
      halves[place * 2 + 1] = delta_min;
    } else {
      halves[place] = delta;
    }
  }
}

// Writes a tile of halves.
template <typename Block>
__device__ void PackHalves(const RawMatrix<Block>& raw, int row, int column, uint8_t* tile) {
  auto* halves = reinterpret_cast<uint16_t*>(tile);
  for (int i = threadIdx.x; i < kTileRows * kTileColumns; i += kRepackThreads) {
    const int lane = i / 8 % 32, r = i / 256 % 2, group = i / 512;
    const Block* block = raw.Find(row + RowOf(lane, r), column + ColumnOf(lane, group, 0) + i % 8);
    halves[i] = block == nullptr ? 0 : FloatToHalf(block->value());
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
  if constexpr (std::is_same_v<Tile, HalfTile>) {
    PackHalves(matrix, row, column, tile);
  } else {
    PackQuants<Tile>(matrix, row, column, tile);
    PackScales<Tile>(matrix, row, column, tile);
  }
}

// Fields of a word that are row g's (r = 0); those of row g + 8 lie kRowShift bits higher.
template <int width>
constexpr uint32_t FieldsOfLowerRow() {
  uint32_t mask = 0;
  for (int f = 0; f < 16 / width; f += 8) {
    for (int j = 0; j < 4; ++j)
      mask |= ((1u << width) - 1) * 0x00010001u << PlaceField(width, f + j);
  }
  return mask;
}
template <int width>
constexpr int kRowShift = PlaceField(width, 4) - PlaceField(width, 0);
static_assert(FieldsOfLowerRow<2>() << kRowShift<2> == ~FieldsOfLowerRow<2>());
static_assert(FieldsOfLowerRow<1>() << kRowShift<1> == ~FieldsOfLowerRow<1>());

// What two tiles have of rows g + 8 of the first one and rows g of the second one changes places.
template <typename Tile>
__device__ void PairTiles(uint8_t* first, uint8_t* second) {
  // Of `count` elements of each row, row g's before row g + 8's.
  const auto swap = [&]<typename Element>(int plane, int count, Element) {
    auto* const of_first = reinterpret_cast<Element*>(first + plane);
    auto* const of_second = reinterpret_cast<Element*>(second + plane);
    for (int i = threadIdx.x; i < count; i += kRepackThreads) {
      const Element upper = of_first[2 * i + 1];
      of_first[2 * i + 1] = of_second[2 * i];
      of_second[2 * i] = upper;
    }
  };
  const auto swap_fields = [&]<int width>(int plane, int words) {
    constexpr uint32_t kLower = FieldsOfLowerRow<width>();
    auto* const of_first = reinterpret_cast<uint32_t*>(first + plane);
    auto* const of_second = reinterpret_cast<uint32_t*>(second + plane);
    for (int i = threadIdx.x; i < words; i += kRepackThreads) {
      const uint32_t a = of_first[i], b = of_second[i];
      of_first[i] = (a & kLower) | (b & kLower) << kRowShift<width>;
      of_second[i] = (a >> kRowShift<width> & kLower) | (b & ~kLower);
    }
  };
  if constexpr (Tile::kHasNibbles) swap(Tile::kNibbles, 256, uint32_t());
  if constexpr (Tile::kHasCrumbs) swap_fields.template operator()<2>(Tile::kCrumbs, 256);
  if constexpr (Tile::kHasBits) swap_fields.template operator()<1>(Tile::kBitPlane, 128);
  if constexpr (Tile::kBits == 8) swap(Tile::kBytePlane, 256, uint2());
  if constexpr (Tile::kFloatScales) {
    swap(Tile::kDeltas, 64, uint16_t());
    if constexpr (Tile::kHasMin) swap(Tile::kDeltaMins, 64, uint16_t());
  } else {
    swap(Tile::kScales, 8, uint4());
    using Deltas = std::conditional_t<Tile::kHasMin, uint32_t, uint16_t>;
    swap(Tile::kDeltas, 8, Deltas());
  }
}

template <TensorType type>
__global__ void __launch_bounds__(kRepackThreads)
    PairRowsKernel([[maybe_unused]] uint8_t* gate, [[maybe_unused]] uint8_t* up) {
  using Tile = TileOf<type>;
  if constexpr (!std::is_same_v<Tile, HalfTile>) {
    const size_t tile = static_cast<size_t>(blockIdx.x) * Tile::kBytes;
    PairTiles<Tile>(gate + tile, up + tile);
  }
}

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

}  // namespace

size_t PackedBytes(TensorType type, int n, int k) {
  const size_t float_bytes = sizeof(float) * n * k;
  return VisitTileType(type, (float_bytes + 15) / 16 * 16, [&]<TensorType tile_type>() {
    return static_cast<size_t>(CeilDivide(n, kTileRows)) * CeilDivide(k, kTileColumns) *
           TileOf<tile_type>::kBytes;
  });
}

cudaError_t LaunchRepack(TensorType type, int n, int k, const void* raw, void* packed,
                         cudaStream_t stream) {
  if (FormFor(type) == ActivationForm::kFloat) {
    return cudaMemcpyAsync(packed, raw, sizeof(float) * n * k, cudaMemcpyDeviceToDevice, stream);
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

bool CanPairRows(const PackedMatrix& gate, const PackedMatrix& up) {
  return FormFor(gate.type) == ActivationForm::kHalf && gate.type == up.type && gate.n == up.n &&
         gate.k == up.k && gate.n % kSuperblock == 0;
}

cudaError_t LaunchPairRows(TensorType type, int n, int k, void* gate, void* up,
                           cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(n / kTileRows) * CeilDivide(k, kTileColumns));
  shape.threads = kRepackThreads;
  shape.overlap = false;
  return VisitTileType(type, cudaErrorInvalidValue, [&]<TensorType tile_type>() {
    return LaunchKernel(PairRowsKernel<tile_type>, shape, stream, static_cast<uint8_t*>(gate),
                        static_cast<uint8_t*>(up));
  });
}

}  // namespace stagecoach::cuda
