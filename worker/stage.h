// One stage of the pipeline: runs the frames of one epoch through its layers.
#ifndef STAGECOACH_WORKER_STAGE_H_
#define STAGECOACH_WORKER_STAGE_H_

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/layer_store.h"
#include "worker/link/device_channel.h"
#include "worker/link/frame.h"

namespace stagecoach {

struct StageConfig {
  uint64_t epoch = 0;
  int stage = 0;
  int stages = 1;
  int first_layer = 0;  // [first_layer, last_layer)
  int last_layer = 0;
  int max_slots = 1;
  int max_context = 0;      // positions per slot
  int kv_blocks = 0;        // in every layer
  int max_step_tokens = 0;  // rows per frame
  KvType kv_type = KvType::kF16;
  // Activations come, or go, through a DeviceChannel, not in the frames.
  bool device_input = false;
  bool device_output = false;
};

// Not thread-safe: one thread runs the stage. The counters may be read from any thread.
class Stage {
 public:
  // Allocates KV cache and workspace. `backend` and `store` must outlive the stage; the store must
  // already be assigned this stage's units. Errors: INVALID_ARGUMENT for an impossible config,
  // RESOURCE_EXHAUSTED with the bytes wanted and available; those of Backend::CheckTensor and
  // LayerStore::WeightBytes.
  static absl::StatusOr<std::unique_ptr<Stage>> Create(Backend* backend,
                                                       std::shared_ptr<const ModelFile> model,
                                                       LayerStore* store, StageConfig config);
  ~Stage();

  // Where the residual stream lies, for the channels; FAILED_PRECONDITION if the backend keeps it
  // to itself.
  absl::StatusOr<ChannelMemory> ChannelMemoryOfResidual();
  // Before the first Run, what the config asks for; they must outlive the stage's last Run.
  void SetChannels(DeviceChannel* input, DeviceChannel* output);

  // Runs one step: closes, clears and copies of blocks, opens, rows. Returns the frame for the next
  // hop: the step with new activations, or (last stage) the StepResult.
  //
  // A frame that does not fit the contract changes nothing and is an error:
  //   ABORTED              another epoch
  //   ALREADY_EXISTS       a step that was run before
  //   OUT_OF_RANGE         a step skipped; a position that is not the KV length; context exceeded
  //   NOT_FOUND            rows or close for a slot or sequence id that is not open
  //   INVALID_ARGUMENT     payload size, row counts, slot, token id or block out of range; open of
  //                        a slot that is open; sampling parameters out of range; blocks that do
  //                        not cover a sequence's positions exactly; a block that would change (by
  //                        rows, clear or copy) while another sequence has it, or twice; a row
  //                        ahead at one of several stages, behind rows that do not sample, or with
  //                        a token id
  //   FAILED_PRECONDITION  d_model of another model
  // A weight that cannot be loaded, or a device fault, is returned as it is; the step then counts
  // as not run and may be run again (but not with channels, whose payload is gone).
  // Trouble of one sequence (non-finite values: DATA_LOSS) is reported in its SequenceResult and
  // leaves the others alone. Middle stages pass non-finite values on, so that the last stage sees
  // and reports them; it does so until the sequence is closed.
  // A row ahead goes on with the token that was sampled last for its slot.
  // Device input is asked for after all checks of the frame, device output sent before the return.
  // Blocks that a sequence left non-finite values in are cleared when it is closed: the coordinator
  // asks for that too (clear_blocks), but may have closed it before it heard of them. Of blocks
  // that are shared by cached_blocks it must know that they were written without an error.
  // Nothing must be pending.
  absl::StatusOr<Frame> Run(const Frame& frame);

  // The same in parts. Submit does what Run does (with its errors) but for what a backend with
  // MaxPicks() can leave to the device: the step is pending then, until Finish, which waits for it.
  // The frame for the next hop comes from Finish, or, if all that it lacks goes from device to
  // device, from Submit. An error of Ready or Finish is a device's or a channel's fault, behind
  // which the stage is of no use.
  struct Submitted {
    // False: the step needs what those pending will find out (or there are too many of them), or
    // would wait for weights; nothing has changed, and it can be submitted again after a Finish.
    bool taken = false;
    std::optional<Frame> frame;
  };
  absl::StatusOr<Submitted> Submit(const Frame& frame);
  int pending() const;
  // Of the earliest pending step, of which there must be one: whether Finish would return at once.
  absl::StatusOr<bool> Ready();
  // Nothing if Submit gave the frame.
  absl::StatusOr<std::optional<Frame>> Finish();

  const StageConfig& config() const;
  // Of finished steps.
  uint64_t steps() const;
  uint64_t tokens() const;         // rows
  double compute_seconds() const;  // stalls on weights and channels excluded
  // Between the submission of a step and its input from a channel, with nothing else to do.
  double input_wait_seconds() const;

 private:
  class Impl;
  explicit Stage(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_STAGE_H_
