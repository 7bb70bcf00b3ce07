#include "packing/plan.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sft_fast {
namespace {

// What a random number is used for; each use draws from its own stream.
enum class Stream : uint64_t { kEqualLengths = 1, kInsideBin = 2, kBinOrder = 3 };

// Counter-based: number `counter` of a stream is a pure function, so the result does not depend on
// who asks first. Source: the output function of SplitMix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  Random(uint64_t seed, uint64_t epoch, Stream stream)
      : key_(mix(mix(mix(seed + kGamma) + epoch + kGamma) + static_cast<uint64_t>(stream))) {}

  // Uniform in [0, bound), bound >= 1; the bias is below bound / 2^64.
  uint64_t below(uint64_t counter, uint64_t bound) const {
    const uint64_t bits = mix(key_ + counter * kGamma);
    // The high word of bits * bound, for bound < 2^32.
    return ((bits >> 32) * bound + (((bits & 0xffffffffu) * bound) >> 32)) >> 32;
  }

 private:
  static constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;

  static uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return bits ^ (bits >> 31);
  }

  uint64_t key_;
};

// Fisher-Yates over items[begin, end); the counter is the position.
template <typename T>
void shuffle(T* items, size_t begin, size_t end, const Random& random) {
  for (size_t i = begin + 1; i < end; ++i) {
    std::swap(items[i], items[begin + random.below(i, i - begin + 1)]);
  }
}

Array<uint32_t> random_order(size_t num_bins, uint64_t seed, uint64_t epoch) {
  Array<uint32_t> order(num_bins);
  for (size_t i = 0; i < num_bins; ++i) order[i] = static_cast<uint32_t>(i);
  shuffle(order.data.get(), 0, num_bins, Random(seed, epoch, Stream::kBinOrder));
  return order;
}

[[noreturn]] void throw_bad_length(size_t sample, int64_t length, int64_t capacity) {
  throw std::invalid_argument("sample " + std::to_string(sample) + " has " +
                              std::to_string(length) + " tokens; expected 1 to " +
                              std::to_string(capacity) +
                              " (packing.capacity): raise it, or set data.over_length");
}

// Returns counts[length] for length in [0, longest + 1]; the last entry is 0.
std::vector<uint32_t> count_lengths(std::span<const int32_t> lengths, int64_t capacity) {
  if (capacity < 1 || capacity > kMaxCapacity) {
    throw std::invalid_argument("packing.capacity is " + std::to_string(capacity) +
                                "; expected 1 to " + std::to_string(kMaxCapacity) + " tokens");
  }
  if (lengths.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument("a plan holds fewer than 2^31 samples, but there are " +
                                std::to_string(lengths.size()));
  }
  int32_t longest = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) throw_bad_length(i, lengths[i], capacity);
    longest = std::max(longest, lengths[i]);
  }
  std::vector<uint32_t> counts(static_cast<size_t>(longest) + 2);
  for (const int32_t length : lengths) ++counts[static_cast<size_t>(length)];
  return counts;
}

// Sample ids sorted by length, in random order among equals.
struct SortedSamples {
  Array<uint32_t> ids;
  std::vector<uint32_t> begin;  // begin[length]: where the samples of that length start in ids
};

SortedSamples sort_by_length(std::span<const int32_t> lengths, const std::vector<uint32_t>& counts,
                             const Random& random) {
  SortedSamples sorted{Array<uint32_t>(lengths.size()), std::vector<uint32_t>(counts.size())};
  for (size_t i = 1; i < counts.size(); ++i) sorted.begin[i] = sorted.begin[i - 1] + counts[i - 1];
  std::vector<uint32_t> next = sorted.begin;
  for (size_t i = 0; i < lengths.size(); ++i) {
    sorted.ids[next[static_cast<size_t>(lengths[i])]++] = static_cast<uint32_t>(i);
  }
  for (size_t length = 1; length + 1 < counts.size(); ++length) {
    shuffle(sorted.ids.data.get(), sorted.begin[length], sorted.begin[length + 1], random);
  }
  return sorted;
}

// A set of integers in [0, limit]: insertion, removal and successor in a few word operations.
class IntegerSet {
 public:
  explicit IntegerSet(size_t limit) {
    size_t num_bits = limit + 1;
    do {
      num_bits = (num_bits + 63) / 64;
      levels_.emplace_back(num_bits);
    } while (num_bits > 1);
  }

  void insert(size_t value) {
    for (auto& words : levels_) {
      words[value / 64] |= uint64_t{1} << (value % 64);
      value /= 64;
    }
  }

  void erase(size_t value) {
    for (auto& words : levels_) {
      words[value / 64] &= ~(uint64_t{1} << (value % 64));
      // A word that still holds others keeps its bit in the level above.
      if (words[value / 64] != 0) return;
      value /= 64;
    }
  }

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

  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

