// What a worker tells a monitoring system.
#ifndef STAGECOACH_WORKER_METRICS_H_
#define STAGECOACH_WORKER_METRICS_H_

#include <span>
#include <string>

#include "worker/layer_store.h"

namespace stagecoach {

// Prometheus text exposition (format 0.0.4) of a layer store: every metric with its HELP and TYPE
// line, named stagecoach_worker_..., in base units (seconds, bytes). `units` are the states of the
// assigned units. Pure.
std::string FormatMetrics(const LayerStoreStats& stats, std::span<const UnitState> units);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_METRICS_H_
