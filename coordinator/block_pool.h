// The KV blocks of the pipeline: who uses each, and what those hold that nobody uses. A block
// number means the same place in every layer of every stage, so one pool speaks for all of them.
//
// A block is free (nothing worth keeping), used (reference count >= 1: in the table of that many
// sequences) or cached (nobody uses it, but its keys and values are known by the tokens they belong
// to and are kept until the memory is needed, least recently used first).
//
// What the stages do with a block follows the order of the frames, not the time of these calls: a
// block may be released while steps that write it are in flight, and handed out again at once,
// because the step of its new user runs after them in every stage.
#ifndef STAGECOACH_COORDINATOR_BLOCK_POOL_H_
#define STAGECOACH_COORDINATOR_BLOCK_POOL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels/backend.h"

namespace stagecoach {

// A run of tokens from the start of a sequence, in whole blocks, as the prefix cache knows it.
// Numbers are never used twice, so that a run is one list of tokens for good. 0: the empty run.
using PrefixId = uint64_t;

// Not thread-safe. Misuse (a block that is not in use, an empty pool) is our own bug: asserted.
class BlockPool {
 public:
  // hash_seed: makes the places in the table of prefixes unpredictable to clients.
  explicit BlockPool(int blocks, uint64_t hash_seed = 0);

  int total() const { return static_cast<int>(blocks_.size()); }
  int free() const { return static_cast<int>(free_.size()); }
  int cached() const { return static_cast<int>(cached_.size()); }
  int used() const { return static_cast<int>(used_.size()); }
  int available() const { return free() + cached(); }  // what Allocate could hand out
  int references(int block) const { return blocks_[block].references; }

  // A block with one reference; a free one, else the least recently used cached one, which is then
  // forgotten. Precondition: available() > 0.
  int Allocate();
  // Takes a cached block into use, or shares a used one. Not for free blocks.
  void AddReference(int block);
  // Gives one reference back; at the last one the block becomes cached if it is published, else
  // free. dirty: it may hold, or come to hold by steps in flight, values that are not finite. It
  // is then zeroed by a later step before anybody reads it (TakeDirty). A published block is never
  // dirty. Release a sequence's blocks from the last to the first, so that prefixes outlive what
  // follows them.
  void Release(int block, bool dirty);
  // Blocks to be zeroed by the next step before its rows run.
  std::vector<int> TakeDirty();

  // All blocks are free and nothing is known.
  void Reset();

  // --- Prefix cache. Prefixes with another salt are strangers to each other.
  struct Prefix {
    std::vector<int> blocks;     // valid until the next Allocate, unless referenced
    std::vector<PrefixId> runs;  // run i: blocks [0, i]
    int unused = 0;              // blocks not in use: taking them leaves fewer available
  };
  // The longest known run that `tokens` start with, at most `max_blocks` long.
  Prefix Find(std::string_view salt, std::span<const int32_t> tokens, int max_blocks) const;

  struct Published {
    PrefixId id = 0;
    bool known = false;  // false: a collision of hashes; nothing was published and nothing that
                         // follows can be
  };
  // Makes a used block, which holds the keys and values of `tokens` behind the run `before` and is
  // not written any more, findable. If another block holds the same, that one stays the one.
  Published Publish(int block, PrefixId before, std::string_view salt,
                    std::span<const int32_t, kKvBlockPositions> tokens);

 private:
  // 128 bits of xxHash over (before, salt, tokens).
  struct Key {
    uint64_t low = 0, high = 0;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const { return key.low; }
  };
  struct Block {
    int references = 0;
    std::list<int>::iterator place;  // in exactly one of free_, used_, cached_
    // When published. Compared on every hit: a collision can give no wrong block.
    PrefixId id = 0;  // 0: not published
    PrefixId before = 0;
    std::string salt;
    std::array<int32_t, kKvBlockPositions> tokens = {};
    Key key;
  };

  Key MakeKey(PrefixId before, std::string_view salt,
              std::span<const int32_t, kKvBlockPositions> tokens) const;
  static bool Holds(const Block& block, PrefixId before, std::string_view salt,
                    std::span<const int32_t, kKvBlockPositions> tokens);
  void Move(int block, std::list<int>& from, std::list<int>& to);
  void Forget(Block& block);

  const uint64_t hash_seed_;
  std::vector<Block> blocks_;
  std::list<int> free_, used_, cached_;  // cached_: least recently used first
  std::vector<int> dirty_;
  std::unordered_map<Key, int, KeyHash> index_;
  PrefixId last_id_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_BLOCK_POOL_H_
