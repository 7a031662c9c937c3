// For tests of the NCCL path without NCCL or a GPU: streams that are threads, and communicators
// that meet and pass bytes within the process. They work, and can be made to fail.
#ifndef STAGECOACH_WORKER_LINK_NCCL_FAKE_NCCL_H_
#define STAGECOACH_WORKER_LINK_NCCL_FAKE_NCCL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "worker/link/nccl/nccl_api.h"

namespace stagecoach {

// Runs what is put into it in order, on a thread of its own.
class FakeStream {
 public:
  FakeStream() : thread_([this] { Run(); }) {}
  ~FakeStream() {
    {
      absl::MutexLock lock(&mu_);
      ending_ = true;
    }
    thread_.join();  // after what is in it
  }
  void Put(std::function<void()> work) {
    absl::MutexLock lock(&mu_);
    work_.push_back(std::move(work));
  }

 private:
  bool Ready() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return ending_ || !work_.empty(); }
  void Run() {
    for (;;) {
      std::function<void()> work;
      {
        absl::MutexLock lock(&mu_);
        mu_.Await(absl::Condition(this, &FakeStream::Ready));
        if (work_.empty()) return;
        work = std::move(work_.front());
        work_.pop_front();
      }
      work();
    }
  }

  absl::Mutex mu_;
  std::deque<std::function<void()>> work_ ABSL_GUARDED_BY(mu_);
  bool ending_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

// The null stream is the host: what is put there is done at once.
class FakeDevice : public DeviceApi {
 public:
  // Streams, events and buffers that exist, and all that ever did. Those left are freed at the end.
  size_t live() const {
    absl::MutexLock lock(&mu_);
    return objects_.size();
  }
  uint64_t made() const { return made_; }

  absl::Status Use(int) override { return absl::OkStatus(); }
  absl::StatusOr<void*> NewStream() override { return Made(new FakeStream); }
  absl::StatusOr<void*> NewEvent() override { return Made(new Event); }
  absl::StatusOr<float*> NewBuffer(size_t floats) override {
    return Made(new std::vector<float>(floats))->data();
  }
  void FreeStream(void* stream) override { Free(stream); }
  void FreeEvent(void* event) override { Free(event); }
  void FreeBuffer(float* data) override { Free(data); }
  absl::Status Copy(float* to, const float* from, size_t floats, void* stream) override {
    Put(stream, [=] { std::memcpy(to, from, floats * sizeof(float)); });
    return absl::OkStatus();
  }
  absl::Status Record(void* event, void* stream) override {
    Event& recorded = *static_cast<Event*>(event);
    const uint64_t count = ++recorded.records;
    Put(stream, [&recorded, count] { recorded.reached = count; });
    return absl::OkStatus();
  }
  absl::Status Await(void* stream, void* event) override {
    Event& awaited = *static_cast<Event*>(event);
    const uint64_t count = awaited.records;
    Put(stream, [&awaited, count] {
      while (awaited.reached < count) std::this_thread::yield();
    });
    return absl::OkStatus();
  }
  absl::StatusOr<bool> Reached(void* event) override {
    const Event& asked = *static_cast<Event*>(event);
    return asked.reached == asked.records;
  }

 private:
  struct Event {
    std::atomic<uint64_t> records = 0;
    std::atomic<uint64_t> reached = 0;
  };
  template <typename T>
  T* Made(T* object) {
    void* handle = object;
    if constexpr (std::is_same_v<T, std::vector<float>>) handle = object->data();
    ++made_;
    absl::MutexLock lock(&mu_);
    objects_[handle] = std::shared_ptr<T>(object);
    return object;
  }
  void Free(void* handle) {
    std::shared_ptr<void> object;  // a stream's end waits for its work, without the lock
    absl::MutexLock lock(&mu_);
    object.swap(objects_.at(handle));
    objects_.erase(handle);
  }
  static void Put(void* stream, std::function<void()> work) {
    if (stream == nullptr) {
      work();
    } else {
      static_cast<FakeStream*>(stream)->Put(std::move(work));
    }
  }

  std::atomic<uint64_t> made_ = 0;
  mutable absl::Mutex mu_;
  std::map<void*, std::shared_ptr<void>> objects_ ABSL_GUARDED_BY(mu_);  // by handle
};

// Two ranks of one id meet in this object, which both must share.
class FakeNccl : public NcclApi {
 public:
  // --- What tests ask for and ask.
  std::atomic<bool> refuse_init = false;    // as for two ranks on one GPU
  std::atomic<bool> hang_in_abort = false;  // until it is false again
  int live() const {
    absl::MutexLock lock(&mu_);
    return static_cast<int>(comms_.size());
  }
  int aborts() const { return aborts_; }
  uint64_t payloads() const { return payloads_; }  // that arrived
  // From now on both ends of every communicator report a remote error.
  void BreakAll() {
    absl::MutexLock lock(&mu_);
    for (Comm* comm : comms_) comm->pair->broken = true;
  }

