#include "kernels/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <string>

#include "absl/status/status.h"
#include "fmt/format.h"
#include "kernels/philox.h"
#include "kernels/portable_math.h"
#include "kernels/sampling_units.h"

namespace stagecoach {
namespace {

struct Candidate {
  float logit;
  int32_t id;
  uint64_t units;  // SamplingUnits, for the filter or draw under way
};

// The order of preference; total, so every selection below has one answer.
bool Better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// In eight lanes, so that the comparisons need not wait for each other. -Inf if empty.
float MaxLogit(std::span<const float> logits) {
  std::array<float, 8> best;
  best.fill(-kInfinity);
  size_t i = 0;
  for (; i + best.size() <= logits.size(); i += best.size()) {
    for (size_t lane = 0; lane < best.size(); ++lane) {
      best[lane] = std::max(best[lane], logits[i + lane]);
    }
  }
  for (; i < logits.size(); ++i) best[0] = std::max(best[0], logits[i]);
  return *std::ranges::max_element(best);
}

// The lowest id among the largest; `best` is the largest.
int32_t FirstOf(std::span<const float> logits, float best) {
  return static_cast<int32_t>(std::ranges::find(logits, best) - logits.begin());
}

absl::Status CheckLogits(std::span<const float> logits) {
  size_t below_infinity = 0;  // NaN is not
  for (const float logit : logits) below_infinity += logit < kInfinity;
  if (below_infinity != logits.size()) {
    const auto bad = std::ranges::find_if(logits, [](float x) { return !(x < kInfinity); });
    return absl::DataLossError(
        fmt::format("logit {} of {} is {}", bad - logits.begin(), logits.size(), *bad));
  }
  if (MaxLogit(logits) == -kInfinity) return absl::DataLossError("no logit is finite");
  return absl::OkStatus();
}

// log(sum(exp(logits))), added up in order of id.
double LogSumExp(std::span<const float> logits) {
  const double best = MaxLogit(logits);
  double sum = 0;
  for (const float logit : logits) sum += PortableExp(logit - best);
  return best + PortableLog(sum);
}

struct Penalties {
  double repetition = 1;
  double presence = 0;
  double frequency = 0;
  bool any() const { return repetition != 1 || presence != 0 || frequency != 0; }
};

// Those that are switched on.
Penalties PenaltiesOf(const SamplingParams& params) {
  Penalties penalties;
  const double repetition = params.repetition_penalty;
  if (repetition > 0 && std::isfinite(repetition)) penalties.repetition = repetition;
  if (std::isfinite(params.presence_penalty)) penalties.presence = params.presence_penalty;
  if (std::isfinite(params.frequency_penalty)) penalties.frequency = params.frequency_penalty;
  return penalties;
}

// `logits`, or a changed copy of it in `scratch` if there is a bias or a penalty is on.
std::span<const float> Adjust(std::span<const float> logits, const SamplingParams& params,
                              std::span<const int32_t> history, size_t prompt_tokens,
                              std::vector<float>& scratch) {
  const Penalties penalties = PenaltiesOf(params);
  if (!penalties.any() && params.logit_bias.empty()) return logits;
  const auto [repetition, presence, frequency] = penalties;
  const bool repetition_on = repetition != 1;

  scratch.assign(logits.begin(), logits.end());
  const auto in_vocabulary = [&](int32_t id) {
    return id >= 0 && static_cast<size_t>(id) < logits.size();
  };
  for (const LogitBias& entry : params.logit_bias) {
    if (in_vocabulary(entry.token_id)) scratch[entry.token_id] += entry.bias;
  }
  if (!penalties.any()) return scratch;
  // Per token: 1 + how often it was generated, 0 once it is dealt with or if it was never seen.
  thread_local std::vector<uint32_t> seen;
  seen.assign(logits.size(), 0);
  for (size_t i = 0; i < history.size(); ++i) {
    if (!in_vocabulary(history[i])) continue;
    uint32_t& entry = seen[history[i]];
    entry = std::max(entry, 1u) + (i >= prompt_tokens ? 1 : 0);
  }
  for (const int32_t id : history) {
    if (!in_vocabulary(id) || seen[id] == 0) continue;
    const uint32_t generated = seen[id] - 1;
    seen[id] = 0;
    double logit = scratch[id];
    if (repetition_on) logit = logit > 0 ? logit / repetition : logit * repetition;
    logit -= frequency * generated + (generated > 0 ? presence : 0);
    scratch[id] = static_cast<float>(logit);
  }
  return scratch;
}

// The `count` best tokens, best first, by a bounded heap: one pass over the vocabulary.
void SelectBest(std::span<const float> logits, size_t count, std::vector<Candidate>& out) {
  out.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    const Candidate candidate = {logits[i], static_cast<int32_t>(i), 0};
    if (out.size() == count) {  // the heap's front is the worst of those kept
      if (!Better(candidate, out.front())) continue;
      std::pop_heap(out.begin(), out.end(), Better);
      out.back() = candidate;
    } else {
      out.push_back(candidate);
    }
    std::push_heap(out.begin(), out.end(), Better);
  }
  std::sort_heap(out.begin(), out.end(), Better);
}

// Sets the units and returns their sum.
uint64_t SetUnits(std::vector<Candidate>& candidates, float best, double temperature) {
  const double* const powers = portable_math_internal::kPowerTable.data();
  uint64_t sum = 0;
  for (Candidate& candidate : candidates) {
    candidate.units = SamplingUnits(powers, candidate.logit, best, temperature);
    sum += candidate.units;
  }
  return sum;
}

// Keeps the smallest set of best tokens that holds at least top_p of the probability, in their old
// order. Finds the last token of that set by bisection on rank, each step a partition around the
// middle: linear in the candidates however flat the distribution.
void KeepTopP(std::vector<Candidate>& candidates, float best, double top_p) {
  const uint64_t total = SetUnits(candidates, best, 1);
  const auto sum = [](auto begin, auto end) {
    return std::accumulate(begin, end, uint64_t{0},
                           [](uint64_t total, const Candidate& c) { return total + c.units; });
  };
  thread_local std::vector<Candidate> ranked;
  ranked = candidates;
  auto begin = ranked.begin(), end = ranked.end();
  auto wanted = static_cast<uint64_t>(top_p * static_cast<double>(total));
  ptrdiff_t step = 256;  // usually few tokens hold nearly everything
  while (end - begin > 1) {
    const auto middle = begin + std::min(step, (end - begin) / 2);
    std::nth_element(begin, middle, end, Better);
    const uint64_t upper = sum(begin, middle);
    if (upper >= wanted) {
      end = middle;
    } else {
      wanted -= upper;
      begin = middle;
    }
    step = end - begin;
  }
  const Candidate last = *begin;
  std::erase_if(candidates, [&](const Candidate& candidate) { return Better(last, candidate); });
}

bool TopPOn(const SamplingParams& params) { return params.top_p > 0 && params.top_p < 1; }
bool MinPOn(const SamplingParams& params) { return params.min_p > 0 && params.min_p < 1; }

// The choice is all that is wanted, and no logit is changed before it.
bool OfRawLogits(const SamplingParams& params) {
  return params.logprobs == 0 && params.logit_bias.empty() && !PenaltiesOf(params).any();
}

// Besides, it is drawn, and top-k takes nothing away.
bool OfAllTokens(const SamplingParams& params, int vocab) {
  const bool bounded = params.top_k > 0 && params.top_k < static_cast<uint32_t>(vocab);
  return OfRawLogits(params) && params.temperature > 0 && !bounded;
}

// What top-p and min-p leave of the candidates; never empty.
void FilterCandidates(float best, const SamplingParams& params,
                      std::vector<Candidate>& candidates) {
  if (TopPOn(params)) KeepTopP(candidates, best, params.top_p);
  if (MinPOn(params)) {
    const double threshold = best + PortableLog(params.min_p);
    std::erase_if(candidates, [&](const Candidate& c) { return c.logit < threshold; });
  }
}

// What the filters leave of `logits`; never empty.
void Filter(std::span<const float> logits, float best, const SamplingParams& params,
            std::vector<Candidate>& out) {
  if (params.top_k > 0 && params.top_k < logits.size()) {
    SelectBest(logits, params.top_k, out);
  } else {
    out.resize(logits.size());
    for (size_t i = 0; i < logits.size(); ++i) out[i] = {logits[i], static_cast<int32_t>(i), 0};
  }
  FilterCandidates(best, params, out);
}

// `best`: the largest logit among the candidates.
int32_t Draw(std::vector<Candidate>& candidates, float best, double temperature, double uniform) {
  const uint64_t target = DrawTarget(SetUnits(candidates, best, temperature), uniform);
  uint64_t sum = 0;
  for (const Candidate& candidate : candidates) {
    sum += candidate.units;
    if (sum > target) return candidate.id;
  }
  return candidates.front().id;  // not reached: the best one has units
}

}  // namespace

