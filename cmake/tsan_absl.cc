// Tells ThreadSanitizer what Debian's Abseil synchronises: the library is not instrumented, so
// without this every use of absl::Mutex would be reported as a race. Linked into what the `tsan`
// preset builds; each function calls the library's own through the next definition of its symbol.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace {

template <typename Function>
Function Next(const char* symbol) {
  void* next = ::dlsym(RTLD_NEXT, symbol);
  if (next == nullptr) {
    std::fprintf(stderr, "tsan_absl: no %s: another version of Abseil?\n", symbol);
    std::abort();
  }
  return reinterpret_cast<Function>(next);
}

template <typename T>
void* Address(const T* object) {
  return const_cast<T*>(object);
}

}  // namespace

// The real function of a class of Abseil (inline namespace debian3), by its mangled name.
#define REAL(type, mangled) static const auto real = Next<type>("_ZN4absl7debian3" mangled)
#define REAL_CONST(type, mangled) static const auto real = Next<type>("_ZNK4absl7debian3" mangled)

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  REAL(void (*)(Mutex*), "5Mutex4LockEv");
  real(this);
  __tsan_acquire(this);
}
void Mutex::Unlock() {
  REAL(void (*)(Mutex*), "5Mutex6UnlockEv");
  __tsan_release(this);
  real(this);
}
bool Mutex::TryLock() {
  REAL(bool (*)(Mutex*), "5Mutex7TryLockEv");
  const bool locked = real(this);
  if (locked) __tsan_acquire(this);
  return locked;
}
void Mutex::ReaderLock() {
  REAL(void (*)(Mutex*), "5Mutex10ReaderLockEv");
  real(this);
  __tsan_acquire(this);
}
void Mutex::ReaderUnlock() {
  REAL(void (*)(Mutex*), "5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  real(this);
}
void Mutex::LockWhen(const Condition& condition) {
  REAL(void (*)(Mutex*, const Condition&), "5Mutex8LockWhenERKNS0_9ConditionE");
  real(this, condition);
  __tsan_acquire(this);
}
void Mutex::Await(const Condition& condition) {
  REAL(void (*)(Mutex*, const Condition&), "5Mutex5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  real(this, condition);
  __tsan_acquire(this);
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  REAL(bool (*)(Mutex*, const Condition&, Duration),
       "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  const bool result = real(this, condition, timeout);
  __tsan_acquire(this);
  return result;
}
bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  REAL(bool (*)(Mutex*, const Condition&, Time),
       "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  __tsan_release(this);
  const bool result = real(this, condition, deadline);
  __tsan_acquire(this);
  return result;
}
// Read under the mutex, which the library takes without ThreadSanitizer noticing.
bool Condition::Eval() const {
  REAL_CONST(bool (*)(const Condition*), "9Condition4EvalEv");
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  const bool result = real(this);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  return result;
}

void CondVar::Wait(Mutex* mutex) {
  REAL(void (*)(CondVar*, Mutex*), "7CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mutex);
  real(this, mutex);
  __tsan_acquire(mutex);
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  REAL(bool (*)(CondVar*, Mutex*, Duration),
       "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  __tsan_release(mutex);
  const bool result = real(this, mutex, timeout);
  __tsan_acquire(mutex);
  return result;
}

void Notification::Notify() {
  REAL(void (*)(Notification*), "12Notification6NotifyEv");
  __tsan_release(this);
  real(this);
}
void Notification::WaitForNotification() const {
  REAL_CONST(void (*)(const Notification*), "12Notification19WaitForNotificationEv");
  real(this);
  __tsan_acquire(Address(this));
}
bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  REAL_CONST(bool (*)(const Notification*, Duration),
             "12Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
  const bool result = real(this, timeout);
  __tsan_acquire(Address(this));
  return result;
}

ABSL_NAMESPACE_END
}  // namespace absl

// What libraries synchronise within themselves: Abseil its graph of the order of locks (under a
// lock of its own), spdlog its loggers, which the first use makes.
extern "C" __attribute__((used)) const char* __tsan_default_suppressions() {
  return "race:GraphCycles\nrace:spdlog::\ncalled_from_lib:libspdlog\n";
}

// The last reference to a Status frees what other threads wrote; its count is not instrumented.
extern "C" __attribute__((used)) void _ZN4absl7debian36Status15UnrefNonInlinedEm(uintptr_t rep) {
  REAL(void (*)(uintptr_t), "6Status15UnrefNonInlinedEm");
  if ((rep & 3) == 1) {
    void* counted = reinterpret_cast<void*>(rep - 1);
    __tsan_release(counted);
    __tsan_acquire(counted);
  }
  real(rep);
}
