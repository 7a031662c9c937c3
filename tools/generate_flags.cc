#include "tools/generate_flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "kernels/sampling.h"
#include "tools/client.h"

namespace stagecoach {
namespace {

// A flag whose value goes through a protobuf setter.
template <typename T, typename Setter>
void AddSetter(CLI::App& command, const std::string& name, const std::string& help, Setter set) {
  command.add_option_function<T>(
      name, [set](const T& value) { set(value); }, help);
}

// "id:bias"; false if it is something else.
bool ParseLogitBias(const std::string& text, LogitBias& entry) {
  const size_t colon = text.find(':');
  return colon != std::string::npos &&
         CLI::detail::lexical_cast(text.substr(0, colon), entry.token_id) &&
         CLI::detail::lexical_cast(text.substr(colon + 1), entry.bias);
}

void AddLogitBias(CLI::App& command, v1::SamplingParams* sampling) {
  const auto set = [sampling](const std::vector<std::string>& values) {
    for (const std::string& value : values) {
      LogitBias entry;
      if (ParseLogitBias(value, entry)) {
        (*sampling->mutable_logit_bias())[entry.token_id] = entry.bias;
      }
    }
  };
  const auto check = [](std::string& text) {
    LogitBias entry;
    return ParseLogitBias(text, entry) ? std::string() : text + ": not ID:BIAS";
  };
  command
      .add_option_function<std::vector<std::string>>(
          "--logit-bias", set, "ID:BIAS,... added to the logits of these tokens; -100..100")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Validator(check, "ID:BIAS"));
}

double PerSecond(double count, double ms) { return ms > 0 ? count / ms * 1000 : 0; }

const char* FinishName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "unknown";
  }
}

}  // namespace

void AddGenerateFlags(CLI::App& command, v1::GenerateRequest& request) {
  v1::SamplingParams* sampling = request.mutable_sampling();
  v1::GenerateRequest* r = &request;
  AddSetter<uint32_t>(command, "--max-tokens,-n", "Tokens to generate; 0 = until it ends",
                      [r](uint32_t v) { r->set_max_tokens(v); });
  AddSetter<uint32_t>(command, "--n", "Continuations of the prompt; each samples by itself (1)",
                      [r](uint32_t v) { r->set_n(v); });
  AddSetter<int32_t>(command, "--priority", "-8..8; higher is served first (0)",
                     [r](int32_t v) { r->set_priority(v); });
  AddSetter<std::string>(command, "--user", "Whose share of the service this request uses",
                         [r](const std::string& v) { r->set_user(v); });
  AddSetter<std::string>(command, "--cache-salt",
                         "Share cached prompts only with requests of the same salt",
                         [r](const std::string& v) { r->set_cache_salt(v); });
  AddSetter<float>(command, "--temperature,--temp", "0 = greedy (default)",
                   [=](float v) { sampling->set_temperature(v); });
  AddSetter<uint32_t>(command, "--top-k", "Keep the k best; 0 = off",
                      [=](uint32_t v) { sampling->set_top_k(v); });
  AddSetter<float>(command, "--top-p", "Keep the best up to this mass; 1 = off",
                   [=](float v) { sampling->set_top_p(v); });
  AddSetter<float>(command, "--min-p", "Drop what is below this share of the best; 0 = off",
                   [=](float v) { sampling->set_min_p(v); });
  AddSetter<float>(command, "--repetition-penalty", "1 = off",
                   [=](float v) { sampling->set_repetition_penalty(v); });
  AddSetter<float>(command, "--presence-penalty", "-2..2",
                   [=](float v) { sampling->set_presence_penalty(v); });
  AddSetter<float>(command, "--frequency-penalty", "-2..2",
                   [=](float v) { sampling->set_frequency_penalty(v); });
  AddLogitBias(command, sampling);
  AddSetter<uint64_t>(command, "--seed", "Same seed, same text (0)",
                      [=](uint64_t v) { sampling->set_seed(v); });
  AddSetter<uint32_t>(command, "--logprobs", "Log-probabilities of the n best tokens",
                      [=](uint32_t v) { sampling->set_logprobs(v); });
  AddSetter<std::vector<std::string>>(command, "--stop", "Text that ends the output",
                                      [r](const std::vector<std::string>& v) {
                                        for (const std::string& stop : v) r->add_stop(stop);
                                      });
  AddSetter<std::vector<int32_t>>(command, "--stop-ids", "Token ids that end the output",
                                  [r](const std::vector<int32_t>& v) {
                                    for (const int32_t id : v) r->add_stop_token_ids(id);
                                  });
  command.add_flag_callback(
      "--ignore-eos", [r] { r->set_ignore_eos(true); }, "Go on after the end-of-generation token");
}

absl::StatusOr<v1::GenerateEvent> StreamToStdout(Client& client,
                                                 const v1::GenerateRequest& request) {
  v1::GenerateEvent all;
  const absl::Status status =
      client.Generate(request, absl::InfiniteFuture(), [&](const v1::GenerateEvent& event) {
        std::fwrite(event.text().data(), 1, event.text().size(), stdout);
        std::fflush(stdout);
        all.MergeFrom(event);
        return true;
      });
  std::fputc('\n', stdout);
  std::fflush(stdout);
  if (!status.ok()) return status;
  return all;
}

std::string FormatUsage(const v1::GenerateEvent& last) {
  const v1::Usage& usage = last.usage();
  const v1::Timings& t = last.timings();
  const std::string cached =
      usage.cached_tokens() > 0 ? fmt::format(" ({} cached)", usage.cached_tokens()) : "";
  const double decoded = usage.completion_tokens() > 0 ? usage.completion_tokens() - 1.0 : 0;
  return fmt::format(
      "{} prompt tokens{} in {:.1f} ms ({:.0f} tok/s), {} tokens, {:.1f} tok/s, finished: {}",
      usage.prompt_tokens(), cached, t.prompt_ms(), PerSecond(usage.prompt_tokens(), t.prompt_ms()),
      usage.completion_tokens(), PerSecond(decoded, t.decode_ms()),
      FinishName(last.finish_reason()));
}

}  // namespace stagecoach
