// StageLinks within one process: for tests, and to tell transport cost from pipeline cost.
#ifndef STAGECOACH_WORKER_LINK_IN_PROCESS_LINK_H_
#define STAGECOACH_WORKER_LINK_IN_PROCESS_LINK_H_

#include <memory>
#include <string>

#include "worker/link/stage_link.h"

namespace stagecoach {

// A set of addresses inside the process. Thread-safe. Handlers are called on the sender's thread.
class InProcessHub : public LinkDialer {
 public:
  InProcessHub();
  ~InProcessHub() override;
  // `handler` must stay alive until StopListening(address) has returned, which breaks its links.
  void Listen(const std::string& address, LinkHandler* handler);
  void StopListening(const std::string& address);
  absl::StatusOr<std::unique_ptr<LinkSender>> Dial(
      const std::string& address, const v1::LinkHello& hello, absl::Duration timeout,
      std::function<void(const absl::Status&)> on_broken) override;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_IN_PROCESS_LINK_H_
