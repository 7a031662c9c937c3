// The loop at the heart of both tokenisers: of all adjacent pairs of symbols that may be merged,
// merge the best one, again and again. O(n log n) for n symbols. Private to the tokenisers.
#ifndef STAGECOACH_MODEL_TOKENIZER_MERGE_H_
#define STAGECOACH_MODEL_TOKENIZER_MERGE_H_

#include <cstdint>
#include <optional>
#include <queue>
#include <tuple>
#include <utility>
#include <vector>

namespace stagecoach {

// A stretch of the text. Symbols are in the order of the text and leave no gap.
struct Symbol {
  uint32_t begin = 0;   // byte offset in the text
  uint32_t length = 0;  // bytes; 0 = has become part of an earlier symbol
  int32_t id = -1;      // token, -1 = none
  int32_t next = -1;    // index of the next living symbol, -1 = last
  int32_t previous = -1;
  bool frozen = false;  // never merged
};

struct Merge {
  int32_t rank;  // the smallest goes first
  int32_t id;    // what the two symbols become
};

// Adds a symbol at the end of the text covered so far.
inline void AppendSymbol(uint32_t length, int32_t id, bool frozen, std::vector<Symbol>* symbols) {
  const int32_t index = static_cast<int32_t>(symbols->size());
  Symbol symbol{.length = length, .id = id, .previous = index - 1, .frozen = frozen};
  if (index > 0) {
    Symbol& last = symbols->back();
    last.next = index;
    symbol.begin = last.begin + last.length;
  }
  symbols->push_back(symbol);
}

// find_merge(const Symbol& left, const Symbol& right) -> std::optional<Merge>. Of several pairs of
// the best rank, the leftmost is merged. Walk the result from index 0 along `next`.
template <typename FindMerge>
void MergeSymbols(const FindMerge& find_merge, std::vector<Symbol>* symbols) {
  struct Candidate {
    Merge merge;
    int32_t left;
    int32_t right;
    uint32_t length;  // of both when the candidate was found: tells whether they have changed since
    bool operator<(const Candidate& other) const {  // std::priority_queue yields the greatest
      return std::tie(merge.rank, left) > std::tie(other.merge.rank, other.left);
    }
  };
  std::vector<Symbol>& s = *symbols;
  const auto find = [&](int32_t left, int32_t right) -> std::optional<Candidate> {
    if (left < 0 || right < 0 || s[left].frozen || s[right].frozen) return std::nullopt;
    const std::optional<Merge> merge = find_merge(std::as_const(s[left]), std::as_const(s[right]));
    if (!merge) return std::nullopt;
    return Candidate{*merge, left, right, s[left].length + s[right].length};
  };

  std::vector<Candidate> initial;
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(s.size()); ++i) {
    if (const std::optional<Candidate> candidate = find(i, i + 1)) initial.push_back(*candidate);
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(initial));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = s[best.left];
    Symbol& right = s[best.right];
    if (left.length == 0 || right.length == 0 || left.length + right.length != best.length) {
      continue;
    }
    left.length = best.length;
    left.id = best.merge.id;
    left.next = right.next;
    right.length = 0;
    if (left.next >= 0) s[left.next].previous = best.left;
    if (const auto candidate = find(left.previous, best.left)) queue.push(*candidate);
    if (const auto candidate = find(best.left, left.next)) queue.push(*candidate);
  }
}

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_MERGE_H_
