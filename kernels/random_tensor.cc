#include "kernels/random_tensor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <utility>

#include "model/block_decode.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

template <typename Block>
void FillWithRandomBits(RandomSource& random, Block& block) {
  uint8_t bytes[sizeof(Block)];
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.Next());
  memcpy(&block, bytes, sizeof(Block));
}

// Sets the scales so that delta() is `delta` and the mean over random codes is 0.
template <typename Block>
void SetScales(Block& block, double delta) {
  block.d = FloatToHalf(static_cast<float>(delta));
  if constexpr (requires { block.m; }) {
    const double mean_quant = std::is_same_v<Block, BlockQ4_1> ? 7.5 : 15.5;
    block.m = FloatToHalf(static_cast<float>(-delta * mean_quant));
  } else if constexpr (requires { block.dmin; }) {
    // Scales and minimums are equally distributed, hence only the quants' mean counts.
    const double mean_quant = std::is_same_v<Block, BlockQ2_K>   ? 1.5
                              : std::is_same_v<Block, BlockQ4_K> ? 7.5
                                                                 : 15.5;
    block.dmin = FloatToHalf(static_cast<float>(delta * mean_quant));
  }
}

template <typename Block>
Block RandomBlock(RandomSource& random, double stddev) {
  Block block;
  if constexpr (std::is_same_v<Block, BlockF32>) {
    block.element = static_cast<float>(random.Gaussian() * stddev);
  } else if constexpr (std::is_same_v<Block, BlockF16>) {
    block.bits = FloatToHalf(static_cast<float>(random.Gaussian() * stddev));
  } else if constexpr (std::is_same_v<Block, BlockBF16>) {
    block.bits = FloatToBfloat16(static_cast<float>(random.Gaussian() * stddev));
  } else {
    FillWithRandomBits(random, block);
    SetScales(block, 1);
    float values[Block::kElements];
    DecodeBlock(block, values);
    double squares = 0;
    for (const float value : values) squares += double{value} * value;
    const double rms = std::sqrt(squares / Block::kElements);
    SetScales(block, rms > 0 ? stddev / rms : stddev);
  }
  return block;
}

}  // namespace

uint64_t RandomSource::Next() {
  state_ += 0x9e3779b97f4a7c15;
  uint64_t x = state_;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

double RandomSource::Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

double RandomSource::Gaussian() {
  // Four uniform 16-bit numbers: each has variance 2^32 / 12, their sum is close to Gaussian.
  const uint64_t bits = Next();
  const auto sum = static_cast<double>((bits & 0xffff) + ((bits >> 16) & 0xffff) +
                                       ((bits >> 32) & 0xffff) + (bits >> 48));
  return (sum - 2 * 65535.0) * (std::numbers::sqrt3 / 65536);
}

std::vector<float> RandomFloats(RandomSource& random, size_t count, double stddev) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random.Gaussian() * stddev);
  return values;
}

RandomTensor MakeRandomMatrix(RandomSource& random, const std::string& name, TensorType type,
                              uint64_t rows, uint64_t columns, double stddev) {
  RandomTensor tensor;
  VisitBlockType(type, [&]<typename Block>() {
    const uint64_t blocks = rows * (columns / Block::kElements);
    tensor.raw.resize(blocks * sizeof(Block));
    for (uint64_t i = 0; i < blocks; ++i) {
      const Block block = RandomBlock<Block>(random, stddev);
      memcpy(tensor.raw.data() + i * sizeof(Block), &block, sizeof(Block));
    }
  });
  tensor.info = {.name = name, .type = type, .dims = {columns, rows}, .bytes = tensor.raw.size()};
  return tensor;
}

RandomTensor MakeRandomVector(RandomSource& random, const std::string& name, uint64_t size,
                              double mean, double stddev) {
  std::vector<float> values = RandomFloats(random, size, stddev);
  for (float& value : values) value += static_cast<float>(mean);
  const std::span<const std::byte> bytes = std::as_bytes(std::span(values));
  RandomTensor tensor;
  tensor.raw.assign(bytes.begin(), bytes.end());
  tensor.info = {
      .name = name, .type = TensorType::kF32, .dims = {size}, .bytes = tensor.raw.size()};
  return tensor;
}

