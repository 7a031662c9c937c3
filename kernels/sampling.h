// Choice of the next token from a row of logits. A pure function: same logits, parameters, history,
// seed and position give the same token on any worker.
#ifndef STAGECOACH_KERNELS_SAMPLING_H_
#define STAGECOACH_KERNELS_SAMPLING_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace stagecoach {

inline constexpr int kMaxLogprobs = 20;

inline constexpr int kMaxLogitBiases = 300;
inline constexpr float kMaxLogitBias = 100;  // [-100, 100]

struct LogitBias {
  int32_t token_id = 0;
  float bias = 0;
};

// Meaning and ranges: proto/sampling.proto.
struct SamplingParams {
  float temperature = 0;
  uint32_t top_k = 0;
  float top_p = 0;
  float min_p = 0;
  float repetition_penalty = 0;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  uint64_t seed = 0;
  uint32_t logprobs = 0;
  std::vector<LogitBias> logit_bias;  // each token once
};

struct SampledToken {
  int32_t token_id = 0;
  float logprob = 0;             // of the raw distribution (before bias, penalties, filters and
                                 // temperature); 0 if params.logprobs is 0
  std::vector<int32_t> top_ids;  // params.logprobs best, best first; empty if 0
  std::vector<float> top_logprobs;
};

// Order: bias, penalties, top-k, top-p, min-p, temperature; each filter sees what the one before it
// left, renormalised. Then one draw from a Philox generator keyed by (seed, position). A parameter
// outside its range switches its filter off; temperature 0 takes the best token after penalties.
// Arithmetic is IEEE double in a fixed order (portable_math.h), and draws are of integers
// (sampling_units.h): the choice is the same anywhere.
// logits: [vocab], not modified. history: all tokens of the sequence so far, prompt included;
// the first `prompt_tokens` of them do not count for presence and frequency. position: of the
// token being chosen. Ties go to the lower id.
// Tokens of history and bias outside the vocabulary are ignored. Thread-safe.
// Errors: DATA_LOSS if a logit is NaN or +Inf, or no logit is finite.
absl::StatusOr<SampledToken> Sample(std::span<const float> logits, const SamplingParams& params,
                                    std::span<const int32_t> history, size_t prompt_tokens,
                                    uint64_t position);

// One of the best logits of a row.
struct TopLogit {
  float logit = 0;
  int32_t id = 0;
};

// How many of the best logits of `vocab` decide what Sample chooses with these parameters: 0 if it
// must see all of them (bias, penalties, log-probabilities, an unbounded draw).
int TopLogitsNeeded(const SamplingParams& params, int vocab);

// The token that Sample would choose, from the TopLogitsNeeded best logits: best first, ties to the
// lower id. The first is NaN if any logit of the row is not finite.
// Errors: DATA_LOSS in that case.
absl::StatusOr<int32_t> SampleFromTop(std::span<const TopLogit> top, const SamplingParams& params,
                                      uint64_t position);

// Whether the best logits, however few, may decide what Sample chooses: top-p or min-p is on, top-k
// is not, and nothing needs all of them (bias, penalties, log-probabilities).
bool BestMayDecide(const SamplingParams& params, int vocab);

// Then: the token that Sample would choose, or nullopt if more than `top` is needed. top: the best
// logits of `vocab`, as for SampleFromTop. total: the sum of SamplingUnits of all tokens at
// temperature 1. Errors: as SampleFromTop.
absl::StatusOr<std::optional<int32_t>> SampleFromBest(std::span<const TopLogit> top, int vocab,
                                                      uint64_t total, const SamplingParams& params,
                                                      uint64_t position);

// A draw among all tokens, in the order of their ids (sampling_units.h).
struct TokenDraw {
  double temperature = 1;  // >= 0; 0: the best token, ties to the lower id
  double uniform = 0;      // in [0, 1)
};
// In place of the id of a token that no host knows yet: the pick of draw `index` of a step.
constexpr int32_t PickOf(int index) { return -1 - index; }
// What Sample chooses with these parameters is that; nullopt if it is not (filters, bias,
// penalties, log-probabilities).
std::optional<TokenDraw> DrawAmongAll(const SamplingParams& params, int vocab, uint64_t position);

// log softmax(logits)[token], in float64 with a fixed order. DATA_LOSS as above;
// INVALID_ARGUMENT if token is not in [0, vocab).
absl::StatusOr<float> LogProbability(std::span<const float> logits, int32_t token);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_SAMPLING_H_
