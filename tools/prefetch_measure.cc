#include "tools/prefetch_measure.h"

#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/device.h"
#include "kernels/host_memory.h"
#include "model/direct_file.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/local_stage.h"
#include "worker/unit_parts.h"

namespace stagecoach {
namespace {

constexpr int kWarmUpPasses = 3;  // the prefetch distance settles
constexpr int kAcquirePasses = 3;
constexpr int kBalancePasses = 3;
constexpr int kBalanceFirstRows = 32;

double SecondsSince(absl::Time start) { return absl::ToDoubleSeconds(absl::Now() - start); }

// Clean pages of the model leave the page cache.
void DropPageCache(const ModelFile& model) {
  for (size_t i = 0; i < model.parts().size(); ++i) {
    const int fd = ::open(model.file(static_cast<int>(i)).path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

// Reads all tensor data once, by several threads, and does nothing with it.
absl::StatusOr<double> PlainReadRate(const ModelFile& model, int threads) {
  struct Piece {
    const RandomAccessFile* file;
    uint64_t at;
    uint64_t bytes;
  };
  std::vector<Piece> pieces;
  uint64_t bytes = 0;
  for (size_t i = 0; i < model.parts().size(); ++i) {
    const RandomAccessFile& file = model.file(static_cast<int>(i));
    const uint64_t data = model.parts()[i].data_offset() / kDirectAlignment * kDirectAlignment;
    for (uint64_t at = data; at < file.size(); at += kPartBytes) {
      pieces.push_back({&file, at, std::min<uint64_t>(kPartBytes, file.size() - at)});
      bytes += pieces.back().bytes;
    }
  }
  std::vector<std::shared_ptr<HostMemory>> buffers;
  for (int t = 0; t < threads; ++t) {
    buffers.push_back(NewPageMemory(kPartBytes));
    if (buffers.back() == nullptr) return absl::ResourceExhaustedError("no read buffer");
    std::fill_n(buffers.back()->data(), buffers.back()->size(), std::byte{0});  // touched
  }
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  const absl::Time start = absl::Now();
  std::vector<std::thread> readers;
  for (int t = 0; t < threads; ++t) {
    readers.emplace_back([&, buffer = buffers[t]->data()] {
      for (size_t i = next++; i < pieces.size() && !failed; i = next++) {
        failed =
            failed || !ReadFully(*pieces[i].file, pieces[i].at, {buffer, pieces[i].bytes}).ok();
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  if (failed) return absl::UnavailableError("the model file cannot be read");
  return static_cast<double>(bytes) / SecondsSince(start);
}

// The peak of this process's memory from the last reset on; Linux resets it on request.
void ResetPeakMemory() {
  ::malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << "5";
}
uint64_t PeakMemory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  }
  return 0;
}

// Takes as much memory as the weights will, and gives it back; returns bytes per second. On a
// virtual machine the first touch of memory may be slower than storage, and is no part of a load.
absl::StatusOr<double> TouchMemory(uint64_t bytes) {
  const absl::Time start = absl::Now();
  STAGECOACH_RETURN_IF_ERROR(cpu::AlignedBuffer<std::byte>::Create(bytes).status());
  return static_cast<double>(bytes) / SecondsSince(start);
}

LayerStoreStats Sum(LocalStages& stages, int count) {
  LayerStoreStats sum;
  for (int i = 0; i < count; ++i) {
    const LayerStoreStats stats = stages.store(i).Stats();
    sum.slice_bytes += stats.slice_bytes;
    sum.loaded_bytes += stats.loaded_bytes;
    sum.read_bytes += stats.read_bytes;
    sum.read_seconds += stats.read_seconds;
    sum.convert_seconds += stats.convert_seconds;
  }
  return sum;
}

double Landed(const LayerStoreStats& stats) {
  return static_cast<double>(stats.loaded_bytes) / static_cast<double>(stats.slice_bytes);
}

CopyRates RatesOf(const UploadStats& before, const UploadStats& after, double seconds) {
  const double bytes = static_cast<double>(after.bytes - before.bytes);
  const double busy = after.busy_seconds - before.busy_seconds;
  return {.total_rate = bytes / seconds,
          .busy_rate = busy > 0 ? bytes / busy : 0,
          .busy_share = busy / seconds};
}

absl::StatusOr<double> AcquirePass(LayerStore& store, const ModelParams& params) {
  const absl::Time start = absl::Now();
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    STAGECOACH_RETURN_IF_ERROR(store.Acquire(unit).status());
  }
  return SecondsSince(start);
}

void FillRates(const LayerStoreStats& before, const LayerStoreStats& after, int passes,
               double total_seconds, Steady& steady) {
  const auto per_pass = [passes](uint64_t a, uint64_t b) {
    return static_cast<double>(b - a) / passes;
  };
  steady.sync_loads = per_pass(before.misses, after.misses);
  steady.late_hits = per_pass(before.late_hits, after.late_hits);
  steady.evictions = per_pass(before.evictions, after.evictions);
  steady.read_bytes = per_pass(before.read_bytes, after.read_bytes);
  const double hits = per_pass(before.hits, after.hits);
  steady.hit_ratio = hits / (hits + steady.late_hits + steady.sync_loads);
  steady.stall_share = (after.stall_seconds - before.stall_seconds) / total_seconds;
}

// One pass; returns the next token.
absl::StatusOr<int32_t> RunPass(LocalStages& stages, const ModelParams& params, int rows,
                                int32_t last) {
  if (rows == 1) return stages.Continue({&last, 1});
  return stages.Begin(MakeTestPrompt(params, rows));
}

LocalStageOptions StageOptions(const PrefetchSetup& setup, const LayerStoreOptions& store, int rows,
                               int passes) {
  const int longest = std::max(setup.prompt_tokens, rows);
  return {.device = setup.device,
          .threads = setup.threads,
          .max_context = longest + passes + 1,
          .max_step_tokens = longest,
          .store = store};
}

}  // namespace

absl::StatusOr<ColdStart> MeasureColdStart(const PrefetchSetup& setup) {
  ColdStart cold;
  const ModelFile& model = *setup.model;
  {
    STAGECOACH_ASSIGN_OR_RETURN(const auto backend,
                                OpenDevice(setup.device, {.threads = setup.threads}));
    cold.store = SuitOptions(
        *backend, {.reader_threads = setup.reader_threads, .load_threads = setup.load_threads});
    STAGECOACH_ASSIGN_OR_RETURN(cold.copy_rate, MeasureDeviceCopyRate(*backend));
  }
  if (!setup.cached) DropPageCache(model);
  STAGECOACH_ASSIGN_OR_RETURN(
      cold.plain_rate, PlainReadRate(model, cold.store.reader_threads * cold.store.load_threads));
  if (!setup.cached) DropPageCache(model);
  if (cold.copy_rate == 0) {
    STAGECOACH_ASSIGN_OR_RETURN(cold.touch_rate, TouchMemory(model.file(0).size()));
  }
  const absl::Time start = absl::Now();
  STAGECOACH_ASSIGN_OR_RETURN(
      const auto stages, LocalStages::Create(setup.model, {.stages = setup.cold_stages,
                                                           .device = setup.device,
                                                           .threads = setup.threads,
                                                           .max_context = setup.prompt_tokens + 1,
                                                           .max_step_tokens = setup.prompt_tokens,
                                                           .store = cold.store}));
  const absl::Status first_layer =
      stages->store(0).Acquire({.kind = Unit::Kind::kLayer, .layer = 0}).status();
  STAGECOACH_RETURN_IF_ERROR(first_layer);
  cold.first_layer_seconds = SecondsSince(start);
  cold.first_layer_share = Landed(Sum(*stages, setup.cold_stages));
  const absl::Status first_token =
      stages->Begin(MakeTestPrompt(model.params(), setup.prompt_tokens)).status();
  STAGECOACH_RETURN_IF_ERROR(first_token);
  cold.first_token_seconds = SecondsSince(start);
  LayerStoreStats stats = Sum(*stages, setup.cold_stages);
  cold.first_token_share = Landed(stats);
  while (stats.loaded_bytes < stats.slice_bytes) {
    absl::SleepFor(absl::Milliseconds(1));
    stats = Sum(*stages, setup.cold_stages);
  }
  double load_seconds = 0;  // the stages load at the same time
  for (int i = 0; i < setup.cold_stages; ++i) {
    load_seconds = std::max(load_seconds, stages->store(i).Stats().load_seconds);
  }
  cold.resident_seconds = load_seconds;
  cold.load_rate = static_cast<double>(stats.slice_bytes) / load_seconds;
  cold.read_seconds = stats.read_seconds;
  cold.convert_seconds = stats.convert_seconds;
  return cold;
}

absl::StatusOr<Steady> MeasureSteady(const PrefetchSetup& setup, const LayerStoreOptions& store,
                                     int rows) {
  ResetPeakMemory();
  const ModelParams& params = setup.model->params();
  const int all_passes = kWarmUpPasses + setup.passes;
  STAGECOACH_ASSIGN_OR_RETURN(
      const auto stages,
      LocalStages::Create(setup.model, StageOptions(setup, store, rows, all_passes)));
  Steady steady;
  STAGECOACH_ASSIGN_OR_RETURN(int32_t token,
                              stages->Begin(MakeTestPrompt(params, setup.prompt_tokens)));
  steady.tokens.push_back(token);
  std::vector<double> seconds;
  LayerStoreStats before;
  UploadStats uploads;
  double compute_before = 0;
  for (int pass = 0; pass < all_passes; ++pass) {
    if (pass == kWarmUpPasses) {
      before = stages->store(0).Stats();
      uploads = stages->backend().uploads();
      compute_before = stages->compute_seconds();
    }
    const absl::Time start = absl::Now();
    STAGECOACH_ASSIGN_OR_RETURN(token, RunPass(*stages, params, rows, token));
    if (pass >= kWarmUpPasses) seconds.push_back(SecondsSince(start));
    steady.tokens.push_back(token);
  }
  steady.stats = stages->store(0).Stats();
  double total = 0;
  for (const double s : seconds) total += s;
  steady.copies = RatesOf(uploads, stages->backend().uploads(), total);
  FillRates(before, steady.stats, setup.passes, total, steady);
  steady.seconds = Median(seconds);
  steady.compute_seconds = (stages->compute_seconds() - compute_before) / setup.passes;
  std::vector<double> acquire;
  uploads = stages->backend().uploads();
  total = 0;
  for (int pass = 0; pass < kAcquirePasses; ++pass) {
    STAGECOACH_ASSIGN_OR_RETURN(acquire.emplace_back(), AcquirePass(stages->store(0), params));
    total += acquire.back();
  }
  steady.acquire_copies = RatesOf(uploads, stages->backend().uploads(), total);
  steady.acquire_seconds = Median(acquire);
  steady.peak_memory = PeakMemory();
  return steady;
}

absl::StatusOr<int> BalancedRows(const PrefetchSetup& setup, double seconds) {
  const ModelParams& params = setup.model->params();
  STAGECOACH_ASSIGN_OR_RETURN(
      const auto stages,
      LocalStages::Create(setup.model, StageOptions(setup, {}, kMostBalancedRows, 0)));
  const auto pass_seconds = [&](int rows) -> absl::StatusOr<double> {
    std::vector<double> passes;
    for (int pass = 0; pass <= kBalancePasses; ++pass) {
      const absl::Time start = absl::Now();
      STAGECOACH_RETURN_IF_ERROR(stages->Begin(MakeTestPrompt(params, rows)).status());
      if (pass > 0) passes.push_back(SecondsSince(start));
    }
    return Median(passes);
  };
  // Doubling until it takes too long, then on a straight line in between.
  int rows = kBalanceFirstRows;
  STAGECOACH_ASSIGN_OR_RETURN(double time, pass_seconds(rows));
  while (time < seconds && rows < kMostBalancedRows) {
    STAGECOACH_ASSIGN_OR_RETURN(const double next, pass_seconds(2 * rows));
    if (next >= seconds) {
      const double share = (seconds - time) / (next - time);
      return static_cast<int>(rows + share * rows);
    }
    rows *= 2;
    time = next;
  }
  return rows;
}

}  // namespace stagecoach
