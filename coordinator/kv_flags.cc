#include "coordinator/kv_flags.h"

#include <limits>

namespace stagecoach {
namespace {

// "8GB" or "25%".
void SetKvMemory(std::string text, KvOptions& options) {
  if (!text.empty() && text.back() == '%') {
    text.pop_back();
    if (!CLI::detail::lexical_cast(text, options.memory_percent) ||
        !(options.memory_percent > 0 && options.memory_percent <= 100)) {
      throw CLI::ValidationError("--kv-memory", text + " is not a percentage above 0, up to 100");
    }
    return;
  }
  const std::string error = CLI::AsSizeValue(/*kb_is_1000=*/true)(text);  // rewrites text
  if (!error.empty() || !CLI::detail::lexical_cast(text, options.memory_bytes) ||
      options.memory_bytes == 0) {
    throw CLI::ValidationError("--kv-memory", "write it like 8GB or 25%");
  }
}

}  // namespace

const std::map<std::string, KvType>& KvTypeNames() {
  static const auto& names = *new std::map<std::string, KvType>{
      {"f16", KvType::kF16}, {"f32", KvType::kF32}, {"q8_0", KvType::kQ8_0}};
  return names;
}

void AddKvFlags(CLI::App& command, KvOptions& options) {
  command
      .add_option_function<std::string>(
          "--kv-type",
          [&options](const std::string& name) { options.type = KvTypeNames().at(name); },
          "Type of cached keys and values")
      ->check(CLI::IsMember(KvTypeNames()))
      ->default_str("f16");
  CLI::Option* const blocks =
      command
          .add_option("--kv-blocks", options.blocks,
                      "KV blocks of 32 positions for all sequences together; default: those of all "
                      "slots, at most of 16 full sequences, as far as they fit")
          ->check(CLI::Range(1, std::numeric_limits<int>::max()));
  command
      .add_option_function<std::string>(
          "--kv-memory", [&options](const std::string& text) { SetKvMemory(text, options); },
          "As many KV blocks as fit this much of every worker's memory, e.g. 8GB or 25%")
      ->excludes(blocks);
}

}  // namespace stagecoach
