// GGUF files made byte by byte, right or wrong, for tests and for the seeds of the fuzzer.
#ifndef STAGECOACH_MODEL_GGUF_IMAGE_H_
#define STAGECOACH_MODEL_GGUF_IMAGE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace stagecoach {

// Ids of metadata value types.
enum GgufTypeId : uint32_t {
  kGgufU8 = 0,
  kGgufI8 = 1,
  kGgufU16 = 2,
  kGgufI16 = 3,
  kGgufU32 = 4,
  kGgufI32 = 5,
  kGgufF32 = 6,
  kGgufBool = 7,
  kGgufString = 8,
  kGgufArray = 9,
  kGgufU64 = 10,
  kGgufI64 = 11,
  kGgufF64 = 12,
};

// Encodings of values.
std::string RawU8(uint8_t value);
std::string RawU32(uint32_t value);
std::string RawU64(uint64_t value);
std::string RawF32(float value);
std::string RawString(std::string_view text);  // length and bytes
// An array's element type, count and the elements' encodings.
std::string RawArray(uint32_t element_type, uint64_t count, std::string_view elements);
std::string RawStrings(const std::vector<std::string>& values);

// Says what the bytes are; nothing is checked. What is nullopt follows from the rest.
struct GgufImage {
  struct Key {
    std::string name;
    uint32_t type = kGgufU32;
    std::string value;  // encoded
    std::optional<uint64_t> name_length;
  };
  struct Tensor {
    std::string name;
    std::vector<uint64_t> dims;
    uint32_t type = 0;
    uint64_t offset = 0;
    std::optional<uint64_t> name_length;
    std::optional<uint32_t> dim_count;
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  std::optional<uint64_t> tensor_count;
  std::optional<uint64_t> key_count;
  std::vector<Key> keys;
  std::vector<Tensor> tensors;
  uint64_t alignment = 32;  // of the data's start
  std::string data;

  std::string HeaderBytes() const;  // without padding
  std::string Bytes() const;

  // By name; the name must be there.
  Key& key(std::string_view name);
  Tensor& tensor(std::string_view name);
  // Replaces the value or appends the key.
  void Set(const std::string& name, uint32_t type, std::string value);
  void SetU32(const std::string& name, uint32_t value) { Set(name, kGgufU32, RawU32(value)); }
  void SetF32(const std::string& name, float value) { Set(name, kGgufF32, RawF32(value)); }
  void SetString(const std::string& name, std::string_view value) {
    Set(name, kGgufString, RawString(value));
  }
  void RemoveKey(std::string_view name);
  void RemoveTensor(std::string_view name);
  // Appends an F32 tensor whose data are zeros after all other data.
  void AddF32(const std::string& name, std::vector<uint64_t> dims);
};

// A valid F32 model: 2 layers, d_model 8, 2 heads of 4, 1 KV head, FFN 16, 4 tokens. About 8 KB.
GgufImage TinyLlamaImage();

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_GGUF_IMAGE_H_
