// stagecoach synth: a GGUF file with random weights in the shape of a real model.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <string>

#include "absl/time/clock.h"
#include "model/model_file.h"
#include "model/synth.h"
#include "tools/commands.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

struct SynthFlags {
  SynthSpec spec;
  std::string output;
};

std::string Join(const std::vector<std::string_view>& names) {
  std::string out;
  for (const std::string_view name : names) {
    out += fmt::format("{}{}", out.empty() ? "" : ", ", name);
  }
  return out;
}

absl::Status RunSynth(const SynthFlags& flags) {
  const std::string path = flags.output.empty()
                               ? fmt::format("{}-{}.gguf", flags.spec.shape, flags.spec.types)
                               : flags.output;
  const absl::Time start = absl::Now();
  if (absl::Status status = WriteSyntheticModel(path, flags.spec); !status.ok()) return status;
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  auto model = ModelFile::Open(path);
  if (!model.ok()) return model.status();
  const uint64_t bytes = (*model)->file(0).size();
  fmt::print(stderr, "{}: {}, {} layers, written in {:.1f} s ({}/s)\n", path, FormatBytes(bytes),
             (*model)->params().layers, seconds,
             FormatBytes(static_cast<uint64_t>(static_cast<double>(bytes) / seconds)));
  fmt::print("{}\n", path);
  return absl::OkStatus();
}

}  // namespace

void AddSynthCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<SynthFlags>();
  CLI::App* command =
      app.add_subcommand("synth", "Write a model with random weights in a real model's shape");
  command->add_option("--shape", flags->spec.shape, Join(SynthShapeNames()))->required();
  command->add_option("--type", flags->spec.types, Join(SynthTypeNames()))->capture_default_str();
  command->add_option("--seed", flags->spec.seed, "Same seed, same bytes")->capture_default_str();
  command->add_option("--output,-o", flags->output, "Default: SHAPE-TYPE.gguf");
  command->callback([flags, &run] { run = [flags] { return RunSynth(*flags); }; });
}

}  // namespace stagecoach
