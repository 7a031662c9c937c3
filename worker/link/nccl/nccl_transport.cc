#include "worker/link/nccl/nccl_transport.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>

#include "fmt/format.h"
#include "model/status_macros.h"
#include "worker/link/nccl/nccl_channel.h"
#ifdef STAGECOACH_HAVE_CUDA
#include "worker/link/nccl/cuda/cuda_device_api.h"
#include "worker/link/nccl/cuda/nccl_library.h"
#endif

namespace stagecoach {
namespace {

class NcclTransport : public DeviceTransport {
 public:
  NcclTransport(std::shared_ptr<NcclApi> nccl, std::shared_ptr<DeviceApi> device,
                NcclOptions options)
      : nccl_(std::move(nccl)), device_(std::move(device)), options_(std::move(options)) {}

  std::string description() const override { return "NCCL " + nccl_->version(); }

  absl::StatusOr<std::string> NewId() override {
    NcclId id;
    if (nccl_->GetUniqueId(&id) != NcclCode::kSuccess) {
      return absl::UnavailableError(
          fmt::format("NCCL gives no id, does NCCL_SOCKET_IFNAME name an interface that is up? {}",
                      nccl_->LastError()));
    }
    return std::string(id.data(), id.size());
  }

  absl::StatusOr<std::unique_ptr<DeviceChannel>> OpenSender(const std::string& id,
                                                            const ChannelMemory& memory,
                                                            const std::string& peer) override {
    return Open(NcclChannel::Rank::kSender, id, memory, peer);
  }
  absl::StatusOr<std::unique_ptr<DeviceChannel>> OpenReceiver(const std::string& id,
                                                              const ChannelMemory& memory,
                                                              const std::string& peer) override {
    return Open(NcclChannel::Rank::kReceiver, id, memory, peer);
  }

 private:
  absl::StatusOr<std::unique_ptr<DeviceChannel>> Open(NcclChannel::Rank rank, const std::string& id,
                                                      const ChannelMemory& memory,
                                                      const std::string& peer) {
    NcclId bytes;
    if (id.size() != bytes.size()) {
      return absl::InvalidArgumentError(
          fmt::format("an NCCL id of {} bytes, not {}", id.size(), bytes.size()));
    }
    std::copy(id.begin(), id.end(), bytes.begin());
    auto channel = std::make_unique<NcclChannel>(nccl_, device_, options_, rank, memory, peer);
    STAGECOACH_RETURN_IF_ERROR(channel->Begin(bytes));
    return channel;
  }

  const std::shared_ptr<NcclApi> nccl_;
  const std::shared_ptr<DeviceApi> device_;
  const NcclOptions options_;
};

}  // namespace

std::unique_ptr<DeviceTransport> MakeNcclTransport(std::shared_ptr<NcclApi> nccl,
                                                   std::shared_ptr<DeviceApi> device,
                                                   NcclOptions options) {
  return std::make_unique<NcclTransport>(std::move(nccl), std::move(device), std::move(options));
}

absl::StatusOr<std::unique_ptr<DeviceTransport>> OpenNccl([[maybe_unused]] NcclOptions options) {
#ifdef STAGECOACH_HAVE_CUDA
  STAGECOACH_ASSIGN_OR_RETURN(std::shared_ptr<NcclApi> nccl, LoadNcclLibrary());
  return MakeNcclTransport(std::move(nccl), MakeCudaDeviceApi(), std::move(options));
#else
  return absl::UnavailableError("this program was built without CUDA (-DSTAGECOACH_CUDA=ON)");
#endif
}

std::string NcclHostId() {
  const char* const id = std::getenv("NCCL_HOSTID");
  if (id != nullptr && id[0] != '\0') return id;
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  std::string boot;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot);
  return fmt::format("{}-{}", host, boot);
}

}  // namespace stagecoach
