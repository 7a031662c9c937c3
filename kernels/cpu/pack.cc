#include "kernels/cpu/pack.h"

#include <array>
#include <cstring>

#include "kernels/cpu/records.h"
#include "model/block_decode.h"
#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

constexpr uint16_t kHalfSign = 0x8000;

// Four words of four columns each; the operations are vertical.
using Words = uint32_t __attribute__((vector_size(16)));
constexpr int kQuad = 4;  // rows that are packed together

Words Load(const void* bytes) {
  Words words;
  std::memcpy(&words, bytes, sizeof(words));
  return words;
}

// Bit i of `bits` to the lowest bit of byte i.
uint32_t SpreadBits(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

// Columns 16 * half .. + 15 of a group of 32: the same as Block::quant + Record::kOffset
// (pack_test.cc compares).
template <typename Block>
Words HalfGroup(const Block& block, int group, int half) {
  const int at = 16 * half;
  if constexpr (requires { block.quants; }) {  // Q8_0
    return Load(block.quants + at);
  } else if constexpr (Block::kElements == 32) {
    Words w = Load(block.nibbles) >> 4 * half & 0x0f0f0f0fu;
    if constexpr (requires { block.high_bits; }) {
      for (int i = 0; i < 4; ++i) {
        w[i] |= SpreadBits(block.high_bits[2 * half + i / 2] >> (i % 2 * 4)) << 4;
      }
    }
    return w;
  } else {
    Words crumbs = {}, bits = {};
    if constexpr (requires { block.crumbs; }) {
      crumbs = Load(block.crumbs + group / 4 * 32 + at) >> group % 4 * 2 & 0x03030303u;
    }
    if constexpr (requires { block.high_bits; }) {
      bits = Load(block.high_bits + at) >> group & 0x01010101u;
    }
    if constexpr (!requires { block.nibbles; }) {  // Q2_K, Q3_K
      return crumbs | bits << 2;
    } else if constexpr (requires { block.crumbs; }) {  // Q6_K
      const uint8_t* nibbles = block.nibbles + group / 4 * 64 + group % 2 * 32 + at;
      return (Load(nibbles) >> group % 4 / 2 * 4 & 0x0f0f0f0fu) | crumbs << 4;
    } else {  // Q4_K, Q5_K
      const uint8_t* nibbles = block.nibbles + group / 2 * 32 + at;
      return (Load(nibbles) >> group % 2 * 4 & 0x0f0f0f0fu) | bits << 4;
    }
  }
}

// From word j of row i to word i of row j.
void Transpose(const Words in[kQuad], Words out[4]) {
  const Words a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
  const Words b = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  const Words c = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  const Words d = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  out[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  out[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

void Store(const Words& words, uint8_t* vectors, int vector, int row) {
  std::memcpy(vectors + 32 * vector + 4 * row, &words, sizeof(words));
}

// Rows [row, row + kQuad) of a group: w[j] holds columns 4j .. 4j + 3 of each.
template <typename Record>
void PackQuants(const Words w[8], int row, int group, Record* record) {
  if constexpr (requires { record->quants; }) {
    for (int i = 0; i < 8; ++i) Store(w[i], record->quants[group], i, row);
  }
  if constexpr (requires { record->nibbles; }) {
    for (int i = 0; i < 4; ++i) {
      const Words low = w[i] & 0x0f0f0f0fu, high = w[i + 4] & 0x0f0f0f0fu;
      Store(low | high << 4, record->nibbles[group], i, row);
    }
  }
  // Above the nibbles, or the lowest bits.
  constexpr int kPairsAt = requires { record->nibbles; }
  ? 4 : 0;
  if constexpr (requires { record->pairs; }) {
    for (int i = 0; i < 2; ++i) {
      Words packed = {};
      for (int j = 0; j < 4; ++j) packed |= (w[4 * i + j] >> kPairsAt & 0x03030303u) << 2 * j;
      Store(packed, record->pairs[group], i, row);
    }
  }
  constexpr int kBitsAt = requires { record->nibbles; }
  ? 4 : 2;
  if constexpr (requires { record->bits; }) {
    Words packed = {};
    for (int j = 0; j < 8; ++j) packed |= (w[j] >> kBitsAt & 0x01010101u) << j;
    Store(packed, record->bits[group], 0, row);
  }
}

template <typename Block, typename Record>
void PackScales(const Block& block, int row, Record* record) {
  record->d[row] = block.d;
  if constexpr (requires { block.dmin; }) record->d_min[row] = block.dmin;
  // Added in the file, subtracted in the record.
  if constexpr (requires { block.m; }) record->d_min[row] = block.m ^ kHalfSign;
  for (int s = 0; s < Block::kElements / Block::kGroup; ++s) {
    if constexpr (requires { record->scales_and_mins; }) {
      record->scales_and_mins[s][row] = static_cast<uint8_t>(block.scale(s) | (block.min(s) << 4));
    }
    if constexpr (requires { record->scales; }) {
      record->scales[s][row] = static_cast<uint8_t>(block.scale(s));
    }
    if constexpr (requires { record->mins; }) {
      record->mins[s][row] = static_cast<uint8_t>(block.min(s));
    }
  }
}

// Blocks of rows [row, row + kQuad).
template <typename Block, typename Record>
void PackQuad(const Block blocks[kQuad], int row, Record* record) {
  static_assert(Block::kElements == Record::kGroups * kActivationBlock);
  for (int i = 0; i < kQuad; ++i) PackScales(blocks[i], row + i, record);
  for (int g = 0; g < Record::kGroups; ++g) {
    Words columns[8];
    for (int half = 0; half < 2; ++half) {
      Words rows[kQuad];
      for (int i = 0; i < kQuad; ++i) rows[i] = HalfGroup(blocks[i], g, half);
      Transpose(rows, columns + 4 * half);
    }
    PackQuants(columns, row, g, record);
  }
}

// Rows beyond the last are packed from blocks of zeros, which give zeros.
template <typename Record, typename Block>
void PackQuantized(int rows, int columns, const std::byte* raw, uint8_t* out) {
  const int blocks = columns / Block::kElements;
  Record* record = reinterpret_cast<Record*>(out);
  for (int first = 0; first < rows; first += kPanelRows) {
    for (int b = 0; b < blocks; ++b, ++record) {
      for (int quad = 0; quad < kPanelRows; quad += kQuad) {
        Block quad_blocks[kQuad] = {};
        for (int i = 0; i < kQuad && first + quad + i < rows; ++i) {
          const size_t block = static_cast<size_t>(first + quad + i) * blocks + b;
          std::memcpy(&quad_blocks[i], raw + block * sizeof(Block), sizeof(Block));
        }
        PackQuad(quad_blocks, quad, record);
      }
    }
  }
}

template <typename Record>
void PackFloats(int rows, int columns, const std::byte* raw, uint8_t* out) {
  Record* records = reinterpret_cast<Record*>(out);
  for (int row = 0; row < rows; ++row) {
    Record* panel = records + static_cast<size_t>(row / kPanelRows) * columns;
    for (int k = 0; k < columns; ++k) {
      auto* value = &panel[k].values[row % kPanelRows];
      std::memcpy(value, raw, sizeof(*value));
      raw += sizeof(*value);
    }
  }
}

struct Packer {
  TensorType type;
  int columns;  // per record
  size_t record_bytes;
  void (*pack)(int rows, int columns, const std::byte* raw, uint8_t* out);
};

template <typename Record, typename Block>
constexpr Packer QuantPacker(TensorType type) {
  return {type, Block::kElements, sizeof(Record), PackQuantized<Record, Block>};
}

constexpr Packer kPackers[] = {
    {TensorType::kF32, 1, sizeof(RecordF32), PackFloats<RecordF32>},
    {TensorType::kF16, 1, sizeof(RecordF16), PackFloats<RecordF16>},
    {TensorType::kBF16, 1, sizeof(RecordBF16), PackFloats<RecordBF16>},
    QuantPacker<RecordQ4_0, BlockQ4_0>(TensorType::kQ4_0),
    QuantPacker<RecordQ4_1, BlockQ4_1>(TensorType::kQ4_1),
    QuantPacker<RecordQ5_0, BlockQ5_0>(TensorType::kQ5_0),
    QuantPacker<RecordQ5_1, BlockQ5_1>(TensorType::kQ5_1),
    QuantPacker<RecordQ8_0, BlockQ8_0>(TensorType::kQ8_0),
    QuantPacker<RecordQ2_K, BlockQ2_K>(TensorType::kQ2_K),
    QuantPacker<RecordQ3_K, BlockQ3_K>(TensorType::kQ3_K),
    QuantPacker<RecordQ4_K, BlockQ4_K>(TensorType::kQ4_K),
    QuantPacker<RecordQ5_K, BlockQ5_K>(TensorType::kQ5_K),
    QuantPacker<RecordQ6_K, BlockQ6_K>(TensorType::kQ6_K),
};

const Packer& PackerOf(TensorType type) {
  for (const Packer& packer : kPackers) {
    if (packer.type == type) return packer;
  }
  __builtin_unreachable();  // every TensorType is in the table (pack_test.cc)
}

}  // namespace

size_t PanelBytes(TensorType type, int columns) {
  const Packer& packer = PackerOf(type);
  return static_cast<size_t>(columns / packer.columns) * packer.record_bytes;
}

absl::StatusOr<PackedMatrix> PackedMatrix::Pack(TensorType type, int rows, int columns,
                                                std::span<const std::byte> raw) {
  STAGECOACH_ASSIGN_OR_RETURN(PackedMatrix matrix, Create(type, rows, columns));
  matrix.PackRows(0, rows, raw);
  return matrix;
}

absl::StatusOr<PackedMatrix> PackedMatrix::Create(TensorType type, int rows, int columns) {
  PackedMatrix matrix;
  matrix.view_ = {type, rows, columns, nullptr, PanelBytes(type, columns)};
  const size_t bytes = matrix.view_.panels() * matrix.view_.panel_bytes;
  STAGECOACH_ASSIGN_OR_RETURN(matrix.memory_, AlignedBuffer<uint8_t>::Create(bytes));
  matrix.view_.data = matrix.memory_.data();
  return matrix;
}

void PackedMatrix::PackRows(int first_row, int rows, std::span<const std::byte> raw) {
  PackerOf(view_.type)
      .pack(rows, view_.columns, raw.data(),
            memory_.data() + static_cast<size_t>(first_row / kPanelRows) * view_.panel_bytes);
}

}  // namespace stagecoach::cpu
