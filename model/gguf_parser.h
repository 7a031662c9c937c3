// The state of one GgufFile::Parse: the header of a GGUF file, read once from front to back.
#ifndef STAGECOACH_MODEL_GGUF_PARSER_H_
#define STAGECOACH_MODEL_GGUF_PARSER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "fmt/format.h"
#include "model/file.h"
#include "model/gguf.h"
#include "model/gguf_cursor.h"
#include "model/model_error.h"

namespace stagecoach {

// `text` in quotes, escaped and cut to a length fit for a message.
std::string QuoteForMessage(std::string_view text);

// Whether `text` is UTF-8 without control characters (U+0000..U+001F, U+007F..U+009F).
bool IsPrintableUtf8(std::string_view text);

// Run once, then Take. The metadata is read in gguf_parser.cc, the tensors in gguf_tensor_table.cc.
class GgufParser {
 public:
  GgufParser(const RandomAccessFile& file, int file_index)
      : file_(file), file_index_(file_index), cursor_(file) {}

  // Errors: see GgufFile::Parse.
  absl::Status Run();

  GgufFile Take() { return std::move(out_); }

 private:
  absl::Status ReadMagicAndVersion();
  absl::Status ReadCounts();
  absl::Status ReadKey(uint64_t index);
  absl::Status ReadValue(uint32_t type, GgufValue* value);
  absl::Status ReadArray(GgufValue* value);
  absl::Status ReadBool(bool* value);
  absl::Status ReadScalarString(std::string* value);
  absl::Status ReadStringArray(uint64_t count, std::vector<std::string>* values);
  template <typename Stored, typename Widened>
  absl::Status ReadNumbers(uint64_t count, std::vector<Widened>* values);
  absl::Status CheckArrayBytes(uint64_t count, uint64_t element_bytes);
  absl::Status ReadAlignment();
  absl::Status ReadTensor(uint64_t index);
  absl::Status ReadTensorName(uint64_t index, std::string* name);
  absl::Status ReadShape(TensorInfo* tensor);
  absl::Status SizeTensor(uint32_t type_id, TensorInfo* tensor);
  absl::Status PlaceTensors();
  absl::Status CheckOverlaps();

  // Counts `bytes` of memory against kMaxMetadataBytes before they are allocated.
  absl::Status Charge(uint64_t bytes);

  // An error about the thing being read: its name and where its record starts.
  absl::Status Fail(ModelError error, std::string_view problem) const {
    return MakeModelError(error, fmt::format("{}: {}", what_, problem));
  }
  template <typename... Args>
  absl::Status Fail(ModelError error, fmt::format_string<Args...> format, Args&&... args) const {
    return Fail(error, std::string_view(fmt::format(format, std::forward<Args>(args)...)));
  }

  const RandomAccessFile& file_;
  const int file_index_;
  GgufCursor cursor_;
  GgufFile out_;
  std::string what_ = "header";  // e.g. "key 'general.name' at byte 63"
  uint64_t tensor_count_ = 0;
  uint64_t key_count_ = 0;
  uint64_t charged_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_GGUF_PARSER_H_