 private:
  size_t descend(size_t level, size_t value) const {
    for (; level > 0; --level) {
      value = value * 64 + static_cast<size_t>(std::countr_zero(levels_[level - 1][value]));
    }
    return value;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

constexpr int32_t kNil = -1;

// A step of a bin's history: `count` samples of `length`, on top of what `parent` says.
struct Pattern {
  int32_t length;
  uint32_t count;
  int32_t parent;
};

// Bins with the same contents up to the choice among equally long samples.
struct Group {
  uint32_t residual;  // tokens still free in each bin
  uint32_t num_bins;
  int32_t pattern;
  int32_t next;  // another group with the same residual
};

// The decisions of best-fit decreasing, made for whole groups of bins at a time.
class GroupPacker {
 public:
  explicit GroupPacker(size_t capacity)
      : capacity_(static_cast<uint32_t>(capacity)),
        residuals_(capacity),
        heads_(capacity + 1, kNil) {}

  // Places `count` samples of `length`. Lengths must arrive in descending order.
  void place(int32_t length, uint32_t count) {
    const auto size = static_cast<uint32_t>(length);
    while (count > 0) {
      const Group group = take_fullest(size, count);
      // The bin that just took a sample is the fullest that fits the next, until it is full.
      const uint32_t per_bin = group.residual / size;
      const uint32_t num_filled = std::min(group.num_bins, count / per_bin);
      put(group, num_filled, length, per_bin);
      count -= num_filled * per_bin;
      uint32_t num_untouched = group.num_bins - num_filled;
      if (num_untouched > 0 && count > 0) {
        put(group, 1, length, count);
        count = 0;
        --num_untouched;
      }
      put(group, num_untouched, length, 0);
    }
  }

  size_t num_bins() const { return num_bins_; }

  // Calls visit(group, contents) for every group, contents being its (length, count) steps.
  template <typename Visit>
  void for_each_group(Visit visit) const {
    std::vector<Pattern> contents;
    for (size_t residual = residuals_.successor(0); residual != IntegerSet::kNone;
         residual = residuals_.successor(residual + 1)) {
      for (int32_t g = heads_[residual]; g != kNil; g = groups_[static_cast<size_t>(g)].next) {
        const Group& group = groups_[static_cast<size_t>(g)];
        contents.clear();
        for (int32_t p = group.pattern; p != kNil; p = contents.back().parent) {
          contents.push_back(patterns_[static_cast<size_t>(p)]);
        }
        visit(group, contents);
      }
    }
  }

 private:
  // Removes and returns a group with the least sufficient residual, or opens enough empty bins.
  Group take_fullest(uint32_t size, uint32_t count) {
    const size_t residual = residuals_.successor(size);
    if (residual == IntegerSet::kNone) {
      const uint32_t per_bin = capacity_ / size;
      const uint32_t num_new = count / per_bin + (count % per_bin != 0);
      num_bins_ += num_new;
      return {capacity_, num_new, kNil, kNil};
    }
    const int32_t g = heads_[residual];
    const Group group = groups_[static_cast<size_t>(g)];
    heads_[residual] = group.next;
    if (group.next == kNil) residuals_.erase(residual);
    free_groups_.push_back(g);
    return group;
  }

  // Keeps `num_bins` bins of `group`, each with `count` more samples of `length`.
  void put(const Group& group, uint32_t num_bins, int32_t length, uint32_t count) {
    if (num_bins == 0) return;
    int32_t pattern = group.pattern;
    if (count > 0) {
      pattern = static_cast<int32_t>(patterns_.size());
      patterns_.push_back({length, count, group.pattern});
    }
    const uint32_t residual = group.residual - count * static_cast<uint32_t>(length);
    int32_t g;
    if (free_groups_.empty()) {
      g = static_cast<int32_t>(groups_.size());
      groups_.emplace_back();
    } else {
      g = free_groups_.back();
      free_groups_.pop_back();
    }
    groups_[static_cast<size_t>(g)] = {residual, num_bins, pattern, heads_[residual]};
    heads_[residual] = g;
    residuals_.insert(residual);
  }

  uint32_t capacity_;
  size_t num_bins_ = 0;
  IntegerSet residuals_;        // residuals that some group has
  std::vector<int32_t> heads_;  // [residual]: its first group
  std::vector<Group> groups_;
  std::vector<int32_t> free_groups_;
  std::vector<Pattern> patterns_;
};

}  // namespace

BinPlan plan_best_fit_decreasing(std::span<const int32_t> lengths, int64_t capacity, uint64_t seed,
                                 uint64_t epoch) {
  const std::vector<uint32_t> counts = count_lengths(lengths, capacity);
  GroupPacker packer(static_cast<size_t>(capacity));
  for (size_t length = counts.size() - 1; length > 0; --length) {
    if (counts[length] > 0) packer.place(static_cast<int32_t>(length), counts[length]);
  }
  SortedSamples sorted =
      sort_by_length(lengths, counts, Random(seed, epoch, Stream::kEqualLengths));
  BinPlan plan{Array<int64_t>(lengths.size()), Array<int64_t>(packer.num_bins() + 1),
               random_order(packer.num_bins(), seed, epoch)};
  const Random inside_bin(seed, epoch, Stream::kInsideBin);
  size_t bin = 0;
  size_t end = 0;
  plan.bin_offsets[0] = 0;
  packer.for_each_group([&](const Group& group, const std::vector<Pattern>& contents) {
    for (uint32_t i = 0; i < group.num_bins; ++i) {
      const size_t begin = end;
      for (const Pattern& step : contents) {
        uint32_t& next = sorted.begin[static_cast<size_t>(step.length)];
        for (uint32_t taken = 0; taken < step.count; ++taken) {
          plan.sample_ids[end++] = sorted.ids[next++];
        }
      }
      shuffle(plan.sample_ids.data.get(), begin, end, inside_bin);
      plan.bin_offsets[++bin] = static_cast<int64_t>(end);
    }
  });
  assert(end == lengths.size() && bin == packer.num_bins());
  return plan;
}

BinPlan plan_one_per_bin(std::span<const int32_t> lengths, int64_t capacity, uint64_t seed,
                         uint64_t epoch) {
  count_lengths(lengths, capacity);
  const size_t num_bins = lengths.size();
  BinPlan plan{Array<int64_t>(num_bins), Array<int64_t>(num_bins + 1),
               random_order(num_bins, seed, epoch)};
  for (size_t i = 0; i < num_bins; ++i) plan.sample_ids[i] = static_cast<int64_t>(i);
  for (size_t i = 0; i <= num_bins; ++i) plan.bin_offsets[i] = static_cast<int64_t>(i);
  return plan;
}

}  // namespace sft_fast
