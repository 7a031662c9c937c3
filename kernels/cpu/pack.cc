#include "kernels/cpu/pack.h"

#include <array>
#include <cstring>

#include "kernels/cpu/records.h"
#include "model/block_decode.h"
#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

constexpr uint16_t kHalfSign = 0x8000;

// Unsigned quants of a group of 32 columns, as 8 words of 4 columns each.
using Words = std::array<uint32_t, 8>;

uint32_t Word(const uint8_t* bytes, int i) {
  uint32_t word;
  std::memcpy(&word, bytes + 4 * i, sizeof(word));
  return word;
}

// Bit i of `bits` to the lowest bit of byte i.
uint32_t SpreadBits(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

// The same as Block::quant + Record::kOffset (pack_test.cc compares), four columns at a time.
template <typename Block>
Words GroupWords(const Block& block, int group) {
  Words w;
  for (int i = 0; i < 8; ++i) {
    if constexpr (requires { block.quants; }) {  // Q8_0
      w[i] = Word(reinterpret_cast<const uint8_t*>(block.quants), i);
    } else if constexpr (Block::kElements == 32) {
      w[i] = Word(block.nibbles, i % 4) >> (i / 4 * 4) & 0x0f0f0f0fu;
      if constexpr (requires { block.high_bits; }) {
        w[i] |= SpreadBits(block.high_bits[i / 2] >> (i % 2 * 4)) << 4;
      }
    } else {
      uint32_t crumbs = 0, bits = 0;
      if constexpr (requires { block.crumbs; }) {
        crumbs = Word(block.crumbs, group / 4 * 8 + i) >> (group % 4 * 2) & 0x03030303u;
      }
      if constexpr (requires { block.high_bits; }) {
        bits = Word(block.high_bits, i) >> group & 0x01010101u;
      }
      if constexpr (!requires { block.nibbles; }) {  // Q2_K, Q3_K
        w[i] = crumbs | bits << 2;
      } else if constexpr (requires { block.crumbs; }) {  // Q6_K
        const int at = group / 4 * 16 + group % 2 * 8 + i;
        w[i] = (Word(block.nibbles, at) >> (group % 4 / 2 * 4) & 0x0f0f0f0fu) | crumbs << 4;
      } else {  // Q4_K, Q5_K
        const int at = group / 2 * 8 + i;
        w[i] = (Word(block.nibbles, at) >> (group % 2 * 4) & 0x0f0f0f0fu) | bits << 4;
      }
    }
  }
  return w;
}

void StoreWord(uint32_t word, uint8_t* vectors, int vector, int row) {
  std::memcpy(vectors + 32 * vector + 4 * row, &word, sizeof(word));
}

// One row's part of a group of 32 columns.
template <typename Record>
void PackQuants(const Words& w, int row, int group, Record* record) {
  if constexpr (requires { record->quants; }) {
    for (int i = 0; i < 8; ++i) StoreWord(w[i], record->quants[group], i, row);
  }
  if constexpr (requires { record->nibbles; }) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = w[i] & 0x0f0f0f0fu, high = w[i + 4] & 0x0f0f0f0fu;
      StoreWord(low | high << 4, record->nibbles[group], i, row);
    }
  }
  // Above the nibbles, or the lowest bits.
  constexpr int kPairsAt = requires { record->nibbles; }
  ? 4 : 0;
  if constexpr (requires { record->pairs; }) {
    for (int i = 0; i < 2; ++i) {
      uint32_t packed = 0;
      for (int j = 0; j < 4; ++j) packed |= (w[4 * i + j] >> kPairsAt & 0x03030303u) << 2 * j;
      StoreWord(packed, record->pairs[group], i, row);
    }
  }
  constexpr int kBitsAt = requires { record->nibbles; }
  ? 4 : 2;
  if constexpr (requires { record->bits; }) {
    uint32_t packed = 0;
    for (int j = 0; j < 8; ++j) packed |= (w[j] >> kBitsAt & 0x01010101u) << j;
    StoreWord(packed, record->bits[group], 0, row);
  }
}

// One block of one row into its record, which was zero.
template <typename Block, typename Record>
void PackBlock(const Block& block, int row, Record* record) {
  static_assert(Block::kElements == Record::kGroups * kActivationBlock);
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
  for (int g = 0; g < Record::kGroups; ++g) {
    PackQuants(GroupWords(block, g), row, g, record);
  }
}

template <typename Record, typename Block>
void PackQuantized(int rows, int columns, const std::byte* raw, uint8_t* out) {
  const int blocks = columns / Block::kElements;
  Record* records = reinterpret_cast<Record*>(out);
  for (int row = 0; row < rows; ++row) {
    Record* panel = records + static_cast<size_t>(row / kPanelRows) * blocks;
    for (int b = 0; b < blocks; ++b, raw += sizeof(Block)) {
      Block block;
      std::memcpy(&block, raw, sizeof(block));
      PackBlock(block, row % kPanelRows, &panel[b]);
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
  PackedMatrix matrix;
  matrix.view_ = {type, rows, columns, nullptr, PanelBytes(type, columns)};
  const size_t bytes = matrix.view_.panels() * matrix.view_.panel_bytes;
  STAGECOACH_ASSIGN_OR_RETURN(matrix.memory_, AlignedBuffer<uint8_t>::Create(bytes));
  PackerOf(type).pack(rows, columns, raw.data(), matrix.memory_.data());
  matrix.view_.data = matrix.memory_.data();
  return matrix;
}

}  // namespace stagecoach::cpu