absl::StatusOr<SampledToken> Sample(std::span<const float> logits, const SamplingParams& params,
                                    std::span<const int32_t> history, size_t prompt_tokens,
                                    uint64_t position) {
  if (absl::Status status = CheckLogits(logits); !status.ok()) return status;
  // Kept per thread, so that a warm worker allocates nothing here.
  thread_local std::vector<float> adjusted_scratch;
  thread_local std::vector<Candidate> candidates;
  const std::span<const float> adjusted =
      Adjust(logits, params, history, prompt_tokens, adjusted_scratch);

  const float best = MaxLogit(adjusted);
  SampledToken token;
  if (params.temperature > 0) {
    Filter(adjusted, best, params, candidates);
    token.token_id =
        Draw(candidates, best, params.temperature, PhiloxUniform(params.seed, position));
  } else {
    token.token_id = FirstOf(adjusted, best);
  }
  if (params.logprobs == 0) return token;

  const double normaliser = LogSumExp(logits);
  token.logprob = static_cast<float>(logits[token.token_id] - normaliser);
  SelectBest(logits, std::min<size_t>(params.logprobs, kMaxLogprobs), candidates);
  for (const Candidate& candidate : candidates) {
    token.top_ids.push_back(candidate.id);
    token.top_logprobs.push_back(static_cast<float>(candidate.logit - normaliser));
  }
  return token;
}

