// Early return of errors.
#ifndef STAGECOACH_MODEL_STATUS_MACROS_H_
#define STAGECOACH_MODEL_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns the status of `expr` from the calling function unless it is OK.
#define STAGECOACH_RETURN_IF_ERROR(expr)                                             \
  do {                                                                               \
    if (absl::Status early_status = (expr); !early_status.ok()) return early_status; \
  } while (false)

// `target = *expr`, or returns expr's status. `target` may be a declaration.
#define STAGECOACH_ASSIGN_OR_RETURN(target, expr) \
  STAGECOACH_ASSIGN_OR_RETURN_IMPL(STAGECOACH_STATUS_CONCAT(status_or_, __LINE__), target, expr)
#define STAGECOACH_ASSIGN_OR_RETURN_IMPL(temporary, target, expr) \
  auto temporary = (expr);                                        \
  if (!temporary.ok()) return temporary.status();                 \
  target = *std::move(temporary)
#define STAGECOACH_STATUS_CONCAT(a, b) STAGECOACH_STATUS_CONCAT_IMPL(a, b)
#define STAGECOACH_STATUS_CONCAT_IMPL(a, b) a##b

#endif  // STAGECOACH_MODEL_STATUS_MACROS_H_
