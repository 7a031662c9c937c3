// The loop's side of the pipeline: posts in, steps and events out.
#include <algorithm>

#include "coordinator/pipeline_impl.h"
#include "worker/link/spin_wait.h"

namespace stagecoach {

void Pipeline::Impl::Loop() {
  std::deque<Post> posts;
  uint64_t handled = 0;
  while (WaitForPosts(scheduler_ ? scheduler_->NextDeadline() : absl::InfiniteDuration(), posts)) {
    had_result_ = false;
    for (Post& post : posts) std::visit([this](auto& p) { Handle(p); }, post);
    if (scheduler_) {
      scheduler_->Tick(MonotonicNow());
      CollectEvents(nullptr, Payload());
    }
    SendSteps();
    PublishStats();
    Deliver();
    handled += posts.size();
    posts.clear();  // gives the credits of the frames back
    if (scheduler_ && scheduler_->in_flight() > 0) {
      SpinUntilArrival(arrivals_, handled, WhenWanted::kSleep);
    }
  }
}

bool Pipeline::Impl::WaitForPosts(absl::Duration deadline, std::deque<Post>& posts) {
  absl::MutexLock lock(&mu_);
  while (posts_.empty() && !stop_) {
    const absl::Duration wait = deadline - MonotonicNow();
    if (wait <= absl::ZeroDuration()) return true;
    wake_.WaitWithTimeout(&mu_, wait);
  }
  posts.swap(posts_);
  frames_posted_ = 0;
  return !posts.empty();
}

void Pipeline::Impl::Handle(Submitted& post) {
  Live live;
  live.observer = std::move(post.observer);
  live.sampling = post.request.sampling;
  live.score = post.request.score;
  live.summary.prompt_tokens = static_cast<uint32_t>(post.request.prompt.size());
  live.submitted = post.time;
  requests_.emplace(post.id, std::move(live));
  SchedulerRequest request{
      .id = post.id,
      .prompt = std::move(post.request.prompt),
      .max_tokens = post.request.max_tokens,
      .stop_token_ids = std::move(post.request.stop_token_ids),
      .deadline = post.deadline,
      .score = post.request.score,
      .logits = post.request.return_logits,
      .choices = post.request.choices,
      .priority = post.request.priority,
      .client = std::move(post.request.client),
      .cache_salt = std::move(post.request.cache_salt),
      .logit_biases = static_cast<int>(post.request.sampling.logit_bias.size())};
  absl::Status status = absl::UnavailableError("the epoch has ended");
  if (scheduler_) status = scheduler_->Add(std::move(request));
  if (!status.ok()) deliveries_.push_back({.event = {.id = post.id, .status = status}});
}

void Pipeline::Impl::Handle(Cancelled& post) {
  if (scheduler_) scheduler_->Cancel(post.id);
}

void Pipeline::Impl::Handle(FinishedEarly& post) {
  if (scheduler_) scheduler_->FinishEarly(post.id, post.choice);
}

void Pipeline::Impl::Handle(Received& post) {
  if (!scheduler_ || !sender_) return;  // between a failure and its Ended
  const v1::StepResult& result = post.frame.header.result();
  const Step* step = scheduler_->FindInFlight(result.step());
  if (step == nullptr) {
    absl::MutexLock lock(&mu_);
    ++stats_.dropped_frames;
    return;
  }
  absl::StatusOr<StepOutcome> outcome = ParseStepResult(post.frame, *step, options_.vocab_size);
  absl::Status status = outcome.status();
  if (status.ok()) {
    CollectEvents(nullptr, Payload());  // of posts before this one
    status = scheduler_->OnResult(result.step(), outcome->results);
  }
  if (!status.ok()) {
    sender_ = nullptr;
    EndEpoch(epoch_, status, /*failure=*/true);
    return;
  }
  had_result_ = true;
  AddTimings(result, after_idle_.front());
  after_idle_.pop_front();
  CollectEvents(&*outcome, post.frame.payload);
}

void Pipeline::Impl::Handle(Started& post) {
  scheduler_.emplace(
      SchedulerOptions{.stages = post.shape.stages,
                       .max_slots = options_.max_slots,
                       .max_context = options_.max_context,
                       .kv_blocks = post.shape.kv_blocks,
                       .max_step_tokens = post.shape.max_step_tokens,
                       .max_waiting = options_.max_waiting,
                       .max_in_flight = std::min<int>(post.shape.stages + 1, kLinkCredits - 1),
                       .hash_seed = std::random_device()()});
  counted_ = {};
  scheduler_->SetStreaming(streaming_);
  sender_ = std::move(post.sender);
  epoch_ = post.epoch;
  after_idle_.clear();
}

void Pipeline::Impl::Handle(Ended& post) {
  scheduler_->Reset(post.reason);
  CollectEvents(nullptr, Payload());
  PublishStats();
  scheduler_.reset();
  sender_ = nullptr;
}

void Pipeline::Impl::Handle(StreamingSet& post) {
  streaming_ = post.streaming;
  if (scheduler_) scheduler_->SetStreaming(streaming_);
}

void Pipeline::Impl::AddTimings(const v1::StepResult& result, bool after_idle) {
  absl::MutexLock lock(&mu_);
  const int stages = std::min(result.timings_size(), static_cast<int>(timings_.size()));
  for (int stage = 0; stage < stages; ++stage) {
    StageTotals& totals = timings_[stage];
    ++totals.steps;
    totals.compute_seconds += result.timings(stage).compute_us() * 1e-6;
    if (!after_idle) totals.wait_seconds += result.timings(stage).wait_us() * 1e-6;
  }
}

// Keeps what the scheduler has to say until the next steps have been sent. `outcome`: of the step
// whose result caused the events; nullptr if it was something else.
void Pipeline::Impl::CollectEvents(StepOutcome* outcome, const Payload& payload) {
  for (SchedulerEvent& event : scheduler_->TakeEvents()) {
    Delivery delivery;
    if (event.kind == SchedulerEvent::Kind::kToken) ++new_tokens_;
    if (event.kind == SchedulerEvent::Kind::kToken || event.kind == SchedulerEvent::Kind::kScores) {
      delivery.token = std::move(outcome->tokens[event.rows]);
      delivery.scores = std::move(outcome->scores[event.rows]);
      delivery.logits = outcome->logits[event.rows];
      delivery.payload = payload;
    }
    delivery.event = std::move(event);
    deliveries_.push_back(std::move(delivery));
  }
}

void Pipeline::Impl::SendSteps() {
  if (!scheduler_ || !sender_) return;
  while (std::optional<Step> step = scheduler_->Next()) {
    // Idle before, unless the results of this round made the step possible.
    after_idle_.push_back(scheduler_->in_flight() == 1 && !had_result_);
    Frame frame = MakeStepFrame(epoch_, *step, [this](RequestId id) {
      const Live& live = requests_.at(id);
      return SequenceInfo{&live.sampling, live.summary.prompt_tokens};
    });
    const absl::Duration now = MonotonicNow();
    for (const StepRows& rows : step->rows) {
      Live& live = requests_.at(rows.id);
      if (std::exchange(live.stepped, true)) continue;
      live.first_step = now;
      live.summary.cached_tokens = rows.start_position;
    }
    if (const absl::Status status = sender_->Send(std::move(frame)); !status.ok()) {
      sender_ = nullptr;
      EndEpoch(epoch_, status, /*failure=*/true);
      return;
    }
  }
}

void Pipeline::Impl::Deliver() {
  const absl::Duration now = MonotonicNow();
  for (Delivery& delivery : deliveries_) {
    const SchedulerEvent& event = delivery.event;
    const auto found = requests_.find(event.id);
    if (found == requests_.end()) continue;
    Live& live = found->second;
    switch (event.kind) {
      case SchedulerEvent::Kind::kToken:
        if (live.summary.completion_tokens == 0) live.first_token = now;
        live.last_token = now;
        ++live.summary.completion_tokens;
        live.observer->OnToken(event.choice, event.index, delivery.token);
        break;
      case SchedulerEvent::Kind::kChoiceEnd:
        live.observer->OnChoiceEnd(event.choice, event.status, event.finish);
        break;
      case SchedulerEvent::Kind::kScores:
        live.first_token = live.last_token = now;
        live.observer->OnScores(event.index, delivery.scores, delivery.logits);
        break;
      case SchedulerEvent::Kind::kEnd:
        DeliverEnd(event);
        break;
    }
  }
  deliveries_.clear();
}

void Pipeline::Impl::DeliverEnd(const SchedulerEvent& event) {
  const auto node = requests_.extract(event.id);
  Live& live = node.mapped();
  RequestSummary& summary = live.summary;
  summary.finish = event.finish;
  const absl::Duration now = MonotonicNow();
  const bool answered = summary.completion_tokens > 0 || (live.score && event.status.ok());
  summary.queue_seconds =
      absl::ToDoubleSeconds((live.stepped ? live.first_step : now) - live.submitted);
  if (live.stepped) {
    summary.prompt_seconds =
        absl::ToDoubleSeconds((answered ? live.first_token : now) - live.first_step);
  }
  if (answered) summary.decode_seconds = absl::ToDoubleSeconds(live.last_token - live.first_token);
  {
    absl::MutexLock lock(&mu_);
    const auto accepted = live_.extract(event.id);
    places_.Return(accepted.mapped().client, accepted.mapped().choices);
    if (event.status.ok()) {
      ++stats_.completed;
    } else if (event.status.code() == absl::StatusCode::kCancelled) {
      ++stats_.cancelled;
    } else {
      ++stats_.failed;
    }
    if (answered) {
      stats_.prompt_tokens += summary.prompt_tokens;
      retry_.AddRun(now - live.first_step);
    }
  }
  live.observer->OnEnd(event.status, summary);
}

// Before Deliver: whoever has seen a request end finds its tokens counted and its blocks given
// back.
void Pipeline::Impl::PublishStats() {
  absl::MutexLock lock(&mu_);
  stats_.running = scheduler_ ? scheduler_->running() : 0;
  stats_.waiting = scheduler_ ? scheduler_->waiting() : 0;
  const SchedulerStats now = scheduler_ ? scheduler_->stats() : counted_;
  stats_.blocks_used = now.blocks_used;
  stats_.blocks_cached = now.blocks_cached;
  stats_.blocks_free = now.blocks_free;
  stats_.cached_tokens += now.cached_tokens - counted_.cached_tokens;
  stats_.preemptions += now.preemptions - counted_.preemptions;
  counted_ = now;
  if (new_tokens_ == 0) return;
  stats_.completion_tokens += new_tokens_;
  rate_.Add(MonotonicNow(), new_tokens_);
  new_tokens_ = 0;
}

}  // namespace stagecoach
