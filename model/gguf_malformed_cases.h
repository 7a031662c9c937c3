// Cases of gguf_malformed_test.cc. Their names start with the number of the class of defect, in the
// order of the header's parts: 01 to 08 the fixed header, 09 to 22 metadata, 23 to 30
// hyper-parameters, 31 to 43 tensors, 44 to 48 the model as a whole.
#ifndef STAGECOACH_MODEL_GGUF_MALFORMED_CASES_H_
#define STAGECOACH_MODEL_GGUF_MALFORMED_CASES_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "model/gguf_image.h"
#include "model/model_error.h"

namespace stagecoach {

inline constexpr uint64_t kMax64 = std::numeric_limits<uint64_t>::max();
inline constexpr uint64_t kTwo63 = uint64_t{1} << 63;

struct MalformedCase {
  std::string name;  // "<class>_<what>"
  std::function<std::vector<std::string>()> parts;
  std::optional<ModelError> expected;  // nullopt: the file opens
  std::string mentions = "";           // a part of the message
};

inline void PrintTo(const MalformedCase& c, std::ostream* os) { *os << c.name; }

// A case that changes a valid file.
MalformedCase Changed(std::string name, std::optional<ModelError> expected, std::string mentions,
                      std::function<void(GgufImage&)> change);

// A case that changes the bytes of a valid file.
MalformedCase Patched(std::string name, ModelError expected, std::string mentions,
                      std::function<void(std::string&)> change);

std::string Join(const std::string& a, uint64_t b);

std::vector<MalformedCase> HeaderCases();
std::vector<MalformedCase> KeyCases();
std::vector<MalformedCase> ArrayAndStringCases();
std::vector<MalformedCase> AlignmentCases();
std::vector<MalformedCase> RequiredKeyCases();
std::vector<MalformedCase> HparamCases();
std::vector<MalformedCase> TensorNameAndShapeCases();
std::vector<MalformedCase> TensorPlaceCases();
std::vector<MalformedCase> ModelCases();
std::vector<MalformedCase> SplitCases();

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_GGUF_MALFORMED_CASES_H_
