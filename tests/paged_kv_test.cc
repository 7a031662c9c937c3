// Paged KV changes no bit of what is said: cached prefixes, preemption, choices that share a
// prompt.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "coordinator/step_frame.h"
#include "tests/pipeline_ring.h"

namespace stagecoach {
namespace {

// A prompt as long as a conversation: all goldens behind each other.
TokenList LongPrompt() {
  TokenList prompt;
  for (const Golden& golden : GreedyGoldens()) {
    prompt.insert(prompt.end(), golden.prompt.begin(), golden.prompt.end());
    prompt.insert(prompt.end(), golden.continuation.begin(), golden.continuation.end());
    if (prompt.size() > 300) break;
  }
  prompt.resize(std::min<size_t>(prompt.size(), 300));
  return prompt;
}

Answer AnswerOf(const Recorder& recorder) { return {recorder.tokens, recorder.logprobs}; }

TEST(PagedKvTest, ACachedPrefixChangesNothing) {
  Ring ring(2);
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1}));
  Request request = SampledRequest(GreedyGoldens()[0], 7);
  request.prompt = LongPrompt();
  const auto first = ring.Submit(request);
  ASSERT_TRUE(first->Wait().ok());
  EXPECT_EQ(first->summary.cached_tokens, 0u);
  const auto second = ring.Submit(request);
  ASSERT_TRUE(second->Wait().ok());
  EXPECT_EQ(second->summary.cached_tokens, (request.prompt.size() - 1) / 32 * 32);
  EXPECT_EQ(AnswerOf(*second), AnswerOf(*first));
  request.cache_salt = "another client";
  const auto salted = ring.Submit(request);
  ASSERT_TRUE(salted->Wait().ok());
  EXPECT_EQ(salted->summary.cached_tokens, 0u);
  EXPECT_EQ(AnswerOf(*salted), AnswerOf(*first));
  // The conversation goes on: what was generated is cached, too.
  request.cache_salt.clear();
  request.prompt.insert(request.prompt.end(), first->tokens.begin(), first->tokens.end());
  const auto next = ring.Submit(request);
  ASSERT_TRUE(next->Wait().ok());
  EXPECT_GE(next->summary.cached_tokens, (request.prompt.size() - 1) / 32 * 32 - 32);
  EXPECT_GT(next->summary.cached_tokens, second->summary.cached_tokens);
  EXPECT_TRUE(ring.AllBlocksBack());
}

TEST(PagedKvTest, PreemptionChangesNothing) {
  std::vector<Request> requests;
  for (size_t i = 0; i < 8; ++i) {
    Request request = SampledRequest(GreedyGoldens()[i % GreedyGoldens().size()], i);
    request.max_tokens = 200;
    requests.push_back(std::move(request));
  }
  std::vector<Answer> alone;
  {
    Ring ring(1);
    ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0}));
    for (const Request& request : requests) {
      const auto recorder = ring.Submit(request);
      ASSERT_TRUE(recorder->Wait().ok());
      alone.push_back(AnswerOf(*recorder));
    }
    EXPECT_EQ(ring.pipeline().Stats().preemptions, 0u);
  }
  Ring ring(2);
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1}, /*kv_blocks=*/16));
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (const Request& request : requests) recorders.push_back(ring.Submit(request));
  for (size_t i = 0; i < recorders.size(); ++i) {
    ASSERT_TRUE(recorders[i]->Wait().ok());
    EXPECT_EQ(AnswerOf(*recorders[i]), alone[i]) << "request " << i;
  }
  EXPECT_GT(ring.pipeline().Stats().preemptions, 0u);
  EXPECT_TRUE(ring.AllBlocksBack());
}

TEST(PagedKvTest, EachChoiceSaysWhatItWouldAlone) {
  Ring ring(2);
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1}));
  for (const size_t length : {300, 289, 32, 1}) {  // the last block partly filled, begun, full
    Request request = SampledRequest(GreedyGoldens()[0], 11);
    request.prompt = LongPrompt();
    request.prompt.resize(length);
    request.choices = 4;
    const auto together = ring.Submit(request);
    ASSERT_TRUE(together->Wait().ok());
    EXPECT_EQ(together->summary.completion_tokens, 4u * request.max_tokens);
    request.choices = 1;
    for (int choice = 0; choice < 4; ++choice) {
      request.sampling.seed = ChoiceSeed(11, choice);
      request.cache_salt = "alone" + std::to_string(choice);  // nothing is shared
      const auto alone = ring.Submit(request);
      ASSERT_TRUE(alone->Wait().ok());
      EXPECT_EQ(choice == 0 ? together->tokens : together->others[choice], alone->tokens)
          << length << " tokens, choice " << choice;
    }
    EXPECT_NE(together->others[1], together->others[2]);
  }
  EXPECT_TRUE(ring.AllBlocksBack());
}

}  // namespace
}  // namespace stagecoach
