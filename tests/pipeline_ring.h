// A pipeline of real stages in one process, for tests: coordinator's pipeline, worker nodes on the
// CPU backend, links in memory; and the prompts with known continuations.
#ifndef STAGECOACH_TESTS_PIPELINE_RING_H_
#define STAGECOACH_TESTS_PIPELINE_RING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "coordinator/pipeline.h"
#include "coordinator/planner.h"
#include "kernels/cpu/cpu_backend.h"
#include "model/test_paths.h"
#include "tests/stage_chain.h"
#include "worker/hooked_file.h"
#include "worker/link/in_process_link.h"
#include "worker/worker_node.h"

namespace stagecoach {

// Under this margin between the two best tokens another correct implementation may choose the
// other.
inline constexpr double kDecisiveMargin = 0.25;
inline constexpr int kRingStepTokens = 64;

struct Golden {
  TokenList prompt, continuation;
  std::vector<double> margin;
};

inline const std::vector<Golden>& GreedyGoldens() {
  static const std::vector<Golden> goldens = [] {
    std::vector<Golden> result;
    const std::string text = ReadTestFile(TestDataPath("golden/demo-Q4_K_M.greedy.jsonl"));
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find('\n', at), text.size());
      if (end > at) {
        const nlohmann::json line = nlohmann::json::parse(text.substr(at, end - at));
        result.push_back({line["prompt_tokens"], line["continuation"], line["margin"]});
      }
      at = end + 1;
    }
    return result;
  }();
  return goldens;
}

class Recorder : public RequestObserver {
 public:
  void OnToken(int choice, uint32_t index, const SampledToken& token) override {
    absl::MutexLock lock(&mu_);
    if (choice > 0) {
      EXPECT_EQ(index, others[choice].size());
      others[choice].push_back(token.token_id);
      return;
    }
    EXPECT_EQ(index, tokens.size());
    tokens.push_back(token.token_id);
    logprobs.push_back(token.logprob);
    some_.Signal();
  }
  void OnChoiceEnd(int, const absl::Status&, Finish) override {}
  void OnScores(uint32_t, std::span<const float> scores, std::span<const float> values) override {
    logprobs.insert(logprobs.end(), scores.begin(), scores.end());
    logits.insert(logits.end(), values.begin(), values.end());
  }
  void OnEnd(const absl::Status& status, const RequestSummary& its_summary) override {
    status_ = status;
    summary = its_summary;
    end_.Notify();
  }
  absl::Status Wait() {
    EXPECT_TRUE(end_.WaitForNotificationWithTimeout(absl::Seconds(100)));
    return status_;
  }
  void AwaitTokens(size_t count) {
    absl::MutexLock lock(&mu_);
    while (tokens.size() < count) some_.Wait(&mu_);
  }
  // To be read after Wait().
  TokenList tokens;  // of the first choice, and of the others
  std::map<int, TokenList> others;
  std::vector<float> logprobs, logits;
  RequestSummary summary;

 private:
  absl::Mutex mu_;
  absl::CondVar some_;
  absl::Status status_;
  absl::Notification end_;
};

// A coordinator's pipeline and worker nodes around it.
class Ring {
 public:
  // Reads of the model go through `hook`, if there is one; activations through `transport`, if
  // there is one.
  explicit Ring(int workers, LayerStoreOptions store = {}, std::shared_ptr<ReadHook> hook = nullptr,
                DeviceTransport* transport = nullptr)
      : backend_(MakeCpuBackend({.threads = 1})), transport_(transport) {
    auto model = hook != nullptr ? OpenHookedModel("demo-Q4_K_M.gguf", std::move(hook))
                                 : ModelFile::Open(TestDataPath("demo-Q4_K_M.gguf"));
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = *model;
    pipeline_ = std::make_unique<Pipeline>(
        PipelineOptions{.model_hash = model_->hash(),
                        .kernel_revision = backend_->info().kernel_revision,
                        .d_model = model_->params().d_model,
                        .vocab_size = model_->params().vocab_size,
                        .max_slots = 8,
                        .max_context = 512});
    hub_.Listen("coordinator", pipeline_.get());
    for (int w = 0; w < workers; ++w) {
      const std::string name = "w" + std::to_string(w);
      nodes_.push_back(std::make_unique<WorkerNode>(
          backend_.get(), model_, &hub_,
          WorkerOptions{.name = name, .store = store, .transport = transport}));
      hub_.Listen(name, nodes_.back().get());
    }
  }

  ~Ring() {
    pipeline_->Shutdown();
    for (size_t w = 0; w < nodes_.size(); ++w) Kill(static_cast<int>(w));
    hub_.StopListening("coordinator");
  }

  void Kill(int worker) {
    if (!nodes_[worker]) return;
    hub_.StopListening("w" + std::to_string(worker));
    nodes_[worker]->Shutdown();
    nodes_[worker].reset();
  }

