// Writes GGUF v3 files as a stream: metadata, tensor table, then the tensors' data in order.
#ifndef STAGECOACH_MODEL_GGUF_WRITER_H_
#define STAGECOACH_MODEL_GGUF_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/tensor_type.h"

namespace stagecoach {

// Call order: Add...() and AddTensor() in any mix, WriteHeader(), WriteData() until every tensor is
// complete, Finish(). Another order is our own bug. Not thread-safe.
class GgufWriter {
 public:
  // Creates "<path>.partial", which Finish renames to `path`; the destructor of an unfinished
  // writer removes it. `alignment` is a power of two. Errors: NOT_FOUND, PERMISSION_DENIED, kIo.
  static absl::StatusOr<std::unique_ptr<GgufWriter>> Create(const std::string& path,
                                                            uint64_t alignment = 32);
  ~GgufWriter();
  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;

  void AddUint32(std::string_view key, uint32_t value);
  void AddFloat32(std::string_view key, float value);
  void AddBool(std::string_view key, bool value);
  void AddString(std::string_view key, std::string_view value);
  void AddStrings(std::string_view key, std::span<const std::string> values);
  void AddFloats(std::string_view key, std::span<const float> values);
  void AddInts(std::string_view key, std::span<const int32_t> values);

  // dims[0] is the columns, as in TensorInfo. Errors: kBadShape, kOverflow.
  absl::Status AddTensor(std::string_view name, TensorType type, std::span<const uint64_t> dims);

  absl::Status WriteHeader();

  // The next bytes of tensor data; a call may end anywhere within a tensor, but not go past its
  // end. Padding is added. Errors: kIo, RESOURCE_EXHAUSTED (disk full).
  absl::Status WriteData(std::span<const std::byte> bytes);

  // Closes and renames. Every tensor must be complete.
  absl::Status Finish();

 private:
  struct Tensor {
    uint64_t offset = 0;  // relative to the start of the data
    uint64_t bytes = 0;
  };

  GgufWriter(int fd, std::string path, uint64_t alignment);
  void AddKey(std::string_view key, uint32_t type);
  void AddArray(std::string_view key, uint32_t element_type, uint64_t count);
  absl::Status WriteAll(std::span<const std::byte> bytes);
  absl::Status WritePadding(uint64_t bytes);

  const std::string path_;
  const uint64_t alignment_;
  int fd_;                // -1 after Finish
  std::string metadata_;  // encoded; freed by WriteHeader
  std::string table_;     // encoded; freed by WriteHeader
  uint64_t key_count_ = 0;
  std::vector<Tensor> tensors_;
  uint64_t data_bytes_ = 0;  // of all tensors, the last one padded too
  size_t current_ = 0;       // tensor being written
  uint64_t written_ = 0;     // bytes of the current tensor
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_GGUF_WRITER_H_
