#include "coordinator/request_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "coordinator/limits.h"
#include "model/model_file.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr int kContext = 64;

class RequestCheckTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto model = ModelFile::Open(TestDataPath("demo2-Q8_0.gguf"));
    ASSERT_TRUE(model.ok()) << model.status();
    auto tokenizer = Tokenizer::Create((*model)->gguf());
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    vocab_ = (*model)->params().vocab_size;
  }
  static void TearDownTestSuite() { tokenizer_.reset(); }

  static RequestCheck Check(int context = kContext) {
    return RequestCheck(tokenizer_, vocab_, context);
  }
  static v1::GenerateRequest Ids(int n) {
    v1::GenerateRequest message;
    message.mutable_token_ids()->mutable_ids()->Resize(n, 5);
    return message;
  }
  static v1::GenerateRequest Text(const std::string& text) {
    v1::GenerateRequest message;
    message.set_text(text);
    return message;
  }
  // The field that an INVALID_ARGUMENT names; "" if there was no error.
  static std::string Refused(const v1::GenerateRequest& message) {
    const auto request = Check().Generate(message);
    if (request.ok()) return "";
    EXPECT_EQ(request.status().code(), absl::StatusCode::kInvalidArgument) << request.status();
    const std::string text(request.status().message());
    return text.substr(0, text.find(':'));
  }
  static std::string Refused(const std::function<void(v1::SamplingParams&)>& set) {
    v1::GenerateRequest message = Ids(1);
    set(*message.mutable_sampling());
    return Refused(message);
  }

  static inline std::shared_ptr<const Tokenizer> tokenizer_;
  static inline int vocab_ = 0;
};

TEST_F(RequestCheckTest, SamplingRanges) {
  const float nan = std::nanf("");
  const float inf = std::numeric_limits<float>::infinity();
  using Params = v1::SamplingParams;
  using Setter = void (Params::*)(float);
  struct Case {
    const char* field;
    Setter set;
    std::vector<float> good, bad;
  };
  const float min = kMinRepetitionPenalty, max = kMaxRepetitionPenalty;
  const Case cases[] = {
      {"temperature",
       &Params::set_temperature,
       {0, 1e-9f, kMaxTemperature},
       {-0.1f, kMaxTemperature + 1, nan, inf, -inf}},
      {"top_p", &Params::set_top_p, {0, 0.5f, 1}, {-0.1f, 1.01f, 2, nan, inf}},
      {"min_p", &Params::set_min_p, {0, 0.99f}, {-0.1f, 1, nan, inf}},
      {"repetition_penalty",
       &Params::set_repetition_penalty,
       {0, 1, min, max},
       {-1, min / 2, max * 2, nan, inf}},
      {"presence_penalty",
       &Params::set_presence_penalty,
       {-kMaxPenalty, 0, kMaxPenalty},
       {-2.1f, 2.1f, nan, inf}},
      {"frequency_penalty",
       &Params::set_frequency_penalty,
       {-kMaxPenalty, 0, kMaxPenalty},
       {-2.1f, 2.1f, nan, -inf}},
  };
  for (const Case& c : cases) {
    for (float value : c.good) {
      EXPECT_EQ(Refused([&](Params& p) { (p.*c.set)(value); }), "") << c.field << " " << value;
    }
    for (float value : c.bad) {
      EXPECT_EQ(Refused([&](Params& p) { (p.*c.set)(value); }), std::string("sampling.") + c.field)
          << value;
    }
  }
  EXPECT_EQ(Refused([](Params& p) { p.set_logprobs(kMaxLogprobs); }), "");
  EXPECT_EQ(Refused([](Params& p) { p.set_logprobs(kMaxLogprobs + 1); }), "sampling.logprobs");
  EXPECT_EQ(Refused([](Params& p) { p.set_top_k(UINT32_MAX); }), "");
  EXPECT_EQ(Refused([](Params& p) { p.set_seed(UINT64_MAX); }), "");
}

