#include "worker/link/nccl/cuda/nccl_library.h"

#include <dlfcn.h>
#include <nccl.h>

#include <cstdlib>
#include <cstring>

#include "fmt/format.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";
constexpr int kOldestVersion = NCCL_VERSION(2, 18, 1);  // of those that end an init by an abort
// Of a communicator of two ranks: enough for a link's rate, and it bounds what NCCL takes of the
// GPU: memory (some 10 MiB each), and multiprocessors while a payload waits for its other end.
constexpr int kMaxBlocks = 8;

static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));
static_assert(static_cast<int>(NcclCode::kRemoteError) == ncclRemoteError);
static_assert(static_cast<int>(NcclCode::kInProgress) == ncclInProgress);

NcclCode ToCode(ncclResult_t result) { return static_cast<NcclCode>(result); }
ncclComm_t ToComm(NcclApi::Comm comm) { return static_cast<ncclComm_t>(comm); }

struct Functions {
  decltype(&ncclGetVersion) get_version = nullptr;
  decltype(&ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&ncclCommInitRankConfig) init = nullptr;
  decltype(&ncclCommGetAsyncError) async_error = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) receive = nullptr;
  decltype(&ncclCommAbort) abort = nullptr;
  decltype(&ncclGetLastError) last_error = nullptr;
};

class NcclLibrary : public NcclApi {
 public:
  NcclLibrary(const Functions& functions, int version)
      : call_(functions),
        version_(fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)) {}

  std::string version() const override { return version_; }
  NcclCode GetUniqueId(NcclId* id) override {
    ncclUniqueId made;
    const ncclResult_t result = call_.get_unique_id(&made);
    std::memcpy(id->data(), &made, sizeof made);
    return ToCode(result);
  }
  NcclCode Init(Comm* comm, const NcclId& id, int rank) override {
    ncclUniqueId meeting;
    std::memcpy(&meeting, id.data(), sizeof meeting);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.maxCTAs = kMaxBlocks;
    ncclComm_t made = nullptr;
    const ncclResult_t result = call_.init(&made, /*nranks=*/2, meeting, rank, &config);
    *comm = made;
    return ToCode(result);
  }
  NcclCode AsyncError(Comm comm, NcclCode* state) override {
    ncclResult_t now = ncclSuccess;
    const ncclResult_t result = call_.async_error(ToComm(comm), &now);
    *state = ToCode(now);
    return ToCode(result);
  }
  NcclCode Send(Comm comm, const float* data, size_t floats, void* stream) override {
    return ToCode(call_.send(data, floats, ncclFloat32, /*peer=*/1, ToComm(comm),
                             static_cast<cudaStream_t>(stream)));
  }
  NcclCode Receive(Comm comm, float* data, size_t floats, void* stream) override {
    return ToCode(call_.receive(data, floats, ncclFloat32, /*peer=*/0, ToComm(comm),
                                static_cast<cudaStream_t>(stream)));
  }
  NcclCode Abort(Comm comm) override { return ToCode(call_.abort(ToComm(comm))); }
  std::string LastError() override {
    const char* const words = call_.last_error(nullptr);
    return words == nullptr || words[0] == '\0' ? "no details" : words;
  }

 private:
  const Functions call_;
  const std::string version_;
};

template <typename Function>
absl::Status Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function != nullptr) return absl::OkStatus();
  return absl::UnavailableError(fmt::format("{} has no {}", kLibrary, name));
}

}  // namespace

absl::StatusOr<std::shared_ptr<NcclApi>> LoadNcclLibrary() {
  setenv("NCCL_NVLS_ENABLE", "0", 0);  // memory for multicast: pairs that send and receive use none
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::UnavailableError(fmt::format(
        "NCCL cannot be loaded: {}; install it or name its folder in LD_LIBRARY_PATH", dlerror()));
  }
  Functions found;
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclGetVersion", &found.get_version));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclGetUniqueId", &found.get_unique_id));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclCommInitRankConfig", &found.init));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclCommGetAsyncError", &found.async_error));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclSend", &found.send));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclRecv", &found.receive));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclCommAbort", &found.abort));
  STAGECOACH_RETURN_IF_ERROR(Find(library, "ncclGetLastError", &found.last_error));
  int version = 0;
  if (found.get_version(&version) != ncclSuccess || version < kOldestVersion) {
    return absl::FailedPreconditionError(
        fmt::format("NCCL's version is {}; at least {} is needed", version, kOldestVersion));
  }
  return std::make_shared<NcclLibrary>(found, version);
}

}  // namespace stagecoach
