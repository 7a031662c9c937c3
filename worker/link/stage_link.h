// StageLink: a directed, flow-controlled stream of frames from one process to its next hop.
#ifndef STAGECOACH_WORKER_LINK_STAGE_LINK_H_
#define STAGECOACH_WORKER_LINK_STAGE_LINK_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/stage.pb.h"
#include "worker/link/frame.h"

namespace stagecoach {

// Frames a receiver lets a sender have outstanding: two per micro-batch in flight is plenty.
inline constexpr uint32_t kLinkCredits = 64;

// Unique for this process; never 0.
uint64_t NextLinkId();

// The sending end. Thread-safe.
class LinkSender {
 public:
  virtual ~LinkSender() = default;  // Close()
  // Hands over one frame; blocks while there is no credit. Frames arrive in order or the link
  // breaks. Errors: UNAVAILABLE once broken or closed (also wakes a blocked call), with the reason.
  virtual absl::Status Send(Frame frame) = 0;
  // Idempotent; safe while another thread is in Send. Frames still on their way may be lost. Waits
  // for an on_broken under way (unless it is the caller); none begins afterwards.
  virtual void Close() = 0;
};

// Gives one credit back to the sender when destroyed: keep it until the frame has been consumed.
class CreditReturn {
 public:
  CreditReturn() = default;
  explicit CreditReturn(std::function<void()> give_back) : give_back_(std::move(give_back)) {}
  CreditReturn(CreditReturn&& other) noexcept { std::swap(give_back_, other.give_back_); }
  CreditReturn& operator=(CreditReturn&& other) noexcept {
    std::swap(give_back_, other.give_back_);
    return *this;
  }
  ~CreditReturn() {
    if (give_back_) give_back_();
  }

 private:
  std::function<void()> give_back_;
};

// Breaks one link from the receiving end: the sender's on_broken gets the status. OnLinkClosed
// follows, perhaps before the call returns. Any thread, any time; a closed link is left alone.
using LinkBreaker = std::function<void(const absl::Status&)>;

// The receiving end's owner. Calls for one link come one after another. Calls may come from
// transport threads and must not block.
class LinkHandler {
 public:
  virtual ~LinkHandler() = default;
  // Accepts or refuses a link: FAILED_PRECONDITION for another protocol version, model hash,
  // kernel revision or d_model; ABORTED for a stale epoch; UNAVAILABLE (try again) while this
  // process has not reached that epoch. `link` is unique for the process.
  virtual absl::Status OnLink(uint64_t link, const v1::LinkHello& hello) = 0;
  // The link was accepted; frames follow.
  virtual void OnLinkOpened(uint64_t /*link*/, LinkBreaker /*breaker*/) {}
  virtual void OnFrame(uint64_t link, Frame frame, CreditReturn credit) = 0;
  // No more calls for `link` after this one. Called only for accepted links.
  virtual void OnLinkClosed(uint64_t link, const absl::Status& reason) = 0;
};

// Dials next hops: one per transport.
class LinkDialer {
 public:
  virtual ~LinkDialer() = default;
  // Connects, sends `hello` and waits until it was accepted, at most `timeout`. Retries what is
  // UNAVAILABLE. on_broken is called at most once, from any thread, when an established link
  // breaks other than by Close(). Errors: the peer's refusal, DEADLINE_EXCEEDED.
  virtual absl::StatusOr<std::unique_ptr<LinkSender>> Dial(
      const std::string& address, const v1::LinkHello& hello, absl::Duration timeout,
      std::function<void(const absl::Status&)> on_broken) = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_STAGE_LINK_H_
