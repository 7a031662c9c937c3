#include "tools/load.h"

#include <algorithm>
#include <cmath>
#include <latch>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace stagecoach {
namespace {

constexpr int kFirstOrdinaryToken = 3;
constexpr size_t kMinDecodeTokens = 8;  // a stream
constexpr absl::Duration kRequestTimeout = absl::Minutes(10);

double SecondsSince(absl::Time start) { return absl::ToDoubleSeconds(absl::Now() - start); }

class Collector {
 public:
  void Add(RequestSample sample) {
    absl::MutexLock lock(&mu_);
    samples_.push_back(std::move(sample));
  }
  std::vector<RequestSample> Take() {
    absl::MutexLock lock(&mu_);
    return std::move(samples_);
  }

 private:
  absl::Mutex mu_;
  std::vector<RequestSample> samples_ ABSL_GUARDED_BY(mu_);
};

bool Stopped(const LoadOptions& options) { return options.stop != nullptr && *options.stop; }

bool MayStart(const LoadOptions& options, int index, absl::Time origin) {
  return index < options.requests && absl::Now() - origin < options.duration && !Stopped(options);
}

void RunClosedLoop(Client& client, const LoadOptions& options, absl::Time origin,
                   Collector& collector) {
  std::atomic<int> next = 0;
  std::vector<std::thread> streams;
  for (int s = 0; s < options.streams; ++s) {
    streams.emplace_back([&] {
      for (int index = next++; MayStart(options, index, origin); index = next++) {
        collector.Add(RunRequest(client, options, index, origin));
      }
    });
  }
  for (std::thread& stream : streams) stream.join();
}

void RunRounds(Client& client, const LoadOptions& options, absl::Time origin,
               Collector& collector) {
  int index = 0;
  while (!Stopped(options) &&
         (index < options.rounds * options.streams || MayStart(options, index, origin))) {
    std::latch all_there(options.streams);
    std::vector<std::thread> streams;
    for (int s = 0; s < options.streams; ++s, ++index) {
      streams.emplace_back([&, index] {
        all_there.arrive_and_wait();
        collector.Add(RunRequest(client, options, index, origin));
      });
    }
    for (std::thread& stream : streams) stream.join();
  }
}

void RunOpenLoop(Client& client, const LoadOptions& options, absl::Time origin,
                 Collector& collector) {
  std::mt19937_64 random(options.seed);
  std::exponential_distribution<double> gap(options.rate);
  absl::Time arrival = origin;
  std::vector<std::thread> requests;
  for (int index = 0; index < options.requests; ++index) {
    arrival += absl::Seconds(gap(random));
    absl::SleepFor(arrival - absl::Now());
    if (!MayStart(options, index, origin)) break;
    requests.emplace_back(
        [&, index] { collector.Add(RunRequest(client, options, index, origin)); });
  }
  for (std::thread& request : requests) request.join();
}

void AddFigures(nlohmann::json& out, const char* name, const std::vector<double>& seconds) {
  const double sum = std::accumulate(seconds.begin(), seconds.end(), 0.0);
  const double mean = seconds.empty() ? 0 : sum / static_cast<double>(seconds.size());
  const auto key = [name](const char* figure) { return std::string(figure) + "_" + name + "_ms"; };
  out[key("mean")] = 1e3 * mean;
  out[key("median")] = 1e3 * Percentile(seconds, 50);
  out[key("p90")] = 1e3 * Percentile(seconds, 90);
  out[key("p99")] = 1e3 * Percentile(seconds, 99);
}

}  // namespace

std::vector<int32_t> LoadPrompt(const LoadOptions& options, int index) {
  std::uniform_int_distribution<int32_t> token(
      kFirstOrdinaryToken, std::max(kFirstOrdinaryToken, options.vocab_size - 1));
  std::vector<int32_t> prompt;
  std::mt19937_64 shared(options.seed);
  while (static_cast<int>(prompt.size()) < std::min(options.shared_prefix, options.prompt_tokens)) {
    prompt.push_back(token(shared));
  }
  std::seed_seq seeds{options.seed, std::hash<std::string>()(options.user),
                      static_cast<uint64_t>(index)};
  std::mt19937_64 own(seeds);
  while (static_cast<int>(prompt.size()) < options.prompt_tokens) prompt.push_back(token(own));
  return prompt;
}

namespace {

// How request `index` of a mixed load differs from the others.
LoadOptions Mixed(const LoadOptions& options, int index, v1::GenerateRequest& request) {
  LoadOptions own = options;
  const int sixteenths[] = {2, 16, 8, 32, 4, 24, 16};
  own.prompt_tokens = std::max(1, options.prompt_tokens * sixteenths[index % 7] / 16);
  if (index % 4 == 1) request.set_n(2);
  if (index % 3 == 1) request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(static_cast<uint64_t>(index));
  return own;
}

}  // namespace