TEST_F(RequestCheckTest, LogitBias) {
  const auto with = [](int32_t token, float bias) {
    return [=](v1::SamplingParams& p) { (*p.mutable_logit_bias())[token] = bias; };
  };
  EXPECT_EQ(Refused(with(0, kMaxLogitBias)), "");
  EXPECT_EQ(Refused(with(vocab_ - 1, -kMaxLogitBias)), "");
  EXPECT_EQ(Refused(with(vocab_, 1)), "sampling.logit_bias[" + std::to_string(vocab_) + "]");
  EXPECT_EQ(Refused(with(-1, 1)), "sampling.logit_bias[-1]");
  for (const float bad : {kMaxLogitBias + 1, -kMaxLogitBias - 1, std::nanf(""),
                          std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(Refused(with(5, bad)), "sampling.logit_bias[5]") << bad;
  }
  for (const int more : {0, 1}) {
    v1::GenerateRequest message = Ids(3);
    for (int i = 0; i < kMaxLogitBiases + more; ++i) {
      (*message.mutable_sampling()->mutable_logit_bias())[i] = 0.5f;
    }
    EXPECT_EQ(Refused(message), more == 0 ? "" : "sampling.logit_bias");
  }
}

TEST_F(RequestCheckTest, SamplingIsPassedOn) {
  v1::GenerateRequest message = Ids(3);
  message.mutable_sampling()->set_temperature(0.5f);
  message.mutable_sampling()->set_top_k(7);
  message.mutable_sampling()->set_top_p(0.25f);
  message.mutable_sampling()->set_min_p(0.125f);
  message.mutable_sampling()->set_repetition_penalty(1.5f);
  message.mutable_sampling()->set_presence_penalty(-1);
  message.mutable_sampling()->set_frequency_penalty(2);
  message.mutable_sampling()->set_seed(99);
  message.mutable_sampling()->set_logprobs(3);
  (*message.mutable_sampling()->mutable_logit_bias())[8] = -3;
  (*message.mutable_sampling()->mutable_logit_bias())[4] = 2;
  const auto request = Check().Generate(message);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->sampling.temperature, 0.5f);
  EXPECT_EQ(request->sampling.top_k, 7u);
  EXPECT_EQ(request->sampling.top_p, 0.25f);
  EXPECT_EQ(request->sampling.min_p, 0.125f);
  EXPECT_EQ(request->sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(request->sampling.presence_penalty, -1);
  EXPECT_EQ(request->sampling.frequency_penalty, 2);
  EXPECT_EQ(request->sampling.seed, 99u);
  EXPECT_EQ(request->sampling.logprobs, 3u);
  ASSERT_EQ(request->sampling.logit_bias.size(), 2u);  // by token
  EXPECT_EQ(request->sampling.logit_bias[0].token_id, 4);
  EXPECT_EQ(request->sampling.logit_bias[0].bias, 2);
  EXPECT_EQ(request->sampling.logit_bias[1].token_id, 8);
  EXPECT_FALSE(request->score);
}

TEST_F(RequestCheckTest, PromptMustBeThere) {
  EXPECT_EQ(Refused(v1::GenerateRequest()), "text or token_ids");
  EXPECT_EQ(Refused(Text("")), "text");
  EXPECT_EQ(Refused(Ids(0)), "token_ids");
}

TEST_F(RequestCheckTest, TokenIdsMustLieInTheVocabulary) {
  for (int32_t id : {-1, vocab_, INT32_MAX, INT32_MIN}) {
    v1::GenerateRequest message = Ids(2);
    message.mutable_token_ids()->set_ids(1, id);
    EXPECT_EQ(Refused(message), "token_ids[1]") << id;
    message = Ids(2);
    message.add_stop_token_ids(id);
    EXPECT_EQ(Refused(message), "stop_token_ids[0]") << id;
  }
  v1::GenerateRequest message = Ids(2);
  message.mutable_token_ids()->set_ids(0, 0);
  message.mutable_token_ids()->set_ids(1, vocab_ - 1);
  EXPECT_EQ(Refused(message), "");
}

TEST_F(RequestCheckTest, TextIsBounded) {
  const std::string over(kMaxTextBytes + 1, 'a');
  EXPECT_EQ(Refused(Text(over)), "text");
  v1::TokenizeRequest tokenize;
  tokenize.set_text(over);
  EXPECT_THAT(std::string(Check().Tokenize(tokenize).status().message()), StartsWith("text: "));
}

TEST_F(RequestCheckTest, Stops) {
  v1::GenerateRequest message = Ids(1);
  for (int i = 0; i < kMaxStopStrings; ++i) message.add_stop(std::string(kMaxStopStringBytes, 'x'));
  EXPECT_EQ(Refused(message), "");
  message.add_stop("y");
  EXPECT_EQ(Refused(message), "stop");

  message = Ids(1);
  message.add_stop("fine");
  message.add_stop(std::string(kMaxStopStringBytes + 1, 'x'));
  EXPECT_EQ(Refused(message), "stop[1]");
  message.set_stop(1, "");
  EXPECT_EQ(Refused(message), "stop[1]");

  message = Ids(1);
  message.mutable_stop_token_ids()->Resize(kMaxStopTokenIds, 1);
  EXPECT_EQ(Refused(message), "");
  message.add_stop_token_ids(1);
  EXPECT_EQ(Refused(message), "stop_token_ids");
}

TEST_F(RequestCheckTest, ScheduleFields) {
  v1::GenerateRequest message = Ids(1);
  message.set_n(kMaxChoices);
  message.set_priority(-kMaxPriority);
  message.set_user(std::string(kMaxUserBytes, 'u'));
  message.set_cache_salt(std::string(kMaxCacheSaltBytes, 's'));
  const auto request = Check().Generate(message);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->choices, kMaxChoices);
  EXPECT_EQ(request->priority, -kMaxPriority);
  EXPECT_EQ(request->client, message.user());
  EXPECT_EQ(request->cache_salt, message.cache_salt());
  EXPECT_EQ(Check().Generate(Ids(1))->choices, 1);

  for (const uint32_t n : {kMaxChoices + 1u, 1'000'000'000u, 0xffffffffu}) {
    message.set_n(n);
    EXPECT_EQ(Refused(message), "n");
  }
  message.set_n(1);
  for (const int32_t priority : {kMaxPriority + 1, -kMaxPriority - 1, INT32_MIN, INT32_MAX}) {
    message.set_priority(priority);
    EXPECT_EQ(Refused(message), "priority");
  }
  message.set_priority(kMaxPriority);
  message.mutable_user()->push_back('u');
  EXPECT_EQ(Refused(message), "user");
  message.clear_user();
  message.mutable_cache_salt()->push_back('s');
  EXPECT_EQ(Refused(message), "cache_salt");
}

TEST_F(RequestCheckTest, PromptOverTheContextNamesBothLengths) {
  EXPECT_TRUE(Check().Generate(Ids(kContext - 1)).ok());
  for (int n : {kContext, kContext + 1, 10 * kContext}) {
    const auto request = Check().Generate(Ids(n));
    EXPECT_EQ(request.status().code(), absl::StatusCode::kOutOfRange);
    EXPECT_THAT(std::string(request.status().message()), HasSubstr(std::to_string(n) + " tokens"));
    EXPECT_THAT(std::string(request.status().message()),
                HasSubstr(std::to_string(kContext) + " tokens"));
  }
}

TEST_F(RequestCheckTest, MaxTokensFillsOrFitsTheContext) {
  v1::GenerateRequest message = Ids(10);
  EXPECT_EQ(Check().Generate(message)->max_tokens, kContext - 10);
  message.set_max_tokens(3);
  EXPECT_EQ(Check().Generate(message)->max_tokens, 3);
  message.set_max_tokens(UINT32_MAX);
  EXPECT_EQ(Check().Generate(message)->max_tokens, kContext - 10);
}

TEST_F(RequestCheckTest, BosIsAddedToTextOnly) {
  v1::GenerateRequest message = Text("a");
  const auto with = Check().Generate(message);
  ASSERT_TRUE(with.ok()) << with.status();
  ASSERT_TRUE(tokenizer_->adds_bos());
  EXPECT_EQ(with->prompt, (std::vector<int32_t>{tokenizer_->bos_id(), 261}));
  message.set_omit_bos(true);
  EXPECT_EQ(Check().Generate(message)->prompt, std::vector<int32_t>{261});
  EXPECT_EQ(Check().Generate(Ids(1))->prompt, std::vector<int32_t>{5});
}

TEST_F(RequestCheckTest, SpecialTextIsPlainTextUnlessAskedFor) {
  v1::GenerateRequest message = Text("</s>");
  message.set_omit_bos(true);
  const auto plain = Check().Generate(message);
  ASSERT_TRUE(plain.ok());
  EXPECT_THAT(plain->prompt, testing::Not(testing::Contains(tokenizer_->eos_id())));
  message.set_parse_special(true);
  EXPECT_THAT(Check().Generate(message)->prompt, testing::Contains(tokenizer_->eos_id()));
}

TEST_F(RequestCheckTest, EndOfGenerationStopsUnlessIgnored) {
  v1::GenerateRequest message = Ids(1);
  message.add_stop_token_ids(9);
  EXPECT_THAT(Check().Generate(message)->stop_token_ids,
              testing::IsSupersetOf({9, static_cast<int>(tokenizer_->eos_id())}));
  message.set_ignore_eos(true);
  EXPECT_THAT(Check().Generate(message)->stop_token_ids, testing::ElementsAre(9));
}

TEST_F(RequestCheckTest, Score) {
  v1::ScoreRequest message;
  message.mutable_token_ids()->mutable_ids()->Resize(1, 5);
  EXPECT_EQ(Check().Score(message).status().code(), absl::StatusCode::kInvalidArgument);
  message.mutable_token_ids()->mutable_ids()->Resize(kContext, 5);
  message.set_return_logits(true);
  const auto request = Check().Score(message);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_TRUE(request->score);
  EXPECT_TRUE(request->return_logits);
  EXPECT_EQ(request->prompt.size(), static_cast<size_t>(kContext));
  message.mutable_token_ids()->mutable_ids()->Resize(kContext + 1, 5);
  EXPECT_EQ(Check().Score(message).status().code(), absl::StatusCode::kOutOfRange);
  message.mutable_token_ids()->set_ids(3, vocab_);
  EXPECT_EQ(Check().Score(message).status().code(), absl::StatusCode::kInvalidArgument);

  const int rows = static_cast<int>(kMaxScoreLogitsBytes / sizeof(float)) / vocab_;
  message.mutable_token_ids()->mutable_ids()->Clear();
  message.mutable_token_ids()->mutable_ids()->Resize(rows, 5);
  EXPECT_TRUE(Check(1 << 20).Score(message).ok());
  message.mutable_token_ids()->add_ids(5);
  EXPECT_THAT(std::string(Check(1 << 20).Score(message).status().message()),
              StartsWith("return_logits: "));
  message.set_return_logits(false);
  EXPECT_TRUE(Check(1 << 20).Score(message).ok());
}

TEST_F(RequestCheckTest, TokenizeAndDetokenize) {
  v1::TokenizeRequest tokenize;
  tokenize.set_text("a");
  tokenize.set_add_special(true);
  EXPECT_THAT(*Check().Tokenize(tokenize), testing::ElementsAre(tokenizer_->bos_id(), 261));
  v1::DetokenizeRequest detokenize;
  detokenize.mutable_token_ids()->Resize(kMaxDetokenizeIds, 5);
  EXPECT_TRUE(Check().Detokenize(detokenize).ok());
  detokenize.add_token_ids(5);
  EXPECT_EQ(Check().Detokenize(detokenize).code(), absl::StatusCode::kInvalidArgument);
  detokenize.clear_token_ids();
  detokenize.add_token_ids(tokenizer_->vocab_size());
  EXPECT_THAT(std::string(Check().Detokenize(detokenize).message()), StartsWith("token_ids[0]: "));
}

}  // namespace
}  // namespace stagecoach