  // Forms a ring of `workers` in this order and starts stepping. kv_blocks: 0 = the default.
  void Start(uint64_t epoch, const std::vector<int>& workers, int kv_blocks = 0) {
    std::vector<WorkerCapacity> capacities;
    for (int w : workers) capacities.push_back({"w" + std::to_string(w), 1 << 30});
    const absl::StatusOr<Plan> plan =
        MakePlan(*model_, capacities, {8, 512, kRingStepTokens, {.blocks = kv_blocks}});
    ASSERT_TRUE(plan.ok()) << plan.status();
    const int stages = static_cast<int>(workers.size());
    pipeline_->ExpectEpoch(
        epoch,
        {.stages = stages, .kv_blocks = plan->kv_blocks, .max_step_tokens = plan->max_step_tokens});
    for (int stage = 0; stage < stages; ++stage) {
      v1::Assignment assignment;
      assignment.set_epoch(epoch);
      assignment.set_stage(stage);
      assignment.set_stages(stages);
      assignment.set_first_layer(plan->stages[stage].first_layer);
      assignment.set_last_layer(plan->stages[stage].last_layer);
      assignment.set_next_hop(stage + 1 < stages ? plan->stages[stage + 1].worker : "coordinator");
      assignment.set_max_slots(8);
      assignment.set_max_context(512);
      assignment.set_max_step_tokens(plan->max_step_tokens);
      assignment.set_kv_blocks(plan->kv_blocks);
      if (transport_ != nullptr) {
        if (stage > 0) assignment.set_incoming(v1::TRANSPORT_NCCL);
        if (stage + 1 < stages) assignment.set_outgoing(v1::TRANSPORT_NCCL);
      }
      nodes_[workers[stage]]->Assign(assignment);
    }
    const absl::Time limit = absl::Now() + absl::Seconds(60);
    for (int w : workers) {
      while (!nodes_[w]->Heartbeat().links_ready()) {
        ASSERT_LT(absl::Now(), limit) << "worker " << w << " is not linked";
        absl::SleepFor(absl::Milliseconds(2));
      }
    }
    v1::LinkHello hello;
    hello.set_protocol_version(kProtocolVersion);
    hello.set_epoch(epoch);
    hello.set_model_hash(model_->hash());
    hello.set_kernel_revision(backend_->info().kernel_revision);
    hello.set_to_stage(0);
    hello.set_d_model(model_->params().d_model);
    // The pipeline hears of a loss from its own two links.
    auto sender =
        hub_.Dial(plan->stages[0].worker, hello, absl::Seconds(10), [](const absl::Status&) {});
    ASSERT_TRUE(sender.ok()) << sender.status();
    pipeline_->StartEpoch(epoch, *std::move(sender));
  }

  std::shared_ptr<Recorder> Submit(Request request) {
    auto recorder = std::make_shared<Recorder>();
    const absl::StatusOr<RequestId> id = pipeline_->Submit(std::move(request), recorder);
    EXPECT_TRUE(id.ok()) << id.status();
    return recorder;
  }

  Pipeline& pipeline() { return *pipeline_; }
  const ModelFile& model() const { return *model_; }
  v1::WorkerHeartbeat Heartbeat(int worker) const { return nodes_[worker]->Heartbeat(); }

  // Whether every KV block is free or merely cached again; waits a moment for it.
  bool AllBlocksBack() {
    const absl::Time limit = absl::Now() + absl::Seconds(10);
    while (pipeline_->Stats().blocks_used > 0 && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    return pipeline_->Stats().blocks_used == 0;
  }

 private:
  std::unique_ptr<Backend> backend_;
  DeviceTransport* const transport_;
  std::shared_ptr<const ModelFile> model_;
  InProcessHub hub_;
  std::unique_ptr<Pipeline> pipeline_;
  std::vector<std::unique_ptr<WorkerNode>> nodes_;
};

inline std::vector<int> FirstWorkers(int count) {
  std::vector<int> workers;
  for (int w = 0; w < count; ++w) workers.push_back(w);
  return workers;
}

inline Request GreedyRequest(const Golden& golden) {
  Request request;
  request.prompt = golden.prompt;
  request.max_tokens = static_cast<int>(golden.continuation.size());
  return request;
}

// Tokens and the bits of their log-probabilities.
struct Answer {
  TokenList tokens;
  std::vector<float> logprobs;
  friend bool operator==(const Answer&, const Answer&) = default;
};

inline Request SampledRequest(const Golden& golden, uint64_t seed) {
  Request request = GreedyRequest(golden);
  request.max_tokens = 60;
  request.sampling = {.temperature = 1.0f, .top_k = 40, .seed = seed, .logprobs = 1};
  return request;
}

}  // namespace stagecoach

#endif  // STAGECOACH_TESTS_PIPELINE_RING_H_
