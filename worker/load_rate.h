// How fast weights can be read from the model file.
#ifndef STAGECOACH_WORKER_LOAD_RATE_H_
#define STAGECOACH_WORKER_LOAD_RATE_H_

#include "model/model_file.h"

namespace stagecoach {

// Bytes per second of positioned reads of the first weights, in the file's own way of reading (what
// lies in the page cache counts as fast as it then is). Takes a quarter of a second or one read of
// kReadChunkBytes, whichever is longer. 0 if nothing can be read.
double MeasureLoadRate(const ModelFile& model);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LOAD_RATE_H_
