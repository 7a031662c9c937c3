// stagecoach generate: the continuation of one prompt.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
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

// What a choice said: all its events in one.
nlohmann::json ToJson(const v1::GenerateEvent& all) {
  nlohmann::json out = {
      {"text", all.text()},
      {"token_ids", nlohmann::json::array()},
      {"finish_reason", all.finish_reason() == v1::FINISH_REASON_STOP ? "stop" : "length"}};
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

void AddUsage(const v1::GenerateEvent& last, nlohmann::json& out) {
  out["usage"] = {{"prompt_tokens", last.usage().prompt_tokens()},
                  {"completion_tokens", last.usage().completion_tokens()},
                  {"cached_tokens", last.usage().cached_tokens()}};
  out["timings"] = {{"queue_ms", last.timings().queue_ms()},
                    {"prompt_ms", last.timings().prompt_ms()},
                    {"decode_ms", last.timings().decode_ms()}};
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

// One JSON object; with several choices they are in its list `choices`.
void PrintJson(const std::vector<v1::GenerateEvent>& choices, const v1::GenerateEvent& last) {
  nlohmann::json out;
  if (choices.size() == 1) {
    out = ToJson(choices[0]);
  } else {
    for (const v1::GenerateEvent& choice : choices) out["choices"].push_back(ToJson(choice));
  }
  AddUsage(last, out);
  fmt::print("{}\n", out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
}

absl::Status RunGenerate(GenerateFlags& flags) {
  if (absl::Status status = SetInput(flags); !status.ok()) return status;
  auto service = Service::Open(flags.service);
  if (!service.ok()) return service.status();
  if (!flags.json && flags.request.n() <= 1) {
    auto last = StreamToStdout((*service)->client(), flags.request);
    if (!last.ok()) return last.status();
    fmt::print(stderr, "{}\n", FormatUsage(*last));
    return absl::OkStatus();
  }
  std::vector<v1::GenerateEvent> choices(std::max(1u, flags.request.n()));
  v1::GenerateEvent last;
  absl::Status status = (*service)->client().Generate(
      flags.request, absl::InfiniteFuture(), [&](const v1::GenerateEvent& event) {
        if (event.choice() >= choices.size()) return false;
        v1::GenerateEvent& all = choices[event.choice()];
        const std::string text = all.text();
        all.MergeFrom(event);
        all.set_text(text + event.text());
        last = event;
        return true;
      });
  if (!status.ok()) return status;
  if (flags.json) {
    PrintJson(choices, last);
    return absl::OkStatus();
  }
  for (size_t i = 0; i < choices.size(); ++i) {
    fmt::print("--- choice {}\n{}\n", i, choices[i].text());
  }
  fmt::print(stderr, "{}\n", FormatUsage(last));
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
