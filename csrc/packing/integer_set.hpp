// A set of small integers, for "the least member that is at least this much".
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace sft_fast {

// Integers in [0, limit]: insertion, removal and successor in a few word operations.
class IntegerSet {
 public:
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  explicit IntegerSet(size_t limit) {
    size_t num_bits = limit + 1;
    do {
      num_bits = (num_bits + 63) / 64;
      // One word more than needed, so that bits_from may look past the end.
      levels_.emplace_back(num_bits + 1);
    } while (num_bits > 1);
  }

  void insert(size_t value) {
    for (auto& words : levels_) {
      uint64_t& word = words[value / 64];
      const bool is_known_above = word != 0;
      word |= uint64_t{1} << (value % 64);
      if (is_known_above) return;
      value /= 64;
    }
  }

  void erase(size_t value) { erase_if(true, value); }

  // Removes a member, or does nothing; without a branch on which, where neither is likelier.
  void erase_if(bool condition, size_t value) {
    for (auto& words : levels_) {
      words[value / 64] &= ~(uint64_t{condition} << (value % 64));
      // A word that still holds others keeps its bit in the level above.
      if (words[value / 64] != 0) return;
      value /= 64;
    }
  }

  bool contains(size_t value) const { return (levels_[0][value / 64] >> (value % 64) & 1) != 0; }

  // The smallest member >= value, or kNone.
  size_t successor(size_t value) const {
    for (size_t level = 0; level < levels_.size(); ++level) {
      const size_t word = value / 64;
      if (word >= levels_[level].size()) return kNone;
      const uint64_t rest = levels_[level][word] >> (value % 64);
      if (rest != 0) return descend(level, value + static_cast<size_t>(std::countr_zero(rest)));
      value = word + 1;
    }
    return kNone;
  }

  // Bit i tells whether value + i is a member, for value <= limit.
  uint64_t bits_from(size_t value) const {
    const uint64_t* word = levels_[0].data() + value / 64;
    const size_t shift = value % 64;
    // In two steps, because a shift by 64 is undefined.
    return (word[0] >> shift) | ((word[1] << 1) << (63 - shift));
  }

 private:
  size_t descend(size_t level, size_t value) const {
    for (; level > 0; --level) {
      value = value * 64 + static_cast<size_t>(std::countr_zero(levels_[level - 1][value]));
    }
    return value;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

}  // namespace sft_fast
