// Plain-text tables for terminals and logs.
#ifndef STAGECOACH_TOOLS_TABLE_H_
#define STAGECOACH_TOOLS_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace stagecoach {

// Columns padded to their widest cell; cells that start with a digit or a sign are right-aligned.
// The first row is the header. Ends with a newline.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

// "11.8 MB", "4.92 GB" (powers of ten).
std::string FormatBytes(uint64_t bytes);
// "24GB", "512MiB", "1000" -> bytes; INVALID_ARGUMENT for anything else.
absl::StatusOr<uint64_t> ParseBytes(const std::string& text);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_TABLE_H_
