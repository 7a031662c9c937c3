#include "coordinator/generate_stream.h"

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

v1::GenerateEvent TokenEvent(uint32_t choice, int32_t token, const char* text) {
  v1::GenerateEvent event;
  event.set_choice(choice);
  event.add_tokens()->set_token_id(token);
  event.set_text(text);
  return event;
}

TEST(JoinEvents, SaysWhatBothSay) {
  v1::GenerateEvent waiting = TokenEvent(1, 7, "to");
  EXPECT_TRUE(JoinEvents(waiting, TokenEvent(1, 8, "")));
  EXPECT_TRUE(JoinEvents(waiting, TokenEvent(1, 9, "ken")));
  EXPECT_EQ(waiting.choice(), 1u);
  EXPECT_EQ(waiting.text(), "token");
  ASSERT_EQ(waiting.tokens_size(), 3);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(waiting.tokens(i).token_id(), 7 + i);
  EXPECT_EQ(waiting.finish_reason(), v1::FINISH_REASON_UNSPECIFIED);
}

TEST(JoinEvents, AnEndStaysOne) {
  v1::GenerateEvent waiting = TokenEvent(0, 7, "a"), end;
  end.set_text("b");
  end.set_finish_reason(v1::FINISH_REASON_STOP);
  end.set_stop_match("c");
  end.mutable_usage()->set_completion_tokens(1);
  EXPECT_TRUE(JoinEvents(waiting, end));
  EXPECT_EQ(waiting.text(), "ab");
  EXPECT_EQ(waiting.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(waiting.stop_match(), "c");
  EXPECT_EQ(waiting.usage().completion_tokens(), 1u);
  EXPECT_EQ(waiting.tokens_size(), 1);
}

TEST(JoinEvents, NotOfDifferentChoices) {
  v1::GenerateEvent waiting = TokenEvent(0, 7, "a");
  EXPECT_FALSE(JoinEvents(waiting, TokenEvent(1, 8, "b")));
  EXPECT_EQ(waiting.text(), "a");
  EXPECT_EQ(waiting.tokens_size(), 1);
}

}  // namespace
}  // namespace stagecoach
