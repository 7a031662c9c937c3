// stagecoach generate: the continuation of one prompt.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "tools/commands.h"
#include "tools/generate_flags.h"
#include "tools/service.h"

namespace stagecoach {
namespace {

struct GenerateFlags {
  ServiceFlags service;
  std::string prompt;
  std::vector<int32_t> prompt_ids;
  bool json = false;
  v1::GenerateRequest request;
};

nlohmann::json ToJson(const v1::GenerateEvent& all) {
  nlohmann::json out = {
      {"text", all.text()},
      {"token_ids", nlohmann::json::array()},
      {"finish_reason", all.finish_reason() == v1::FINISH_REASON_STOP ? "stop" : "length"},
      {"usage",
       {{"prompt_tokens", all.usage().prompt_tokens()},
        {"completion_tokens", all.usage().completion_tokens()}}},
      {"timings",
       {{"queue_ms", all.timings().queue_ms()},
        {"prompt_ms", all.timings().prompt_ms()},
        {"decode_ms", all.timings().decode_ms()}}}};
  if (!all.stop_match().empty()) out["stop_match"] = all.stop_match();
  for (const v1::GeneratedToken& token : all.tokens()) {
    out["token_ids"].push_back(token.token_id());
    if (!token.has_logprob()) continue;
    nlohmann::json top = nlohmann::json::array();
    for (const v1::TokenLogprob& t : token.top()) {
      top.push_back({{"token_id", t.token_id()}, {"logprob", t.logprob()}});
    }
    out["logprobs"].push_back(
        {{"token_id", token.token_id()}, {"logprob", token.logprob().logprob()}, {"top", top}});
  }
  return out;
}

absl::Status SetInput(GenerateFlags& flags) {
  if (flags.prompt.empty() == flags.prompt_ids.empty()) {
    return absl::InvalidArgumentError("give either --prompt TEXT (- reads stdin) or --prompt-ids");
  }
  if (flags.prompt == "-") {
    flags.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  if (!flags.prompt_ids.empty()) {
    auto* ids = flags.request.mutable_token_ids()->mutable_ids();
    ids->Assign(flags.prompt_ids.begin(), flags.prompt_ids.end());
  } else {
    flags.request.set_text(flags.prompt);
  }
  return absl::OkStatus();
}

absl::Status RunGenerate(GenerateFlags& flags) {
  if (absl::Status status = SetInput(flags); !status.ok()) return status;
  auto service = Service::Open(flags.service);
  if (!service.ok()) return service.status();
  if (!flags.json) {
    auto last = StreamToStdout((*service)->client(), flags.request);
    if (!last.ok()) return last.status();
    fmt::print(stderr, "{}\n", FormatUsage(*last));
    return absl::OkStatus();
  }
  v1::GenerateEvent all;
  absl::Status status = (*service)->client().Generate(flags.request, absl::InfiniteFuture(),
                                                      [&](const v1::GenerateEvent& event) {
                                                        const std::string text = all.text();
                                                        all.MergeFrom(event);
                                                        all.set_text(text + event.text());
                                                        return true;
                                                      });
  if (!status.ok()) return status;
  fmt::print("{}\n", ToJson(all).dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
  return absl::OkStatus();
}

}  // namespace

void AddGenerateCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt");
  AddServiceFlags(*command, flags->service);
  command->add_option("--prompt,-p", flags->prompt, "Text to continue; - reads stdin");
  command->add_option("--prompt-ids", flags->prompt_ids, "Token ids to continue, as they are")
      ->delimiter(',');
  command->add_flag("--json", flags->json, "One JSON object instead of streamed text");
  command->add_flag_callback(
      "--parse-special", [flags] { flags->request.set_parse_special(true); },
      "Control pieces in the text become their tokens");
  AddGenerateFlags(*command, flags->request);
  command->callback([flags, &run] { run = [flags] { return RunGenerate(*flags); }; });
}

}  // namespace stagecoach
