// Bounds on what clients and workers may ask of the coordinator, in one place.
#ifndef STAGECOACH_COORDINATOR_LIMITS_H_
#define STAGECOACH_COORDINATOR_LIMITS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "kernels/sampling.h"
#include "model/gguf.h"
#include "model/tokenizer.h"

namespace stagecoach {

// --- Requests. Over a bound: INVALID_ARGUMENT naming the field.
inline constexpr size_t kMaxTextBytes = 4 << 20;  // prompt, or text to tokenize
inline constexpr int kMaxStopStrings = 16;
inline constexpr size_t kMaxStopStringBytes = 256;
inline constexpr int kMaxStopTokenIds = 64;
inline constexpr int kMaxChoices = 16;
inline constexpr int kMaxPriority = 8;  // [-8, 8]
inline constexpr size_t kMaxUserBytes = 128;
inline constexpr size_t kMaxCacheSaltBytes = 128;
inline constexpr int kMaxDetokenizeIds = 1 << 20;
inline constexpr float kMaxTemperature = 100;
inline constexpr float kMinRepetitionPenalty = 0.01f;  // 0 itself means off
inline constexpr float kMaxRepetitionPenalty = 100;
inline constexpr float kMaxPenalty = 2;                     // presence, frequency: [-2, 2]
inline constexpr size_t kMaxScoreLogitsBytes = 64u << 20;   // of one Score with return_logits
inline constexpr size_t kMaxScoreChunkBytes = 1 << 20;      // logits in one ScoreChunk
inline constexpr size_t kMaxChatTemplateBytes = 256 << 10;  // longer ones are not told to clients

// --- Streams to clients.
// Tokens of one choice that wait for a client that does not read; more end the call with
// RESOURCE_EXHAUSTED.
inline constexpr int kMaxUnreadTokens = 256;

// --- The gRPC server.
inline constexpr int kMaxRequestBytes = 8 << 20;
inline constexpr int kMaxConcurrentStreams = 1024;  // per connection
inline constexpr int kMaxRequestMetadataBytes = 16 << 10;

// --- Workers.
inline constexpr size_t kMaxWorkers = 256;         // joined at the same time, spares included
inline constexpr size_t kMaxControlStreams = 512;  // open at the same time
inline constexpr size_t kMaxWorkerNameBytes = 128;
inline constexpr size_t kMaxAddressBytes = 256;
inline constexpr int64_t kMaxWorkerMemoryBytes = int64_t{1} << 50;
inline constexpr uint64_t kMaxEpoch = uint64_t{1} << 62;
inline constexpr size_t kMaxWorkerMessageBytes = 64 << 10;
inline constexpr int kMaxResidencyUnits = 4096;  // told to clients, of one stage
inline constexpr size_t kMaxDetailBytes = 512;   // of a worker's message, as passed on
inline constexpr std::chrono::milliseconds kHelloTimeout{5000};
inline constexpr std::chrono::milliseconds kHeartbeatTimeout{2000};
// A new epoch whose stages are not all linked by then is given up and planned again.
inline constexpr std::chrono::milliseconds kLinkTimeout{15000};
// Pause before a new epoch after one that failed without losing a worker; doubles up to the bound.
inline constexpr std::chrono::milliseconds kReplanDelay{100};
// How long a broken link waits for the control stream that tells which worker was lost.
inline constexpr std::chrono::milliseconds kFailureGrace{200};
inline constexpr std::chrono::milliseconds kMaxReplanDelay{5000};

static_assert(kMaxTextBytes <= kMaxEncodeBytes);
static_assert(kMaxTextBytes + kMaxStopStrings * kMaxStopStringBytes < kMaxRequestBytes);
static_assert(kMaxDetokenizeIds * 5 < kMaxRequestBytes);
static_assert(kMaxChatTemplateBytes <= kMaxStringBytes);
static_assert(kMaxWorkers < kMaxControlStreams);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_LIMITS_H_
