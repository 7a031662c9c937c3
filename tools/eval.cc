// stagecoach eval: perplexity of token lists or of a text, and raw logits on request.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/commands.h"
#include "tools/service.h"

namespace stagecoach {
namespace {

struct EvalFlags {
  ServiceFlags service;
  std::string tokens;
  std::string text;
  std::string logits;
  bool json = false;
};

using Document = std::vector<int32_t>;

struct Score {
  size_t positions = 0;
  double log_probability = 0;  // sum over positions

  double perplexity() const { return std::exp(-log_probability / static_cast<double>(positions)); }
};

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(fmt::format("cannot open {}", path));
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// [[1, 2], [3]] or [1, 2]: one document per list.
absl::StatusOr<std::vector<Document>> ReadTokenLists(const std::string& path) {
  auto content = ReadFile(path);
  if (!content.ok()) return content.status();
  const auto parsed = nlohmann::json::parse(*content, nullptr, /*allow_exceptions=*/false);
  const auto bad = [&] {
    return absl::InvalidArgumentError(
        fmt::format("{} must hold a JSON list of token ids, or a list of such lists", path));
  };
  if (!parsed.is_array() || parsed.empty()) return bad();
  const auto lists = parsed[0].is_array() ? parsed : nlohmann::json::array({parsed});
  std::vector<Document> documents;
  for (const auto& list : lists) {
    if (!list.is_array()) return bad();
    Document& document = documents.emplace_back();
    for (const auto& id : list) {
      if (!id.is_number_integer()) return bad();
      document.push_back(id.get<int32_t>());
    }
  }
  return documents;
}

absl::StatusOr<std::vector<Document>> ReadDocuments(const EvalFlags& flags, Client& client) {
  if (flags.tokens.empty() == flags.text.empty()) {
    return absl::InvalidArgumentError("give either --tokens FILE (JSON) or --text FILE");
  }
  if (!flags.tokens.empty()) return ReadTokenLists(flags.tokens);
  auto content = ReadFile(flags.text);
  if (!content.ok()) return content.status();
  v1::TokenizeRequest request;
  request.set_text(*content);
  request.set_add_special(true);
  auto response = client.Tokenize(request);
  if (!response.ok()) return response.status();
  return std::vector<Document>{{response->token_ids().begin(), response->token_ids().end()}};
}

absl::StatusOr<Score> ScoreDocument(Client& client, const Document& document,
                                    std::ofstream* logits) {
  v1::ScoreRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(document.begin(), document.end());
  request.set_return_logits(logits != nullptr);
  Score score;
  absl::Status status =
      client.Score(request, absl::InfiniteFuture(), [&](const v1::ScoreChunk& chunk) {
        for (const float p : chunk.logprobs()) score.log_probability += p;
        score.positions += static_cast<size_t>(chunk.logprobs_size());
        if (logits != nullptr) {
          logits->write(chunk.logits().data(), static_cast<std::streamsize>(chunk.logits().size()));
        }
      });
  if (!status.ok()) return status;
  return score;
}

void PrintScores(const std::vector<Score>& scores, const Score& total, bool json) {
  if (json) {
    nlohmann::json out = {{"perplexity", total.perplexity()},
                          {"positions", total.positions},
                          {"documents", nlohmann::json::array()}};
    for (const Score& s : scores) {
      out["documents"].push_back({{"perplexity", s.perplexity()}, {"positions", s.positions}});
    }
    fmt::print("{}\n", out.dump(2));
    return;
  }
  for (size_t i = 0; i < scores.size(); ++i) {
    fmt::print("document {}: {} positions, perplexity {:.6f}\n", i, scores[i].positions,
               scores[i].perplexity());
  }
  fmt::print("perplexity {:.6f} over {} positions of {} documents\n", total.perplexity(),
             total.positions, scores.size());
}

absl::Status RunEval(const EvalFlags& flags) {
  std::ofstream logits;
  if (!flags.logits.empty()) {
    logits.open(flags.logits, std::ios::binary | std::ios::trunc);
    if (!logits) return absl::NotFoundError(fmt::format("cannot write {}", flags.logits));
  }
  auto service = Service::Open(flags.service);
  if (!service.ok()) return service.status();
  auto documents = ReadDocuments(flags, (*service)->client());
  if (!documents.ok()) return documents.status();
  std::vector<Score> scores;
  Score total;
  for (const Document& document : *documents) {
    auto score =
        ScoreDocument((*service)->client(), document, flags.logits.empty() ? nullptr : &logits);
    if (!score.ok()) return score.status();
    total.positions += score->positions;
    total.log_probability += score->log_probability;
    scores.push_back(*score);
  }
  if (logits.is_open() && !logits.flush()) {
    return absl::InternalError(fmt::format("writing {} failed (disk full?)", flags.logits));
  }
  if (total.positions == 0) {
    return absl::InvalidArgumentError("nothing to score: documents need at least two tokens");
  }
  PrintScores(scores, total, flags.json);
  return absl::OkStatus();
}

}  // namespace

void AddEvalCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = app.add_subcommand("eval", "Perplexity of given tokens or text");
  AddServiceFlags(*command, flags->service);
  command->add_option("--tokens", flags->tokens,
                      "JSON file: token ids, BOS included; one list per document");
  command->add_option("--text", flags->text, "Text file, one document");
  command->add_option("--logits", flags->logits,
                      "Write the logits of every position here: float32 [tokens][vocabulary]");
  command->add_flag("--json", flags->json, "Machine-readable output");
  command->callback([flags, &run] { run = [flags] { return RunEval(*flags); }; });
}

}  // namespace stagecoach