RequestSample RunRequest(Client& client, const LoadOptions& options, int index, absl::Time origin) {
  v1::GenerateRequest request;
  const LoadOptions own = options.mixed ? Mixed(options, index, request) : options;
  const std::vector<int32_t> prompt = LoadPrompt(own, index);
  request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_tokens(static_cast<uint32_t>(options.tokens));
  request.set_ignore_eos(true);
  request.set_user(options.user);
  RequestSample sample;
  sample.index = index;
  sample.input_tokens = own.prompt_tokens;
  sample.given_up = options.mixed && index % 5 == 4;
  const absl::Time start = absl::Now();
  sample.start = absl::ToDoubleSeconds(start - origin);
  double last = 0;
  sample.status = client.Generate(request, start + kRequestTimeout, [&](const auto& event) {
    if (event.tokens_size() > 0) {
      const double now = SecondsSince(start);
      if (sample.output.empty()) {
        sample.ttft = now;
      } else {
        sample.itl.push_back(now - last);
      }
      last = now;
    }
    for (const v1::GeneratedToken& token : event.tokens()) {
      sample.output.push_back(token.token_id());
      sample.token_times.push_back(last);
    }
    if (event.has_usage()) sample.cached_tokens = static_cast<int>(event.usage().cached_tokens());
    return !sample.given_up || 2 * static_cast<int>(sample.output.size()) < options.tokens;
  });
  if (sample.given_up && absl::IsCancelled(sample.status)) sample.status = absl::OkStatus();
  sample.e2el = SecondsSince(start);
  return sample;
}

LoadResult RunLoad(Client& client, const LoadOptions& options) {
  Collector collector;
  const absl::Time origin = absl::Now();
  if (options.rate > 0) {
    RunOpenLoop(client, options, origin, collector);
  } else if (options.rounds > 0) {
    RunRounds(client, options, origin, collector);
  } else {
    RunClosedLoop(client, options, origin, collector);
  }
  return {.seconds = SecondsSince(origin), .samples = collector.Take()};
}

nlohmann::json SummariseLoad(const LoadResult& result) {
  uint64_t completed = 0, failed = 0, input = 0, output = 0, cached = 0;
  std::vector<double> ttft, tpot, itl, e2el;
  for (const RequestSample& sample : result.samples) {
    if (!sample.status.ok()) {
      ++failed;
      continue;
    }
    ++completed;
    input += sample.input_tokens;
    cached += sample.cached_tokens;
    output += sample.output.size();
    ttft.push_back(sample.ttft);
    e2el.push_back(sample.e2el);
    itl.insert(itl.end(), sample.itl.begin(), sample.itl.end());
    if (sample.output.size() > 1) {
      tpot.push_back((sample.e2el - sample.ttft) / static_cast<double>(sample.output.size() - 1));
    }
  }
  nlohmann::json out = {
      {"duration", result.seconds},
      {"completed", completed},
      {"failed", failed},
      {"total_input_tokens", input},
      {"total_output_tokens", output},
      {"total_cached_tokens", cached},
      {"request_throughput", static_cast<double>(completed) / result.seconds},
      {"output_throughput", static_cast<double>(output) / result.seconds},
      {"total_token_throughput", static_cast<double>(input + output) / result.seconds}};
  AddFigures(out, "ttft", ttft);
  AddFigures(out, "tpot", tpot);
  AddFigures(out, "itl", itl);
  AddFigures(out, "e2el", e2el);
  return out;
}

RoundRates RatesOfRound(std::span<const RequestSample> round) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  double sent = kNever, all_decode = 0, first_end = kNever, prompt_tokens = 0;
  for (const RequestSample& sample : round) {
    if (!sample.status.ok() || sample.token_times.empty()) return {};
    sent = std::min(sent, sample.start);
    all_decode = std::max(all_decode, sample.start + sample.token_times.front());
    first_end = std::min(first_end, sample.start + sample.token_times.back());
    prompt_tokens += sample.input_tokens - sample.cached_tokens;
  }
  size_t decoded = 0;
  for (const RequestSample& sample : round) {
    decoded +=
        std::count_if(sample.token_times.begin(), sample.token_times.end(), [&](double time) {
          return sample.start + time > all_decode && sample.start + time <= first_end;
        });
  }
  RoundRates rates;
  if (all_decode > sent) rates.prompt = prompt_tokens / (all_decode - sent);
  if (decoded > 0 && decoded >= kMinDecodeTokens * round.size()) {
    rates.decode = static_cast<double>(decoded) / (first_end - all_decode);
  }
  return rates;
}

double Percentile(std::vector<double> values, double percent) {
  if (values.empty()) return 0;
  const auto rank =
      static_cast<size_t>(std::ceil(percent / 100 * static_cast<double>(values.size())));
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(std::max<size_t>(rank, 1) - 1);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

}  // namespace stagecoach
