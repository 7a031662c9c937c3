#include "kernels/cpu/pack.h"

#include <cstring>

#include "kernels/cpu/records.h"
#include "model/block_decode.h"
#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

constexpr uint16_t kHalfSign = 0x8000;

// One row's part of a group of 32 columns. `q`: unsigned quants.
template <typename Record>
void PackQuants(const uint8_t* q, int row, int group, Record* record) {
  for (int k = 0; k < kActivationBlock; ++k) {
    const int vector = k / 4;
    const int byte = 4 * row + k % 4;
    if constexpr (requires { record->quants; }) {
      record->quants[group][32 * vector + byte] = q[k];
    }
    if constexpr (requires { record->nibbles; }) {
      record->nibbles[group][32 * (vector % 4) + byte] |= (q[k] & 15) << (vector / 4 * 4);
    }
    if constexpr (requires { record->pairs; }) {
      const int pair = requires { record->nibbles; }
      ? q[k] >> 4 : q[k] & 3;
      record->pairs[group][32 * (vector / 4) + byte] |= pair << (vector % 4 * 2);
    }
    if constexpr (requires { record->bits; }) {
      const int bit = requires { record->nibbles; }
      ? q[k] >> 4 : q[k] >> 2;
      record->bits[group][byte] |= (bit & 1) << vector;
    }
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
    uint8_t q[kActivationBlock];
    for (int k = 0; k < kActivationBlock; ++k) {
      q[k] = static_cast<uint8_t>(block.quant(g * kActivationBlock + k) + Record::kOffset);
    }
    PackQuants(q, row, g, record);
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