  std::string version() const override { return "0.0.0"; }
  NcclCode GetUniqueId(NcclId* id) override {
    id->fill(0);
    const uint64_t number = ++ids_;
    std::memcpy(id->data(), &number, sizeof number);
    return NcclCode::kSuccess;
  }
  NcclCode Init(NcclApi::Comm* comm, const NcclId& id, int rank) override {
    if (refuse_init) return NcclCode::kInvalidUsage;
    absl::MutexLock lock(&mu_);
    std::shared_ptr<Pair>& pair = pairs_[std::string(id.data(), id.size())];
    if (pair == nullptr) pair = std::make_shared<Pair>();
    pair->ranks |= 1 << rank;
    Comm* const made = new Comm{.pair = pair, .rank = rank};
    comms_.insert(made);
    *comm = made;
    return NcclCode::kInProgress;
  }
  NcclCode AsyncError(NcclApi::Comm comm, NcclCode* state) override {
    const Pair& pair = *Own(comm).pair;
    *state = pair.broken       ? NcclCode::kRemoteError
             : pair.ranks == 3 ? NcclCode::kSuccess
                               : NcclCode::kInProgress;
    return NcclCode::kSuccess;
  }
  NcclCode Send(NcclApi::Comm comm, const float* data, size_t floats, void* stream) override {
    static_cast<FakeStream*>(stream)->Put([pair = Own(comm).pair, data, floats] {
      absl::MutexLock lock(&pair->mu);
      pair->data = data;  // the one before was taken: the stream keeps its order
      pair->floats = floats;
      pair->mu.Await(absl::Condition(pair.get(), &Pair::SenderMayGo));
    });
    return NcclCode::kInProgress;
  }
  NcclCode Receive(NcclApi::Comm comm, float* data, size_t floats, void* stream) override {
    static_cast<FakeStream*>(stream)->Put([this, pair = Own(comm).pair, data, floats] {
      absl::MutexLock lock(&pair->mu);
      pair->mu.Await(absl::Condition(pair.get(), &Pair::ReceiverMayGo));
      if (pair->data == nullptr) return;
      if (pair->floats != floats) pair->broken = true;  // NCCL would hang or write too much
      std::memcpy(data, pair->data, std::min(floats, pair->floats) * sizeof(float));
      pair->data = nullptr;
      ++payloads_;
    });
    return NcclCode::kInProgress;
  }
  // The other end hears nothing of it, as little as of a process that was killed: it waits until
  // it is aborted itself.
  NcclCode Abort(NcclApi::Comm comm) override {
    while (hang_in_abort) std::this_thread::yield();
    Comm* const own = static_cast<Comm*>(comm);
    {
      absl::MutexLock lock(&own->pair->mu);
      (own->rank == 0 ? own->pair->sender_gone : own->pair->receiver_gone) = true;
      if (own->rank == 0) own->pair->data = nullptr;
    }
    absl::MutexLock lock(&mu_);
    comms_.erase(own);
    delete own;
    ++aborts_;
    return NcclCode::kSuccess;
  }
  std::string LastError() override { return "as the test asked"; }

 private:
  // The payload under way: set by the sender's stream, cleared by the receiver's.
  struct Pair {
    std::atomic<int> ranks = 0;  // bits of those that have come
    std::atomic<bool> broken = false;
    absl::Mutex mu;
    const float* data ABSL_GUARDED_BY(mu) = nullptr;
    size_t floats ABSL_GUARDED_BY(mu) = 0;
    bool sender_gone ABSL_GUARDED_BY(mu) = false;
    bool receiver_gone ABSL_GUARDED_BY(mu) = false;

    bool SenderMayGo() const ABSL_SHARED_LOCKS_REQUIRED(mu) {
      return sender_gone || data == nullptr;
    }
    bool ReceiverMayGo() const ABSL_SHARED_LOCKS_REQUIRED(mu) {
      return receiver_gone || data != nullptr;
    }
  };
  struct Comm {
    std::shared_ptr<Pair> pair;
    int rank = 0;
  };
  static Comm& Own(NcclApi::Comm comm) { return *static_cast<Comm*>(comm); }

  mutable absl::Mutex mu_;
  std::map<std::string, std::shared_ptr<Pair>> pairs_ ABSL_GUARDED_BY(mu_);
  std::set<Comm*> comms_ ABSL_GUARDED_BY(mu_);
  std::atomic<uint64_t> ids_ = 0;
  std::atomic<uint64_t> payloads_ = 0;
  std::atomic<int> aborts_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_FAKE_NCCL_H_
