// The callers' side of the pipeline: everything here may be called from any thread.
#include "coordinator/pipeline.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "coordinator/pipeline_impl.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

absl::Duration ToMonotonic(absl::Time deadline) {
  if (deadline == absl::InfiniteFuture()) return absl::InfiniteDuration();
  return MonotonicNow() + (deadline - absl::Now());
}

}  // namespace

// --- Epochs.

void Pipeline::Impl::ExpectEpoch(uint64_t epoch, const EpochShape& shape) {
  EndEpoch(0, absl::UnavailableError(fmt::format("epoch {} takes over", epoch)), false);
  absl::MutexLock lock(&mu_);
  expected_epoch_ = epoch;
  last_epoch_ = std::max(last_epoch_, epoch);
  shape_ = shape;
}

void Pipeline::Impl::StartEpoch(uint64_t epoch, std::shared_ptr<LinkSender> sender) {
  {
    absl::MutexLock lock(&mu_);
    if (epoch == expected_epoch_ && epoch != 0 && !serving_ && !stop_) {
      serving_ = true;
      current_sender_ = sender;
      timings_.assign(shape_.stages, {});
      Enqueue(Started{epoch, shape_, std::move(sender)});
      return;
    }
  }
  sender->Close();
}

void Pipeline::Impl::EndEpoch(uint64_t only, const absl::Status& reason, bool failure) {
  std::shared_ptr<LinkSender> sender;
  std::function<void(uint64_t, const absl::Status&)> callback;
  uint64_t epoch = 0;
  {
    absl::MutexLock lock(&mu_);
    if (only != 0 && only != expected_epoch_) return;
    epoch = std::exchange(expected_epoch_, 0);
    reason_ = absl::UnavailableError(std::string(reason.message()));
    linked_ = false;
    sender = std::move(current_sender_);
    current_sender_ = nullptr;
    if (std::exchange(serving_, false)) requests_to_end_ = true;
    if (failure && epoch != 0) callback = on_failure_;
    if (requests_to_end_ && !callback) {
      requests_to_end_ = false;
      Enqueue(Ended{reason_});
    }
  }
  if (sender) sender->Close();  // also wakes the loop if it waits for credit
  if (callback) callback(epoch, reason);
}

void Pipeline::Impl::SetStreaming(bool streaming) {
  absl::MutexLock lock(&mu_);
  if (std::exchange(streaming_set_, streaming) != streaming) Enqueue(StreamingSet{streaming});
}

// --- Requests.

absl::StatusOr<RequestId> Pipeline::Impl::Submit(Request request,
                                                 std::shared_ptr<RequestObserver> observer) {
  const size_t needed = request.prompt.size() + (request.score ? 0 : request.max_tokens);
  if (request.prompt.empty() || (!request.score && request.max_tokens < 1) ||
      needed > static_cast<size_t>(options_.max_context)) {
    return absl::InvalidArgumentError(
        fmt::format("a prompt of {} tokens and {} more do not fit a context of {}",
                    request.prompt.size(), request.max_tokens, options_.max_context));
  }
  const int places = options_.max_slots + options_.max_waiting;
  if (request.choices < 1 || request.choices > places) {
    return absl::InvalidArgumentError(
        fmt::format("n: {} choices where {} sequences may run or wait", request.choices, places));
  }
  const absl::Duration deadline = ToMonotonic(request.deadline);
  absl::MutexLock lock(&mu_);
  if (!serving_) return reason_;
  if (!places_.Take(request.client, request.choices)) {
    return absl::ResourceExhaustedError(
        fmt::format("{} sequences are running or waiting, {} of them of this client, out of {}; "
                    "retry in ~{} ms",
                    places_.taken(), places_.taken_by(request.client), places_.total(),
                    absl::ToInt64Milliseconds(retry_.Wait(options_.max_slots))));
  }
  RequestId id = 0;
  while (id == 0 || live_.contains(id)) id = random_();
  live_.emplace(id, Accepted{.client = request.client,
                             .choices = request.choices,
                             .finished = std::vector<bool>(request.choices)});
  Enqueue(Submitted{id, std::move(request), std::move(observer), MonotonicNow(), deadline});
  return id;
}

void Pipeline::Impl::Cancel(RequestId id) {
  absl::MutexLock lock(&mu_);
  const auto found = live_.find(id);
  if (found == live_.end() || std::exchange(found->second.cancelled, true)) return;
  Enqueue(Cancelled{id});
}

void Pipeline::Impl::FinishEarly(RequestId id, int choice) {
  absl::MutexLock lock(&mu_);
  const auto found = live_.find(id);
  if (found == live_.end() || choice < 0 || choice >= found->second.choices) return;
  if (found->second.finished[choice]) return;
  found->second.finished[choice] = true;
  Enqueue(FinishedEarly{id, choice});
}

PipelineStats Pipeline::Impl::Stats() const {
  absl::MutexLock lock(&mu_);
  PipelineStats stats = stats_;
  stats.serving = serving_;
  stats.epoch = expected_epoch_;
  stats.slots = options_.max_slots;
  stats.retry_after = retry_.Wait(options_.max_slots);
  stats.recent_tokens_per_second = rate_.PerSecond(MonotonicNow());
  return stats;
}

std::vector<StageTotals> Pipeline::Impl::StageTimings() const {
  absl::MutexLock lock(&mu_);
  return timings_;
}

