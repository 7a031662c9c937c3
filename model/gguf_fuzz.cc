// Any bytes as a GGUF file: either a typed error or a model whose tensors all lie within the file.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/faulty_file.h"
#include "model/file.h"
#include "model/gguf.h"
#include "model/model_error.h"
#include "model/model_file.h"

namespace stagecoach {
namespace {

void Expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

std::string ToString(const uint8_t* data, size_t size) {
  return std::string(reinterpret_cast<const char*>(data), size);
}

void CheckTensors(const GgufFile& gguf, uint64_t file_size) {
  for (const TensorInfo& tensor : gguf.tensors()) {
    Expect(tensor.offset >= gguf.data_offset(), "tensor data lies after the header");
    Expect(tensor.bytes <= file_size && tensor.offset <= file_size - tensor.bytes,
           "tensor data lies within the file");
    Expect(gguf.FindTensor(tensor.name) == &tensor, "a tensor is found by its name");
  }
}

void CheckUnits(const ModelFile& model) {
  const ModelParams& params = model.params();
  Expect(params.layers >= 1 && params.heads % params.kv_heads == 0, "consistent parameters");
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    Expect(model.UnitBytes(unit) > 0, "every unit has tensors");
  }
}

}  // namespace
}  // namespace stagecoach

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace stagecoach;
  const std::unique_ptr<RandomAccessFile> file = MakeMemoryFile("fuzz", ToString(data, size));
  const auto gguf = GgufFile::Parse(*file);
  if (gguf.ok()) CheckTensors(*gguf, size);
  Expect(gguf.ok() || GetModelError(gguf.status()), "a refusal is a ModelError");

  // The same in small pieces must read the same.
  const FaultyFile pieces(MakeMemoryFile("fuzz", ToString(data, size)), {.max_chunk = 4099});
  const auto again = GgufFile::Parse(pieces);
  Expect(gguf.status() == again.status(), "short reads change nothing");
  if (gguf.ok()) Expect(gguf->header_hash() == again->header_hash(), "short reads, same hash");

  std::vector<std::unique_ptr<RandomAccessFile>> files;
  files.push_back(MakeMemoryFile("fuzz", ToString(data, size)));
  const auto model = ModelFile::FromFiles(std::move(files));
  if (model.ok()) CheckUnits(**model);
  Expect(model.ok() || GetModelError(model.status()), "a refusal is a ModelError");
  return 0;
}
