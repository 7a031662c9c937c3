#include "coordinator/block_pool.h"

#include <xxhash.h>

#include <algorithm>
#include <cassert>
#include <utility>

namespace stagecoach {

BlockPool::BlockPool(int blocks, uint64_t hash_seed) : hash_seed_(hash_seed), blocks_(blocks) {
  for (int block = 0; block < blocks; ++block) {
    blocks_[block].place = free_.insert(free_.end(), block);
  }
}

void BlockPool::Reset() {
  free_.splice(free_.end(), used_);
  free_.splice(free_.end(), cached_);
  for (Block& block : blocks_) {
    block.references = 0;
    block.id = 0;
  }
  index_.clear();
  dirty_.clear();
}

int BlockPool::Allocate() {
  assert(available() > 0);
  std::list<int>& from = free_.empty() ? cached_ : free_;
  const int block = from.front();
  Forget(blocks_[block]);
  Move(block, from, used_);
  blocks_[block].references = 1;
  return block;
}

void BlockPool::AddReference(int block) {
  if (blocks_[block].references++ > 0) return;
  assert(blocks_[block].id != 0);
  Move(block, cached_, used_);
}

void BlockPool::Release(int number, bool dirty) {
  Block& block = blocks_[number];
  assert(block.references > 0 && !(dirty && block.id != 0));
  if (--block.references > 0) return;
  Move(number, used_, block.id != 0 ? cached_ : free_);
  if (dirty) dirty_.push_back(number);
}

std::vector<int> BlockPool::TakeDirty() { return std::exchange(dirty_, {}); }

BlockPool::Prefix BlockPool::Find(std::string_view salt, std::span<const int32_t> tokens,
                                  int max_blocks) const {
  Prefix prefix;
  const size_t blocks = std::min<size_t>(max_blocks, tokens.size() / kKvBlockPositions);
  while (prefix.blocks.size() < blocks) {
    const auto next = tokens.subspan(prefix.blocks.size() * kKvBlockPositions)
                          .first<static_cast<size_t>(kKvBlockPositions)>();
    const PrefixId before = prefix.runs.empty() ? 0 : prefix.runs.back();
    const auto found = index_.find(MakeKey(before, salt, next));
    if (found == index_.end()) break;
    const Block& block = blocks_[found->second];
    if (!Holds(block, before, salt, next)) break;
    prefix.blocks.push_back(found->second);
    prefix.runs.push_back(block.id);
    if (block.references == 0) ++prefix.unused;
  }
  return prefix;
}

BlockPool::Published BlockPool::Publish(int number, PrefixId before, std::string_view salt,
                                        std::span<const int32_t, kKvBlockPositions> tokens) {
  Block& block = blocks_[number];
  assert(block.references > 0 && block.id == 0);
  const Key key = MakeKey(before, salt, tokens);
  const auto [place, inserted] = index_.emplace(key, number);
  if (!inserted) {
    const Block& other = blocks_[place->second];
    const bool same = Holds(other, before, salt, tokens);
    return {.id = same ? other.id : 0, .known = same};
  }
  block.id = ++last_id_;
  block.before = before;
  block.salt = std::string(salt);
  std::copy(tokens.begin(), tokens.end(), block.tokens.begin());
  block.key = key;
  return {.id = block.id, .known = true};
}

BlockPool::Key BlockPool::MakeKey(PrefixId before, std::string_view salt,
                                  std::span<const int32_t, kKvBlockPositions> tokens) const {
  struct {
    PrefixId before;
    std::array<int32_t, kKvBlockPositions> tokens;
  } bytes;
  static_assert(sizeof(bytes) == sizeof(PrefixId) + sizeof(bytes.tokens));  // no padding
  bytes.before = before;
  std::copy(tokens.begin(), tokens.end(), bytes.tokens.begin());
  const uint64_t seed =
      salt.empty() ? hash_seed_ : XXH3_64bits_withSeed(salt.data(), salt.size(), hash_seed_);
  const XXH128_hash_t hash = XXH3_128bits_withSeed(&bytes, sizeof(bytes), seed);
  return {.low = hash.low64, .high = hash.high64};
}

bool BlockPool::Holds(const Block& block, PrefixId before, std::string_view salt,
                      std::span<const int32_t, kKvBlockPositions> tokens) {
  return block.before == before && block.salt == salt &&
         std::equal(tokens.begin(), tokens.end(), block.tokens.begin());
}

void BlockPool::Move(int block, std::list<int>& from, std::list<int>& to) {
  to.splice(to.end(), from, blocks_[block].place);
}

void BlockPool::Forget(Block& block) {
  if (std::exchange(block.id, 0) != 0) index_.erase(block.key);
}

}  // namespace stagecoach