void Pipeline::Impl::SetFailureCallback(
    std::function<void(uint64_t, const absl::Status&)> callback) {
  absl::MutexLock lock(&mu_);
  on_failure_ = std::move(callback);
}

void Pipeline::Impl::Shutdown() {
  std::call_once(shut_down_, [this] {
    EndEpoch(0, absl::UnavailableError("the coordinator is shutting down"), false);
    {
      absl::MutexLock lock(&mu_);
      stop_ = true;
      wake_.Signal();
    }
    loop_.join();
  });
}

// --- The link of the last stage.

absl::Status Pipeline::Impl::OnLink(uint64_t link, const v1::LinkHello& hello) {
  const auto differs = [](std::string_view what, auto theirs, auto ours) {
    return absl::FailedPreconditionError(
        fmt::format("the link has {} {}, this coordinator {}", what, theirs, ours));
  };
  if (hello.protocol_version() != kProtocolVersion) {
    return differs("protocol version", hello.protocol_version(), kProtocolVersion);
  }
  if (hello.model_hash() != options_.model_hash) {
    return absl::FailedPreconditionError("the link is of another model file");
  }
  if (hello.kernel_revision() != options_.kernel_revision) {
    return absl::FailedPreconditionError(
        fmt::format("the link is of another kernel revision than '{}'", options_.kernel_revision));
  }
  if (hello.d_model() != static_cast<uint32_t>(options_.d_model)) {
    return differs("d_model", hello.d_model(), options_.d_model);
  }
  if (!hello.nccl_id().empty()) {
    return absl::FailedPreconditionError("the link is for results by NCCL, which go in frames");
  }
  absl::MutexLock lock(&mu_);
  if (hello.epoch() > last_epoch_) {
    return absl::UnavailableError(fmt::format("epoch {} has not begun here", hello.epoch()));
  }
  if (hello.epoch() != expected_epoch_) {
    return absl::AbortedError(fmt::format("epoch {} is over", hello.epoch()));
  }
  if (hello.to_stage() != static_cast<uint32_t>(shape_.stages)) {
    return differs("a stage count of", hello.to_stage(), shape_.stages);
  }
  if (linked_) return absl::AbortedError("the last stage of this epoch is linked already");
  link_ = link;
  linked_ = true;
  return absl::OkStatus();
}

void Pipeline::Impl::OnFrame(uint64_t link, Frame frame, CreditReturn credit) {
  uint64_t epoch = 0;
  {
    absl::MutexLock lock(&mu_);
    if (!serving_ || !linked_ || link != link_ || frame.header.epoch() != expected_epoch_) {
      ++stats_.dropped_frames;
      return;
    }
    // The credits bound what can be queued here.
    if (frame.header.has_result() && frames_posted_ < static_cast<int>(kLinkCredits)) {
      ++frames_posted_;
      Enqueue(Received{std::move(frame), std::move(credit)});
      return;
    }
    epoch = expected_epoch_;
  }
  EndEpoch(epoch,
           absl::InvalidArgumentError("the last stage sent a frame that is not a result "
                                      "or more frames than it had credits for"),
           /*failure=*/true);
}

void Pipeline::Impl::OnLinkClosed(uint64_t link, const absl::Status& reason) {
  uint64_t epoch = 0;
  {
    absl::MutexLock lock(&mu_);
    if (!linked_ || link != link_) return;
    epoch = expected_epoch_;
  }
  EndEpoch(epoch,
           absl::UnavailableError(
               fmt::format("the link from the last stage broke: {}",
                           std::string_view(reason.message().data(), reason.message().size()))),
           /*failure=*/true);
}

// --- The class itself.

Pipeline::Pipeline(PipelineOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
Pipeline::~Pipeline() { impl_->Shutdown(); }

void Pipeline::ExpectEpoch(uint64_t epoch, const EpochShape& shape) {
  impl_->ExpectEpoch(epoch, shape);
}
void Pipeline::StartEpoch(uint64_t epoch, std::unique_ptr<LinkSender> to_first_stage) {
  impl_->StartEpoch(epoch, std::move(to_first_stage));
}
void Pipeline::EndEpoch(const absl::Status& reason) { impl_->EndEpoch(0, reason, false); }
void Pipeline::SetStreaming(bool streaming) { impl_->SetStreaming(streaming); }
absl::StatusOr<RequestId> Pipeline::Submit(Request request,
                                           std::shared_ptr<RequestObserver> observer) {
  return impl_->Submit(std::move(request), std::move(observer));
}
void Pipeline::Cancel(RequestId id) { impl_->Cancel(id); }
void Pipeline::FinishEarly(RequestId id, int choice) { impl_->FinishEarly(id, choice); }
PipelineStats Pipeline::Stats() const { return impl_->Stats(); }
std::vector<StageTotals> Pipeline::StageTimings() const { return impl_->StageTimings(); }
void Pipeline::SetFailureCallback(std::function<void(uint64_t, const absl::Status&)> callback) {
  impl_->SetFailureCallback(std::move(callback));
}
void Pipeline::Shutdown() { impl_->Shutdown(); }
absl::Status Pipeline::OnLink(uint64_t link, const v1::LinkHello& hello) {
  return impl_->OnLink(link, hello);
}
void Pipeline::OnFrame(uint64_t link, Frame frame, CreditReturn credit) {
  impl_->OnFrame(link, std::move(frame), std::move(credit));
}
void Pipeline::OnLinkClosed(uint64_t link, const absl::Status& reason) {
  impl_->OnLinkClosed(link, reason);
}

}  // namespace stagecoach