RandomUnit MakeRandomUnit(RandomSource& random, const ModelParams& params, const Unit& unit,
                          TensorType type, bool biases) {
  RandomUnit result{.unit = unit, .roles = {}, .tensors = {}};
  const auto add = [&](TensorRole role, RandomTensor tensor) {
    result.roles.push_back(role);
    result.tensors.push_back(std::move(tensor));
  };
  const auto name = [](TensorRole role) { return std::string(TensorRoleName(role)); };
  const auto norm = [&](TensorRole role) {
    add(role, MakeRandomVector(random, name(role), params.d_model, 1, 0.1));
  };
  const auto matrix = [&](TensorRole role, int rows, int columns) {
    add(role, MakeRandomMatrix(random, name(role), type, rows, columns, 1 / std::sqrt(columns)));
  };
  const auto bias = [&](TensorRole role, int size) {
    if (biases) add(role, MakeRandomVector(random, name(role), size, 0, 0.2));
  };
  const int q_rows = params.heads * params.key_length;
  const int k_rows = params.kv_heads * params.key_length;
  const int v_rows = params.kv_heads * params.value_length;
  switch (unit.kind) {
    case Unit::Kind::kEmbedding:
      matrix(TensorRole::kTokenEmbedding, params.vocab_size, params.d_model);
      break;
    case Unit::Kind::kHead:
      norm(TensorRole::kOutputNorm);
      matrix(TensorRole::kOutput, params.vocab_size, params.d_model);
      break;
    case Unit::Kind::kLayer:
      norm(TensorRole::kAttnNorm);
      matrix(TensorRole::kAttnQ, q_rows, params.d_model);
      bias(TensorRole::kAttnQBias, q_rows);
      matrix(TensorRole::kAttnK, k_rows, params.d_model);
      bias(TensorRole::kAttnKBias, k_rows);
      matrix(TensorRole::kAttnV, v_rows, params.d_model);
      bias(TensorRole::kAttnVBias, v_rows);
      matrix(TensorRole::kAttnOutput, params.d_model, params.heads * params.value_length);
      bias(TensorRole::kAttnOutputBias, params.d_model);
      norm(TensorRole::kFfnNorm);
      matrix(TensorRole::kFfnGate, params.ffn_length, params.d_model);
      matrix(TensorRole::kFfnUp, params.ffn_length, params.d_model);
      matrix(TensorRole::kFfnDown, params.d_model, params.ffn_length);
      break;
  }
  return result;
}

namespace {

absl::Status AddInParts(Backend& backend, UnitBuilder& builder, TensorRole role,
                        const RandomTensor& tensor) {
  const uint64_t rows = tensor.info.rows(), row_bytes = tensor.raw.size() / rows;
  for (uint64_t row = 0; row < rows; row += kPartRows) {
    const uint64_t count = std::min<uint64_t>(kPartRows, rows - row);
    const std::span<const std::byte> raw(tensor.raw.data() + row * row_bytes, count * row_bytes);
    STAGECOACH_ASSIGN_OR_RETURN(std::shared_ptr<HostMemory> memory,
                                backend.NewHostMemory(raw.size()));
    std::ranges::copy(raw, memory->data());
    const TensorPart part = {.first_row = row,
                             .raw = {memory->data(), raw.size()},
                             .memory = {memory.get(), [memory](const HostMemory*) {
                                          std::fill_n(memory->data(), memory->size(),
                                                      std::byte{0xff});
                                        }}};
    STAGECOACH_RETURN_IF_ERROR(builder.AddPart(role, tensor.info, part));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<UnitWeights>> BuildUnit(Backend& backend, const ModelParams& params,
                                                       const RandomUnit& unit, bool in_parts) {
  const std::unique_ptr<UnitBuilder> builder = backend.NewUnitBuilder(params, unit.unit);
  for (size_t i = 0; i < unit.tensors.size(); ++i) {
    const RandomTensor& tensor = unit.tensors[i];
    STAGECOACH_RETURN_IF_ERROR(backend.CheckTensor(unit.roles[i], tensor.info));
    STAGECOACH_RETURN_IF_ERROR(in_parts ? AddInParts(backend, *builder, unit.roles[i], tensor)
                                        : builder->Add(unit.roles[i], tensor.info, tensor.raw));
  }
  return builder->Finish();
}

}  // namespace stagecoach
