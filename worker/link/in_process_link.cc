#include "worker/link/in_process_link.h"

#include <algorithm>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kRetryInterval = absl::Milliseconds(2);

std::string ToString(const absl::Status& status) { return std::string(status.message()); }

// Both ends of one link. No callback runs under mu_: a thread inside the handler is marked by
// `delivering_`, and a link that closes meanwhile is reported by that thread afterwards.
class Link : public std::enable_shared_from_this<Link> {
 public:
  Link(LinkHandler* handler, std::function<void(const absl::Status&)> on_broken)
      : handler_(handler), on_broken_(std::move(on_broken)) {}

  uint64_t id() const { return id_; }

  absl::Status Send(Frame frame) {
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &Link::MaySend));
      if (closed_) return absl::UnavailableError("link closed: " + ToString(reason_));
      --credits_;
      delivering_ = true;
    }
    handler_->OnFrame(id_, std::move(frame), CreditReturn([self = shared_from_this()] {
                        absl::MutexLock lock(&self->mu_);
                        ++self->credits_;
                      }));
    bool report;
    {
      absl::MutexLock lock(&mu_);
      delivering_ = false;
      report = closed_ && !std::exchange(reporting_, true);
    }
    if (report) ReportClosed();
    return absl::OkStatus();
  }

  void Close(const absl::Status& reason, bool by_sender) {
    bool report;
    const bool notify = !by_sender && on_broken_ != nullptr;
    {
      absl::MutexLock lock(&mu_);
      if (closed_) {
        const bool within_on_broken = notifier_ == std::this_thread::get_id();
        if (by_sender && !within_on_broken) {
          mu_.Await(absl::Condition(this, &Link::NobodyNotifies));
        }
        return;
      }
      closed_ = true;
      reason_ = reason;
      report = !delivering_ && !std::exchange(reporting_, true);
      if (notify) notifier_ = std::this_thread::get_id();
    }
    if (notify) {
      on_broken_(reason);
      absl::MutexLock lock(&mu_);
      notifier_ = std::thread::id();
    }
    if (report) ReportClosed();
  }

  void AwaitReported() {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&reported_));
  }

 private:
  bool MaySend() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return closed_ || (credits_ > 0 && !delivering_);
  }

  bool NobodyNotifies() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return notifier_ == std::thread::id();
  }

  void ReportClosed() {
    absl::Status reason;
    {
      absl::MutexLock lock(&mu_);
      reason = reason_;
    }
    handler_->OnLinkClosed(id_, reason);
    absl::MutexLock lock(&mu_);
    reported_ = true;
  }

  const uint64_t id_ = NextLinkId();
  LinkHandler* const handler_;
  const std::function<void(const absl::Status&)> on_broken_;

  absl::Mutex mu_;
  uint32_t credits_ ABSL_GUARDED_BY(mu_) = kLinkCredits;
  bool delivering_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  bool reporting_ ABSL_GUARDED_BY(mu_) = false;  // OnLinkClosed is about to be called
  bool reported_ ABSL_GUARDED_BY(mu_) = false;   // OnLinkClosed has returned
  absl::Status reason_ ABSL_GUARDED_BY(mu_);
  std::thread::id notifier_ ABSL_GUARDED_BY(mu_);  // is in on_broken
};

class Sender : public LinkSender {
 public:
  explicit Sender(std::shared_ptr<Link> link) : link_(std::move(link)) {}
  ~Sender() override { Close(); }
  absl::Status Send(Frame frame) override { return link_->Send(std::move(frame)); }
  void Close() override { link_->Close(absl::CancelledError("closed by the sender"), true); }

 private:
  const std::shared_ptr<Link> link_;
};

class Listener {
 public:
  explicit Listener(LinkHandler* handler) : handler_(handler) {}

  absl::StatusOr<std::unique_ptr<LinkSender>> Accept(
      const v1::LinkHello& hello, std::function<void(const absl::Status&)> on_broken) {
    {
      absl::MutexLock lock(&mu_);
      if (stopped_) return absl::UnavailableError("not listening");
      ++accepting_;
    }
    auto link = std::make_shared<Link>(handler_, std::move(on_broken));
    const absl::Status accepted = handler_->OnLink(link->id(), hello);
    if (accepted.ok()) {
      std::weak_ptr<Link> weak = link;
      handler_->OnLinkOpened(link->id(), [weak](const absl::Status& reason) {
        if (auto live = weak.lock()) live->Close(reason, /*by_sender=*/false);
      });
    }
    absl::MutexLock lock(&mu_);
    --accepting_;
    if (!accepted.ok()) return accepted;
    std::erase_if(links_, [](const std::weak_ptr<Link>& old) { return old.expired(); });
    links_.push_back(link);
    return std::make_unique<Sender>(std::move(link));
  }

  void Stop() {
    std::vector<std::weak_ptr<Link>> links;
    {
      absl::MutexLock lock(&mu_);
      stopped_ = true;
      mu_.Await(absl::Condition(this, &Listener::Idle));
      links = links_;
    }
    for (const std::weak_ptr<Link>& weak : links) {
      if (auto link = weak.lock()) {
        link->Close(absl::UnavailableError("the receiver stopped listening"), false);
        link->AwaitReported();
      }
    }
  }

 private:
  bool Idle() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return accepting_ == 0; }

  LinkHandler* const handler_;

  absl::Mutex mu_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  int accepting_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::weak_ptr<Link>> links_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

struct InProcessHub::State {
  std::shared_ptr<Listener> Find(const std::string& address) {
    absl::MutexLock lock(&mu);
    const auto it = listeners.find(address);
    return it == listeners.end() ? nullptr : it->second;
  }

  absl::Mutex mu;
  std::map<std::string, std::shared_ptr<Listener>> listeners ABSL_GUARDED_BY(mu);
};

InProcessHub::InProcessHub() : state_(std::make_shared<State>()) {}
InProcessHub::~InProcessHub() = default;

void InProcessHub::Listen(const std::string& address, LinkHandler* handler) {
  StopListening(address);
  absl::MutexLock lock(&state_->mu);
  state_->listeners[address] = std::make_shared<Listener>(handler);
}

void InProcessHub::StopListening(const std::string& address) {
  std::shared_ptr<Listener> listener;
  {
    absl::MutexLock lock(&state_->mu);
    const auto it = state_->listeners.find(address);
    if (it == state_->listeners.end()) return;
    listener = std::move(it->second);
    state_->listeners.erase(it);
  }
  listener->Stop();
}

absl::StatusOr<std::unique_ptr<LinkSender>> InProcessHub::Dial(
    const std::string& address, const v1::LinkHello& hello, absl::Duration timeout,
    std::function<void(const absl::Status&)> on_broken) {
  const absl::Time deadline = absl::Now() + timeout;
  for (;;) {
    absl::Status status = absl::UnavailableError("nothing listens there");
    if (const std::shared_ptr<Listener> listener = state_->Find(address)) {
      auto sender = listener->Accept(hello, on_broken);
      if (sender.ok() || !absl::IsUnavailable(sender.status())) return sender;
      status = sender.status();
    }
    if (absl::Now() + kRetryInterval > deadline) {
      return absl::DeadlineExceededError(
          fmt::format("could not link to {}: {}", address, ToString(status)));
    }
    absl::SleepFor(kRetryInterval);
  }
}

}  // namespace stagecoach
