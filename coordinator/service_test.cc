// The coordinator's services over real gRPC, with real workers in this process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <thread>

#include "coordinator/limits.h"
#include "coordinator/service_fixture.h"
#include "proto/cluster.grpc.pb.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class ServiceTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    CoordinatorOptions options;
    options.workers = 2;
    options.max_slots = 2;
    options.max_waiting = 1;
    cluster_ = std::make_unique<TestCluster>(options);
    cluster_->StartWorker("a");
    cluster_->StartWorker("b");
    ASSERT_TRUE(Eventually([] { return cluster_->Serving(); })) << cluster_->Status().detail();
  }
  static void TearDownTestSuite() { cluster_.reset(); }

  static Generation Run(const v1::GenerateRequest& request) {
    return Generate(cluster_->stub(), request);
  }
  static std::string Detokenize(const std::vector<int32_t>& ids) {
    v1::DetokenizeRequest request;
    request.mutable_token_ids()->Add(ids.begin(), ids.end());
    v1::DetokenizeResponse response;
    grpc::ClientContext context;
    EXPECT_TRUE(cluster_->stub().Detokenize(&context, request, &response).ok());
    return response.text();
  }

  static inline std::unique_ptr<TestCluster> cluster_;
};

TEST_F(ServiceTest, GeneratesTextOfItsTokens) {
  const Generation run = Run(Story(24));
  ASSERT_TRUE(run.status.ok()) << run.status.error_message();
  ASSERT_EQ(run.ids.size(), 24u);
  EXPECT_EQ(run.ids[0], 451);  // " Once"; tests/data/golden/demo-Q4_K_M.greedy.jsonl
  // The output continues a text, so that it keeps the space that a text's start would lose.
  EXPECT_EQ(run.text, " " + Detokenize(run.ids));
  EXPECT_EQ(run.last.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(run.last.usage().completion_tokens(), 24u);
  EXPECT_EQ(run.last.usage().prompt_tokens(), 19u);
  EXPECT_GT(run.last.timings().prompt_ms(), 0);
  EXPECT_GT(run.last.timings().decode_ms(), 0);
  EXPECT_GE(run.last.timings().queue_ms(), 0);
  EXPECT_EQ(run.last.stop_match(), "");
}

TEST_F(ServiceTest, StopStringEndsTheTextBeforeIt) {
  const Generation full = Run(Story(24));
  const std::string stop = full.text.substr(20, 7);
  const std::string before = full.text.substr(0, full.text.find(stop));
  v1::GenerateRequest request = Story(0);
  request.add_stop("never to be seen");
  request.add_stop(stop);
  const Generation run = Run(request);
  ASSERT_TRUE(run.status.ok()) << run.status.error_message();
  EXPECT_EQ(run.text, before);
  EXPECT_EQ(run.last.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(run.last.stop_match(), stop);
  EXPECT_EQ(run.last.usage().completion_tokens(), run.ids.size());
  EXPECT_LT(run.ids.size(), 24u);
  request.set_include_stop(true);
  EXPECT_EQ(Run(request).text, before + stop);
  EXPECT_TRUE(Eventually([] { return cluster_->Idle(); }));
}

TEST_F(ServiceTest, StopTokenIsReportedButNotPartOfTheText) {
  const Generation full = Run(Story(8));
  const int32_t stop = full.ids[5];
  const auto first = std::find(full.ids.begin(), full.ids.end(), stop) - full.ids.begin();
  v1::GenerateRequest request = Story(0);
  request.add_stop_token_ids(stop);
  const Generation run = Run(request);
  ASSERT_TRUE(run.status.ok()) << run.status.error_message();
  ASSERT_EQ(run.ids.size(), static_cast<size_t>(first) + 1);
  EXPECT_EQ(run.ids.back(), stop);
  EXPECT_EQ(run.last.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_THAT(full.text, StartsWith(run.text));
  request.set_include_stop(true);
  EXPECT_GT(Run(request).text.size(), run.text.size());
}

TEST_F(ServiceTest, ChoicesComeOnOneStream) {
  v1::GenerateRequest request = Story(12);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(5);
  const Generation one = Run(request);
  request.set_n(3);
  grpc::ClientContext context;
  auto reader = cluster_->stub().Generate(&context, request);
  std::vector<int32_t> ids[3];
  int finished = 0;
  v1::GenerateEvent event, last;
  while (reader->Read(&event)) {
    ASSERT_LT(event.choice(), 3u);
    EXPECT_FALSE(last.has_usage()) << "an event after the last";
    for (const v1::GeneratedToken& token : event.tokens()) {
      EXPECT_EQ(token.index(), ids[event.choice()].size());
      ids[event.choice()].push_back(token.token_id());
    }
    if (event.finish_reason() == v1::FINISH_REASON_LENGTH) ++finished;
    last = event;
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(finished, 3);
  EXPECT_EQ(ids[0], one.ids);
  EXPECT_NE(ids[0], ids[1]);
  EXPECT_NE(ids[1], ids[2]);
  EXPECT_EQ(last.usage().completion_tokens(), 36u);
  EXPECT_EQ(last.usage().prompt_tokens(), 19u);

  request.set_n(4);  // two slots and one place in the queue
  const Generation many = Run(request);
  EXPECT_EQ(many.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(many.status.error_message(), StartsWith("n: "));
}

TEST_F(ServiceTest, UsageAndStatusTellOfTheCache) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Resize(100, 7);
  request.set_max_tokens(1);
  request.set_cache_salt("this test");
  EXPECT_EQ(Run(request).last.usage().cached_tokens(), 0u);
  const uint64_t before = cluster_->Status().cached_tokens();
  EXPECT_EQ(Run(request).last.usage().cached_tokens(), 96u);
  const v1::GetStatusResponse status = cluster_->Status();
  EXPECT_EQ(status.cached_tokens(), before + 96);
  EXPECT_GE(status.kv_blocks_cached(), 3u);
  EXPECT_GT(status.kv_blocks_free() + status.kv_blocks_used(), 0u);
}

TEST_F(ServiceTest, LogprobsAreThoseOfScoring) {
  v1::GenerateRequest request = Story(12);
  request.mutable_sampling()->set_logprobs(4);
  const Generation run = Run(request);
  ASSERT_EQ(run.tokens.size(), 12u) << run.status.error_message();
  for (const v1::GeneratedToken& token : run.tokens) {
    EXPECT_EQ(token.logprob().token_id(), token.token_id());
    ASSERT_EQ(token.top_size(), 3);
    EXPECT_EQ(token.top(0).token_id(), token.token_id());  // greedy
    EXPECT_GE(token.top(0).logprob(), token.top(1).logprob());
  }

  v1::TokenizeRequest tokenize;
  tokenize.set_text(kPrompt);
  tokenize.set_add_special(true);
  v1::TokenizeResponse prompt;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(cluster_->stub().Tokenize(&context, tokenize, &prompt).ok());
  }
  v1::ScoreRequest score;
  *score.mutable_token_ids()->mutable_ids() = prompt.token_ids();
  for (int32_t id : run.ids) score.mutable_token_ids()->add_ids(id);
  score.set_return_logits(true);
  grpc::ClientContext context;
  auto reader = cluster_->stub().Score(&context, score);
  std::vector<float> logprobs;
  size_t logits_bytes = 0;
  uint32_t rows = 0;
  const size_t row_bytes = cluster_->model().params().vocab_size * sizeof(float);
  v1::ScoreChunk chunk;
  while (reader->Read(&chunk)) {
    EXPECT_EQ(chunk.first_position(), rows);
    rows += static_cast<uint32_t>(chunk.logits().size() / row_bytes);
    logits_bytes += chunk.logits().size();
    logprobs.insert(logprobs.end(), chunk.logprobs().begin(), chunk.logprobs().end());
  }
  const grpc::Status status = reader->Finish();
  ASSERT_TRUE(status.ok()) << status.error_message();
  const size_t n = score.token_ids().ids_size();
  ASSERT_EQ(logprobs.size(), n - 1);
  EXPECT_EQ(logits_bytes, n * row_bytes);
  for (size_t i = 0; i < run.logprobs.size(); ++i) {
    EXPECT_EQ(logprobs[n - 1 - run.logprobs.size() + i], run.logprobs[i]) << i;
  }
}

TEST_F(ServiceTest, BadRequestsNameTheField) {
  v1::GenerateRequest request = Story(1);
  request.mutable_sampling()->set_top_p(2);
  Generation run = Run(request);
  EXPECT_EQ(run.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(run.status.error_message(), StartsWith("sampling.top_p: "));
  request = Story(1);
  request.mutable_token_ids()->mutable_ids()->Resize(5000, 1);
  run = Run(request);
  EXPECT_EQ(run.status.error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_THAT(run.status.error_message(), HasSubstr("5000 tokens"));
}

TEST_F(ServiceTest, TellsOfTheModelAndOfItself) {
  v1::GetModelResponse model;
  grpc::ClientContext context;
  ASSERT_TRUE(cluster_->stub().GetModel(&context, {}, &model).ok());
  EXPECT_EQ(model.layers(), 32u);
  EXPECT_EQ(model.d_model(), 256u);
  EXPECT_EQ(model.vocab_size(), 1024u);
  EXPECT_EQ(model.model_hash(), cluster_->model().hash());
  EXPECT_GT(model.tensor_bytes(), 10'000'000u);
  EXPECT_FALSE(model.chat_template().empty());

  ASSERT_TRUE(Run(Story(2)).status.ok());
  const v1::GetStatusResponse status = cluster_->Status();
  ASSERT_EQ(status.stages_size(), 2);
  EXPECT_EQ(status.stages(0).worker(), "a");
  EXPECT_EQ(status.stages(1).last_layer(), 32u);
  EXPECT_EQ(status.slots(), 2u);
  EXPECT_GE(status.completed_requests(), 1u);
  EXPECT_GE(status.completion_tokens(), 2u);
  EXPECT_GT(status.uptime_seconds(), 0);
  EXPECT_TRUE(Healthy(cluster_->channel(), ""));
  EXPECT_TRUE(Healthy(cluster_->channel(), "stagecoach.v1.Inference"));
}

TEST_F(ServiceTest, CancelAndDeadlineFreeTheSlot) {
  grpc::ClientContext context;
  auto reader = cluster_->stub().Generate(&context, Story(0));
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(cluster_->Status().running(), 1u);
  context.TryCancel();
  EXPECT_TRUE(Eventually([] { return cluster_->Idle(); }));
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);

  const Generation late = Generate(cluster_->stub(), Story(0), absl::Milliseconds(200));
  EXPECT_EQ(late.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([] { return cluster_->Idle(); }));
}

TEST_F(ServiceTest, FullQueueAnswersWithARetryHint) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GenerateEvent>>> readers;
  for (int i = 0; i < 3; ++i) {  // two slots and one place in the queue
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    readers.push_back(cluster_->stub().Generate(contexts.back().get(), Story(0)));
  }
  ASSERT_TRUE(Eventually([] {
    const v1::GetStatusResponse status = cluster_->Status();
    return status.running() == 2 && status.waiting() == 1;
  }));
  const Generation run = Run(Story(1));
  EXPECT_EQ(run.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(run.status.error_message(), HasSubstr("retry"));
  ASSERT_EQ(run.trailers.count("retry-after-ms"), 1u);
  EXPECT_GT(std::stoi(run.trailers.find("retry-after-ms")->second), 0);
  ASSERT_EQ(run.trailers.count("grpc-retry-pushback-ms"), 1u);
  for (int i = 0; i < 3; ++i) {
    contexts[i]->TryCancel();
    v1::GenerateEvent event;
    while (readers[i]->Read(&event)) {
    }
    EXPECT_EQ(readers[i]->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  EXPECT_TRUE(Eventually([] { return cluster_->Idle(); }));
}

TEST_F(ServiceTest, ClientThatDoesNotReadLosesItsSlotAndOthersDoNot) {
  v1::GenerateRequest request = Story(0);
  request.mutable_sampling()->set_logprobs(kMaxLogprobs);  // large events fill the window sooner
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // the window stays as it is
  auto stub = v1::Inference::NewStub(grpc::CreateCustomChannel(
      cluster_->coordinator().address(), grpc::InsecureChannelCredentials(), arguments));
  grpc::ClientContext context;
  auto reader = stub->Generate(&context, request);
  ASSERT_TRUE(Eventually([] { return cluster_->Status().running() == 1; }));
  const Generation other = Run(Story(8));
  EXPECT_TRUE(other.status.ok()) << other.status.error_message();
  ASSERT_TRUE(Eventually([] { return cluster_->Idle(); }));
  v1::GenerateEvent event;
  uint32_t tokens = 0;
  while (reader->Read(&event)) tokens += event.tokens_size();
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("does not read"));
  EXPECT_LT(tokens, 1000u);
}

TEST_F(ServiceTest, LyingWorkersAreRefusedAtTheDoor) {
  auto stub = v1::Cluster::NewStub(cluster_->channel());
  grpc::ClientContext context;
  auto stream = stub->Join(&context);
  v1::WorkerMessage message;
  message.mutable_hello()->set_protocol_version(77);
  ASSERT_TRUE(stream->Write(message));
  v1::CoordinatorMessage answer;
  EXPECT_FALSE(stream->Read(&answer));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), StartsWith("protocol_version: "));
  EXPECT_TRUE(cluster_->Serving());
}

TEST(ServiceLifeTest, WaitsLosesAndComesBack) {
  CoordinatorOptions options;
  options.workers = 2;
  TestCluster cluster(options);
  Generation run = Generate(cluster.stub(), Story(1));
  EXPECT_EQ(run.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(run.status.error_message(),
            "waiting for workers: 0 of 2 joined; no stage serves layers 0-31");
  EXPECT_EQ(cluster.Status().state(), v1::SERVICE_STATE_WAITING);
  EXPECT_FALSE(Healthy(cluster.channel(), ""));
  EXPECT_FALSE(Healthy(cluster.channel(), "stagecoach.v1.Inference"));

  cluster.StartWorker("a");
  cluster.StartWorker("b");
  ASSERT_TRUE(Eventually([&] { return cluster.Serving(); })) << cluster.Status().detail();
  const Generation before = Generate(cluster.stub(), Story(16));
  ASSERT_TRUE(before.status.ok()) << before.status.error_message();
  const uint64_t epoch = cluster.Status().epoch();

  grpc::ClientContext context;
  auto reader = cluster.stub().Generate(&context, Story(0));
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  cluster.StopWorker("b");
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  ASSERT_TRUE(Eventually([&] { return !cluster.Serving(); }));
  EXPECT_FALSE(Healthy(cluster.channel(), ""));
  run = Generate(cluster.stub(), Story(1));
  EXPECT_EQ(run.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(run.status.error_message(), HasSubstr("no stage serves layers"));
  EXPECT_THAT(run.status.error_message(), HasSubstr("worker 'b'"));

  cluster.StartWorker("b");
  ASSERT_TRUE(Eventually([&] { return cluster.Serving(); })) << cluster.Status().detail();
  EXPECT_GT(cluster.Status().epoch(), epoch);
  const Generation after = Generate(cluster.stub(), Story(16));
  EXPECT_EQ(after.ids, before.ids);
  EXPECT_EQ(after.text, before.text);
}

TEST(ServiceLifeTest, ShutdownEndsStreamsWithAReason) {
  CoordinatorOptions options;
  options.workers = 1;
  options.data_listen = "127.0.0.1:0";
  TestCluster cluster(options);
  cluster.StartWorker("a");
  ASSERT_TRUE(Eventually([&] { return cluster.Serving(); })) << cluster.Status().detail();
  grpc::ClientContext context;
  auto reader = cluster.stub().Generate(&context, Story(0));
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  std::thread stopper([&] { cluster.coordinator().Shutdown(absl::ZeroDuration()); });
  while (reader->Read(&event)) {
  }
  const grpc::Status status = reader->Finish();
  stopper.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("shutting down"));
}

TEST(CoordinatorOptionsTest, AreChecked) {
  auto model = *ModelFile::Open(kModelPath);
  const auto start = [&](const std::function<void(CoordinatorOptions&)>& set) {
    CoordinatorOptions options;
    options.listen = "127.0.0.1:0";
    set(options);
    return Coordinator::Start(model, *Tokenizer::Create(model->gguf()), options).status();
  };
  const std::vector<std::pair<std::function<void(CoordinatorOptions&)>, std::string>> cases = {
      {[](auto& o) { o.workers = 0; }, "--workers"},
      {[](auto& o) { o.workers = 33; }, "--workers"},
      {[](auto& o) { o.max_slots = 0; }, "--max-slots"},
      {[](auto& o) { o.max_context = 1; }, "--context"},
      {[](auto& o) { o.max_context = 1 << 30; }, "--context"},
      {[](auto& o) { o.max_step_tokens = -1; }, "--step-tokens"},
      {[](auto& o) { o.max_waiting = -1; }, "--max-waiting"},
      {[](auto& o) { o.listen = "nowhere"; }, "--listen"},
      {[](auto& o) { o.listen = "127.0.0.1:99999"; }, "--listen"},
      {[](auto& o) { o.data_listen = ":1x"; }, "--data-listen"},
  };
  for (const auto& [set, name] : cases) {
    const absl::Status status = start(set);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(std::string(status.message()), StartsWith(name));
  }
  EXPECT_TRUE(start([](auto&) {}).ok());
}

TEST(CoordinatorOptionsTest, APortInUseIsAnError) {
  CoordinatorOptions options;
  TestCluster cluster(options);
  options.listen = cluster.coordinator().address();
  auto model = *ModelFile::Open(kModelPath);
  const auto second = Coordinator::Start(model, *Tokenizer::Create(model->gguf()), options);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace stagecoach