int TopLogitsNeeded(const SamplingParams& params, int vocab) {
  if (!OfRawLogits(params)) return 0;
  if (!(params.temperature > 0)) return 1;
  return params.top_k < static_cast<uint32_t>(vocab) ? static_cast<int>(params.top_k) : 0;
}

bool BestMayDecide(const SamplingParams& params, int vocab) {
  return OfAllTokens(params, vocab) && (TopPOn(params) || MinPOn(params));
}

absl::StatusOr<std::optional<int32_t>> SampleFromBest(std::span<const TopLogit> top, int vocab,
                                                      uint64_t total, const SamplingParams& params,
                                                      uint64_t position) {
  const float best = top.front().logit;
  if (!std::isfinite(best)) return absl::DataLossError("non-finite logits");
  thread_local std::vector<Candidate> kept;
  kept.clear();
  bool ended = top.size() == static_cast<size_t>(vocab);  // there are no others
  const bool by_top_p = TopPOn(params);
  const double threshold = MinPOn(params) ? best + PortableLog(params.min_p) : -double{kInfinity};
  const auto wanted =
      by_top_p ? static_cast<uint64_t>(params.top_p * static_cast<double>(total)) : 0;
  const double* const powers = portable_math_internal::kPowerTable.data();
  uint64_t sum = 0;
  for (const TopLogit& entry : top) {
    if (entry.logit < threshold) {
      ended = true;
      break;
    }
    kept.push_back({entry.logit, entry.id, 0});
    if (!by_top_p) continue;
    sum += SamplingUnits(powers, entry.logit, best, 1);
    if (sum >= wanted) {
      ended = true;
      break;
    }
  }
  if (!ended) return std::nullopt;
  std::ranges::sort(kept, {}, &Candidate::id);  // as Filter leaves them
  return Draw(kept, best, params.temperature, PhiloxUniform(params.seed, position));
}

std::optional<TokenDraw> DrawAmongAll(const SamplingParams& params, int vocab, uint64_t position) {
  if (TopLogitsNeeded(params, vocab) == 1) return TokenDraw{.temperature = 0};
  if (!OfAllTokens(params, vocab) || TopPOn(params) || MinPOn(params)) return std::nullopt;
  return TokenDraw{.temperature = params.temperature,
                   .uniform = PhiloxUniform(params.seed, position)};
}

absl::StatusOr<int32_t> SampleFromTop(std::span<const TopLogit> top, const SamplingParams& params,
                                      uint64_t position) {
  const float best = top.front().logit;
  if (!std::isfinite(best)) return absl::DataLossError("non-finite logits");
  if (!(params.temperature > 0)) return top.front().id;
  thread_local std::vector<Candidate> candidates;
  candidates.clear();
  for (const TopLogit& entry : top) candidates.push_back({entry.logit, entry.id, 0});
  FilterCandidates(best, params, candidates);
  return Draw(candidates, best, params.temperature, PhiloxUniform(params.seed, position));
}

absl::StatusOr<float> LogProbability(std::span<const float> logits, int32_t token) {
  if (token < 0 || static_cast<size_t>(token) >= logits.size()) {
    return absl::InvalidArgumentError(
        fmt::format("token {} is not in a vocabulary of {}", token, logits.size()));
  }
  if (absl::Status status = CheckLogits(logits); !status.ok()) return status;
  return static_cast<float>(logits[token] - LogSumExp(logits));
}

}  // namespace stagecoach
