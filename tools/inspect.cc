// stagecoach inspect: what a GGUF file holds.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "model/manifest.h"
#include "model/model_file.h"
#include "tools/commands.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

constexpr size_t kShownStringBytes = 60;

struct InspectFlags {
  std::string model;
  bool tensors = false;
  bool json = false;
  bool hash = false;
  std::string output;  // of --hash
};

// Control bytes from the file never reach a terminal.
std::string Escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
  return out;
}

std::string Shorten(const std::string& text) {
  if (text.size() <= kShownStringBytes) return text;
  size_t end = kShownStringBytes;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

std::string ShowValue(const GgufValue& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, std::string>) {
          return fmt::format("\"{}\"", Shorten(Escape(v)));
        } else if constexpr (std::is_arithmetic_v<T>) {
          return fmt::format("{}", v);
        } else {
          return fmt::format("[{} elements]", v.size());
        }
      },
      value);
}

std::string Dims(const TensorInfo& tensor) {
  std::string out;
  for (auto it = tensor.dims.rbegin(); it != tensor.dims.rend(); ++it) {
    out += fmt::format("{}{}", out.empty() ? "" : " x ", *it);
  }
  return out;
}

// "Q4_K 5, Q6_K 2, F32 2"
std::string TypeCounts(const std::vector<UnitTensor>& tensors) {
  std::map<std::string_view, int> counts;
  for (const UnitTensor& t : tensors) ++counts[GetTensorTypeInfo(t.tensor->type).name];
  std::string out;
  for (const auto& [name, count] : counts) {
    out += fmt::format("{}{} {}", out.empty() ? "" : ", ", name, count);
  }
  return out;
}

void PrintParams(const ModelFile& model) {
  const ModelParams& p = model.params();
  fmt::print("{} ({}), GGUF v{}, {} file{}, hash {}\n", Escape(p.name), p.architecture,
             model.gguf().version(), model.parts().size(), model.parts().size() == 1 ? "" : "s",
             model.hash());
  fmt::print(
      "{} layers, d_model {}, {} heads of {}, {} KV heads, FFN {}, vocabulary {}, "
      "context {}, rope base {}{}\n",
      p.layers, p.d_model, p.heads, p.key_length, p.kv_heads, p.ffn_length, p.vocab_size,
      p.context_length, p.rope_freq_base, p.tied_embeddings ? ", tied embeddings" : "");
}

void PrintUnits(const ModelFile& model) {
  std::vector<std::vector<std::string>> rows = {{"unit", "bytes", "size", "tensors"}};
  uint64_t total = 0;
  for (const Unit& unit : StageUnits(model.params(), 0, model.params().layers)) {
    const uint64_t bytes = model.UnitBytes(unit);
    total += bytes;
    rows.push_back({UnitName(unit), fmt::format("{}", bytes), FormatBytes(bytes),
                    TypeCounts(model.UnitTensors(unit))});
  }
  rows.push_back({"total", fmt::format("{}", total), FormatBytes(total), ""});
  fmt::print("\n{}", FormatTable(rows));
}

void PrintMetadata(const ModelFile& model) {
  std::vector<std::vector<std::string>> rows = {{"key", "type", "value"}};
  for (const auto& [key, value] : model.gguf().metadata()) {
    rows.push_back({Escape(key), std::string(GgufValueTypeName(value)), ShowValue(value)});
  }
  fmt::print("\n{}", FormatTable(rows));
}

void PrintTensors(const ModelFile& model) {
  std::vector<std::vector<std::string>> rows = {{"tensor", "type", "shape", "offset", "bytes"}};
  for (const GgufFile& part : model.parts()) {
    for (const TensorInfo& t : part.tensors()) {
      rows.push_back({Escape(t.name), std::string(GetTensorTypeInfo(t.type).name), Dims(t),
                      fmt::format("{}", t.offset), fmt::format("{}", t.bytes)});
    }
  }
  fmt::print("\n{}", FormatTable(rows));
}

nlohmann::json ToJson(const ModelFile& model) {
  const ModelParams& p = model.params();
  nlohmann::json out = {{"name", p.name},
                        {"architecture", p.architecture},
                        {"hash", model.hash()},
                        {"layers", p.layers},
                        {"d_model", p.d_model},
                        {"heads", p.heads},
                        {"kv_heads", p.kv_heads},
                        {"key_length", p.key_length},
                        {"value_length", p.value_length},
                        {"ffn_length", p.ffn_length},
                        {"vocab_size", p.vocab_size},
                        {"context_length", p.context_length},
                        {"rope_freq_base", p.rope_freq_base},
                        {"tied_embeddings", p.tied_embeddings}};
  for (const Unit& unit : StageUnits(p, 0, p.layers)) {
    nlohmann::json tensors = nlohmann::json::array();
    for (const UnitTensor& t : model.UnitTensors(unit)) {
      tensors.push_back({{"name", t.tensor->name},
                         {"role", TensorRoleName(t.role)},
                         {"type", GetTensorTypeInfo(t.tensor->type).name},
                         {"dims", t.tensor->dims},
                         {"file", t.tensor->file_index},
                         {"offset", t.tensor->offset},
                         {"bytes", t.tensor->bytes}});
    }
    out["units"].push_back(
        {{"unit", UnitName(unit)}, {"bytes", model.UnitBytes(unit)}, {"tensors", tensors}});
  }
  return out;
}

absl::Status WriteManifest(const ModelFile& model, const std::string& path) {
  auto manifest = Manifest::OfModel(model);
  if (!manifest.ok()) return manifest.status();
  if (path.empty()) {
    fmt::print("{}", manifest->ToText());
    return absl::OkStatus();
  }
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << manifest->ToText();
  if (!out.flush()) return absl::NotFoundError(fmt::format("cannot write {}", path));
  return absl::OkStatus();
}

absl::Status RunInspect(const InspectFlags& flags) {
  auto model = ModelFile::Open(flags.model);
  if (!model.ok()) return model.status();
  for (const std::string& name : (*model)->unused_tensors()) {
    fmt::print(stderr, "stagecoach: warning: tensor {} is not used\n", Escape(name));
  }
  if (flags.hash) return WriteManifest(**model, flags.output);
  if (flags.json) {
    fmt::print("{}\n",
               ToJson(**model).dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
    return absl::OkStatus();
  }
  PrintParams(**model);
  PrintUnits(**model);
  PrintMetadata(**model);
  if (flags.tensors) PrintTensors(**model);
  return absl::OkStatus();
}

}  // namespace

void AddInspectCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* command = app.add_subcommand("inspect", "Show what a GGUF file holds");
  command->add_option("model,--model", flags->model, "GGUF file")->required();
  command->add_flag("--tensors", flags->tensors, "List every tensor too");
  command->add_flag("--json", flags->json, "Machine-readable output");
  CLI::Option* hash = command->add_flag(
      "--hash", flags->hash, "Read every tensor and print a manifest of hashes for workers");
  command->add_option("-o,--output", flags->output, "Write the manifest here")->needs(hash);
  command->callback([flags, &run] { run = [flags] { return RunInspect(*flags); }; });
}

}  // namespace stagecoach
