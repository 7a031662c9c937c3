// The events of a call that its client has not got yet, in order.
#ifndef STAGECOACH_COORDINATOR_EVENT_QUEUE_H_
#define STAGECOACH_COORDINATOR_EVENT_QUEUE_H_

#include <cstddef>
#include <deque>
#include <utility>

namespace stagecoach {

// Callers synchronise.
template <typename Event>
class EventQueue {
 public:
  // Events that were pushed and are neither written nor dropped; those that were joined count each.
  size_t unread() const { return unread_; }
  bool empty() const { return queue_.empty(); }
  bool writing() const { return writing_; }

  // Queues `event`, or joins it to the last one: join(waiting, event) adds it to `waiting` and
  // returns true, or changes nothing and returns false. Never asked for what is being written.
  template <typename Join>
  void Push(Event event, const Join& join) {
    ++unread_;
    const bool waits = queue_.size() > (writing_ ? 1 : 0);
    if (waits && join(queue_.back().event, event)) {
      ++queue_.back().count;
    } else {
      queue_.push_back({.event = std::move(event)});
    }
  }

  // The oldest event, which stays as and where it is until EndWrite. Not empty, not writing.
  const Event* BeginWrite() {
    writing_ = true;
    return &queue_.front().event;
  }
  void EndWrite() {
    writing_ = false;
    unread_ -= queue_.front().count;
    queue_.pop_front();
  }

  // Drops all but what is being written.
  void DropWaiting() {
    queue_.resize(writing_ ? 1 : 0);
    unread_ = writing_ ? queue_.front().count : 0;
  }

 private:
  struct Queued {
    Event event;
    size_t count = 1;  // events that it has been joined of
  };

  std::deque<Queued> queue_;
  size_t unread_ = 0;
  bool writing_ = false;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_EVENT_QUEUE_H_
