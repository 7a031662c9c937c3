#include "model/gguf_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>
#include <system_error>
#include <utility>

#include "fmt/format.h"
#include "model/checked_math.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

constexpr uint32_t kVersion = 3;
constexpr uint32_t kUint32 = 4;
constexpr uint32_t kInt32 = 5;
constexpr uint32_t kFloat32 = 6;
constexpr uint32_t kBool = 7;
constexpr uint32_t kString = 8;
constexpr uint32_t kArray = 9;

template <typename T>
void AppendNumber(std::string* out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out->append(bytes, sizeof(T));
}

void AppendString(std::string* out, std::string_view text) {
  AppendNumber<uint64_t>(out, text.size());
  out->append(text);
}

template <typename T>
void AppendNumbers(std::string* out, std::span<const T> values) {
  out->append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

std::string PartialPath(const std::string& path) { return path + ".partial"; }

absl::Status WriteError(const std::string& action, const std::string& path, int error) {
  const std::string message =
      fmt::format("cannot {} '{}': {}", action, path, std::generic_category().message(error));
  if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(message);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(message);
  return MakeModelError(ModelError::kIo, message);
}

}  // namespace

absl::StatusOr<std::unique_ptr<GgufWriter>> GgufWriter::Create(const std::string& path,
                                                               uint64_t alignment) {
  const std::string partial = PartialPath(path);
  const int fd = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return WriteError("create", partial, errno);
  return std::unique_ptr<GgufWriter>(new GgufWriter(fd, path, alignment));
}

GgufWriter::GgufWriter(int fd, std::string path, uint64_t alignment)
    : path_(std::move(path)), alignment_(alignment), fd_(fd) {
  AddUint32("general.alignment", static_cast<uint32_t>(alignment));
}

GgufWriter::~GgufWriter() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(PartialPath(path_).c_str());
}

void GgufWriter::AddKey(std::string_view key, uint32_t type) {
  AppendString(&metadata_, key);
  AppendNumber(&metadata_, type);
  ++key_count_;
}

void GgufWriter::AddArray(std::string_view key, uint32_t element_type, uint64_t count) {
  AddKey(key, kArray);
  AppendNumber(&metadata_, element_type);
  AppendNumber(&metadata_, count);
}

void GgufWriter::AddUint32(std::string_view key, uint32_t value) {
  AddKey(key, kUint32);
  AppendNumber(&metadata_, value);
}

void GgufWriter::AddFloat32(std::string_view key, float value) {
  AddKey(key, kFloat32);
  AppendNumber(&metadata_, value);
}

void GgufWriter::AddBool(std::string_view key, bool value) {
  AddKey(key, kBool);
  AppendNumber<uint8_t>(&metadata_, value ? 1 : 0);
}

void GgufWriter::AddString(std::string_view key, std::string_view value) {
  AddKey(key, kString);
  AppendString(&metadata_, value);
}

void GgufWriter::AddStrings(std::string_view key, std::span<const std::string> values) {
  AddArray(key, kString, values.size());
  for (const std::string& value : values) AppendString(&metadata_, value);
}

void GgufWriter::AddFloats(std::string_view key, std::span<const float> values) {
  AddArray(key, kFloat32, values.size());
  AppendNumbers(&metadata_, values);
}

void GgufWriter::AddInts(std::string_view key, std::span<const int32_t> values) {
  AddArray(key, kInt32, values.size());
  AppendNumbers(&metadata_, values);
}

absl::Status GgufWriter::AddTensor(std::string_view name, TensorType type,
                                   std::span<const uint64_t> dims) {
  assert(!dims.empty());
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t row_bytes, RowBytes(type, dims[0]));
  std::optional<uint64_t> bytes = row_bytes;
  for (const uint64_t dim : dims.subspan(1)) {
    if (bytes) bytes = CheckedMul(*bytes, dim);
  }
  const std::optional<uint64_t> padded = bytes ? CheckedAlignUp(*bytes, alignment_) : std::nullopt;
  const std::optional<uint64_t> end = padded ? CheckedAdd(data_bytes_, *padded) : std::nullopt;
  if (!end) {
    return MakeModelError(ModelError::kOverflow, fmt::format("tensor '{}' is too large", name));
  }
  AppendString(&table_, name);
  AppendNumber(&table_, static_cast<uint32_t>(dims.size()));
  AppendNumbers(&table_, dims);
  AppendNumber(&table_, static_cast<uint32_t>(type));
  AppendNumber(&table_, data_bytes_);
  tensors_.push_back({data_bytes_, *bytes});
  data_bytes_ = *end;
  return absl::OkStatus();
}

absl::Status GgufWriter::WriteHeader() {
  std::string header = "GGUF";
  AppendNumber(&header, kVersion);
  AppendNumber<uint64_t>(&header, tensors_.size());
  AppendNumber(&header, key_count_);
  header += metadata_;
  header += table_;
  metadata_ = {};
  table_ = {};
  header.resize(*CheckedAlignUp(header.size(), alignment_), '\0');
  return WriteAll(std::as_bytes(std::span(header)));
}

absl::Status GgufWriter::WriteData(std::span<const std::byte> bytes) {
  assert(current_ < tensors_.size());
  const Tensor& tensor = tensors_[current_];
  assert(bytes.size() <= tensor.bytes - written_);
  STAGECOACH_RETURN_IF_ERROR(WriteAll(bytes));
  written_ += bytes.size();
  if (written_ < tensor.bytes) return absl::OkStatus();
  ++current_;
  written_ = 0;
  const uint64_t next = current_ < tensors_.size() ? tensors_[current_].offset : data_bytes_;
  return WritePadding(next - tensor.offset - tensor.bytes);
}

absl::Status GgufWriter::Finish() {
  assert(current_ == tensors_.size());
  const std::string partial = PartialPath(path_);
  if (::close(std::exchange(fd_, -1)) != 0 || ::rename(partial.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::unlink(partial.c_str());
    return WriteError("create", path_, error);
  }
  return absl::OkStatus();
}

absl::Status GgufWriter::WriteAll(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return WriteError("write", PartialPath(path_), errno);
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

absl::Status GgufWriter::WritePadding(uint64_t bytes) {
  const std::string zeros(bytes, '\0');
  return WriteAll(std::as_bytes(std::span(zeros)));
}

}  // namespace stagecoach
