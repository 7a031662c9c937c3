// How fast weights can be read from the model file.
#ifndef STAGECOACH_WORKER_LOAD_RATE_H_
#define STAGECOACH_WORKER_LOAD_RATE_H_

#include <cstdint>

#include "model/model_file.h"

namespace stagecoach {

// Bytes per second of positioned reads of the first weights, in the file's own way of reading (what
// lies in the page cache counts as fast as it then is). Takes a quarter of a second or one read of
// kReadChunkBytes, whichever is longer, and at most `bytes`. 0 (unknown) if reading fails, or if
// the file has fewer: too few for the time to say anything.
double MeasureLoadRate(const ModelFile& model, uint64_t bytes = 64 << 20);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LOAD_RATE_H_
