#include "coordinator/scheduler_sim_stages.h"

#include <utility>

#include "fmt/format.h"

namespace stagecoach {

SimStages::SimStages(int slots, int blocks) : slots_(slots), users_(blocks), held_(blocks) {}

SimStages::Value SimStages::First(std::string_view salt) {
  Value value = 14695981039346656037u;
  for (char c : salt) value = (value ^ static_cast<uint8_t>(c)) * 1099511628211u;
  return value;
}

SimStages::Value SimStages::Next(Value before, int32_t token) {
  const Value value = (before ^ static_cast<uint64_t>(token + 1)) * 0x9e3779b97f4a7c15u;
  return (value ^ (value >> 29)) | 2;  // never one of the two special ones
}

std::string SimStages::Run(const Step& step, const std::function<std::string(RequestId)>& salt,
                           const std::function<bool()>& fails) {
  if (std::string wrong = CloseAndCopy(step); !wrong.empty()) return wrong;
  for (const StepRows& rows : step.rows) {
    if (!rows.open) continue;
    if (std::string wrong = Open(rows, salt(rows.id)); !wrong.empty()) return wrong;
  }
  size_t next = 0;
  for (const StepRows& rows : step.rows) {
    std::optional<Slot>& slot = slots_.at(rows.slot);
    if (!slot || slot->sequence != rows.sequence || slot->attempt != rows.attempt) {
      return fmt::format("rows for slot {}, which does not hold sequence {}", rows.slot,
                         rows.sequence);
    }
    if (rows.row_count < 1 || next + rows.row_count > step.token_ids.size()) return "row counts";
    if (rows.start_position != static_cast<int>(slot->tokens.size())) {
      return fmt::format("rows from {} where {} are held", rows.start_position,
                         slot->tokens.size());
    }
    if (fails()) slot->failing = true;
    if (std::string wrong = Extend(rows, *slot); !wrong.empty()) return wrong;
    const int32_t* tokens = &step.token_ids[next];
    const std::optional<int32_t> sampled = std::exchange(slot->sampled, std::nullopt);
    if (rows.ahead) {
      if (rows.row_count != 1 || *tokens != 0 || !sampled) return "a row ahead behind no sample";
      tokens = &*sampled;
    }
    if (std::string wrong = Write(rows, tokens, *slot); !wrong.empty()) return wrong;
    next += rows.row_count;
    if (slot->failing) continue;
    if (std::string wrong = CheckHeld(*slot); !wrong.empty()) return wrong;
  }
  return next == step.token_ids.size() ? "" : "more tokens than rows";
}

std::string SimStages::CloseAndCopy(const Step& step) {
  for (int slot : step.close) {
    if (!slots_.at(slot)) return fmt::format("closes slot {}, which is not open", slot);
    for (int block : slots_[slot]->table) --users_[block];
    slots_[slot].reset();
  }
  for (int block : step.clear) {
    if (users_.at(block) > 0) return fmt::format("zeroes block {}, which is in a table", block);
    held_[block].fill(kZero);
  }
  if (step.copies.empty()) return "";
  // All at once, as a device may do it: no block is both read and written.
  const auto before = held_;
  for (const Step::Copy& copy : step.copies) {
    if (users_.at(copy.to) > 0) return fmt::format("copies onto block {} in use", copy.to);
    held_[copy.to] = before.at(copy.from);
    for (const Step::Copy& other : step.copies) {
      if (other.to == copy.from) return fmt::format("block {} is copied and written", copy.from);
    }
    ++copies_;
  }
  return "";
}

std::string SimStages::Open(const StepRows& rows, const std::string& salt) {
  std::optional<Slot>& slot = slots_.at(rows.slot);
  if (slot) return fmt::format("opens slot {}, which is open", rows.slot);
  slot = {.sequence = rows.sequence,
          .attempt = rows.attempt,
          .id = rows.id,
          .choice = rows.choice,
          .salt = salt,
          .tokens = rows.cached_tokens,
          .table = rows.cached_blocks};
  for (int block : slot->table) ++users_.at(block);
  if (rows.start_position != static_cast<int>(slot->tokens.size()) ||
      static_cast<int>(slot->table.size()) != KvBlocksFor(rows.start_position)) {
    return "cached blocks, cached tokens and the first position do not agree";
  }
  return CheckHeld(*slot);
}

std::string SimStages::Extend(const StepRows& rows, Slot& slot) {
  for (int block : rows.new_blocks) {
    if (users_.at(block)++ > 0) return fmt::format("new block {} is in another table", block);
    slot.table.push_back(block);
  }
  if (static_cast<int>(slot.table.size()) == KvBlocksFor(rows.start_position + rows.row_count)) {
    return "";
  }
  return fmt::format("a table of {} blocks for {} positions", slot.table.size(),
                     rows.start_position + rows.row_count);
}

std::string SimStages::Write(const StepRows& rows, const int32_t* tokens, Slot& slot) {
  Value value = First(slot.salt);
  for (int32_t token : slot.tokens) value = Next(value, token);
  for (int row = 0; row < rows.row_count; ++row) {
    const int position = rows.start_position + row;
    const int block = slot.table[position / kKvBlockPositions];
    if (users_[block] != 1)
      return fmt::format("writes block {} of {} tables", block, users_[block]);
    value = Next(value, tokens[row]);
    held_[block][position % kKvBlockPositions] = slot.failing ? kNotFinite : value;
    slot.tokens.push_back(tokens[row]);
  }
  return "";
}

std::string SimStages::CheckHeld(const Slot& slot) const {
  Value value = First(slot.salt);
  for (size_t position = 0; position < slot.table.size() * kKvBlockPositions; ++position) {
    const int block = slot.table[position / kKvBlockPositions];
    const Value held = held_[block][position % kKvBlockPositions];
    if (held == kNotFinite) return fmt::format("block {} holds what is not finite", block);
    if (position >= slot.tokens.size()) continue;
    value = Next(value, slot.tokens[position]);
    if (held != value) {
      return fmt::format("block {} does not hold position {} of sequence {}", block, position,
                         slot.sequence);
    }
  }
  return "";
}

}  // namespace stagecoach
