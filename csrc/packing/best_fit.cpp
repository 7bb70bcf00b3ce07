#include <algorithm>
#include <cassert>
#include <limits>
#include <vector>

#include "packing/common.hpp"
#include "packing/integer_set.hpp"
#include "packing/plan.hpp"
#include "packing/random.hpp"

namespace sft_fast {
namespace {

// Returns counts[size] for size in [0, capacity + 1]; the last entry is 0.
std::vector<uint32_t> count_sizes(std::span<const int32_t> sizes, uint32_t capacity) {
  const size_t num_counts = size_t{capacity} + 2;
  std::vector<uint32_t> counts(num_counts);
  size_t i = 0;
  if (sizes.size() >= 4 * num_counts) {
    // Neighbours of equal size would wait for each other's increment, so they use separate tables.
    std::vector<uint32_t> others(3 * num_counts);
    uint32_t* tables[] = {others.data(), &others[num_counts], &others[2 * num_counts]};
    for (; i + 4 <= sizes.size(); i += 4) {
      ++counts[static_cast<size_t>(sizes[i])];
      ++tables[0][sizes[i + 1]];
      ++tables[1][sizes[i + 2]];
      ++tables[2][sizes[i + 3]];
    }
    for (size_t size = 0; size < num_counts; ++size) {
      counts[size] += tables[0][size] + tables[1][size] + tables[2][size];
    }
  }
  for (; i < sizes.size(); ++i) ++counts[static_cast<size_t>(sizes[i])];
  return counts;
}

// From here on, samples do not fit in the caches.
constexpr size_t kManySamples = size_t{1} << 22;

// Sample ids sorted by size, in random order among equals.
struct SortedSamples {
  Array<uint32_t> ids;
  std::vector<uint32_t> begin;  // begin[size]: where the samples of that size start in ids
};

SortedSamples sort_by_size(std::span<const int32_t> sizes, const std::vector<uint32_t>& counts,
                           const Random& random) {
  SortedSamples sorted{Array<uint32_t>(sizes.size()), std::vector<uint32_t>(counts.size())};
  for (size_t i = 1; i < counts.size(); ++i) sorted.begin[i] = sorted.begin[i - 1] + counts[i - 1];
  std::vector<uint32_t> next = sorted.begin;
  uint32_t* const ids = sorted.ids.data.get();
  // Every size fills a line of its own; where it is far, its next is asked for in the meantime.
  const size_t ahead = sizes.size() > kManySamples ? kIdsPerLine : 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t place = next[static_cast<size_t>(sizes[i])]++;
    prefetch_to_write(ids, place + ahead);
    ids[place] = static_cast<uint32_t>(i);
  }
  for (size_t size = 1; size + 1 < counts.size(); ++size) {
    shuffle(ids, sorted.begin[size], sorted.begin[size + 1], random);
  }
  return sorted;
}

constexpr int32_t kNil = -1;

// A step of a bin's history: `count` samples of `size`, on top of what `parent` says.
struct Pattern {
  uint32_t size;
  uint32_t count;
  int32_t parent;
};

// Bins with the same contents up to the choice among samples of equal size.
struct Group {
  uint32_t residual;      // units still free in each bin
  uint32_t free_samples;  // samples that each bin may still take
  uint32_t num_bins;
  int32_t pattern;
  int32_t next;  // another group with the same residual
};

// The decisions of best-fit decreasing, made for whole groups of bins at a time.
class GroupPacker {
 public:
  GroupPacker(uint32_t capacity, uint32_t max_samples)
      : capacity_(capacity),
        max_samples_(max_samples),
        residuals_(capacity),
        heads_(size_t{capacity} + 1, kNil) {}

  // Places `count` samples of `size`. Sizes must arrive in descending order.
  void place(uint32_t size, uint32_t count) {
    while (count > 0) {
      const Group group = take_fullest(size, count);
      // The bin that just took a sample is the fullest that fits the next, until it is full.
      const uint32_t per_bin = std::min(group.residual / size, group.free_samples);
      const uint32_t num_filled = std::min(group.num_bins, count / per_bin);
      put(group, num_filled, size, per_bin);
      count -= num_filled * per_bin;
      uint32_t num_untouched = group.num_bins - num_filled;
      if (num_untouched > 0 && count > 0) {
        put(group, 1, size, count);
        count = 0;
        --num_untouched;
      }
      put(group, num_untouched, size, 0);
    }
  }

  size_t num_bins() const { return num_bins_; }

  // Calls visit(num_bins, contents) for every group, contents being its (size, count) steps.
  template <typename Visit>
  void for_each_group(Visit visit) const {
    std::vector<Pattern> contents;
    const auto visit_group = [&](const Group& group) {
      contents.clear();
      for (int32_t p = group.pattern; p != kNil; p = contents.back().parent) {
        contents.push_back(patterns_[static_cast<size_t>(p)]);
      }
      visit(group.num_bins, contents);
    };
    for (const Group& group : closed_) visit_group(group);
    for (size_t residual = residuals_.successor(0); residual != IntegerSet::kNone;
         residual = residuals_.successor(residual + 1)) {
      for (int32_t g = heads_[residual]; g != kNil; g = open_[static_cast<size_t>(g)].next) {
        visit_group(open_[static_cast<size_t>(g)]);
      }
    }
  }

 private:
  // Removes and returns a group with the least sufficient residual, or opens enough empty bins.
  Group take_fullest(uint32_t size, uint32_t count) {
    const size_t residual = residuals_.successor(size);
    if (residual == IntegerSet::kNone) {
      const uint32_t per_bin = std::min(capacity_ / size, max_samples_);
      const uint32_t num_new = count / per_bin + (count % per_bin != 0);
      num_bins_ += num_new;
      return {capacity_, max_samples_, num_new, kNil, kNil};
    }
    const int32_t g = heads_[residual];
    const Group group = open_[static_cast<size_t>(g)];
    heads_[residual] = group.next;
    if (group.next == kNil) residuals_.erase(residual);
    unused_.push_back(g);
    return group;
  }

  // Keeps `num_bins` bins of `group`, each with `count` more samples of `size`.
  void put(Group group, uint32_t num_bins, uint32_t size, uint32_t count) {
    if (num_bins == 0) return;
    group.num_bins = num_bins;
    if (count > 0) {
      patterns_.push_back({size, count, group.pattern});
      group.pattern = static_cast<int32_t>(patterns_.size()) - 1;
      group.residual -= count * size;
      group.free_samples -= count;
    }
    if (group.residual == 0 || group.free_samples == 0) {
      closed_.push_back(group);
      return;
    }
    if (unused_.empty()) {
      unused_.push_back(static_cast<int32_t>(open_.size()));
      open_.emplace_back();
    }
    const int32_t g = unused_.back();
    unused_.pop_back();
    group.next = heads_[group.residual];
    open_[static_cast<size_t>(g)] = group;
    heads_[group.residual] = g;
    residuals_.insert(group.residual);
  }

  uint32_t capacity_;
  uint32_t max_samples_;
  size_t num_bins_ = 0;
  IntegerSet residuals_;        // residuals that some open group has
  std::vector<int32_t> heads_;  // [residual]: its first group, in open_
  std::vector<Group> open_;
  std::vector<int32_t> unused_;  // places in open_
  std::vector<Group> closed_;
  std::vector<Pattern> patterns_;
};

// Moves the next samples of each size to `num_bins` bins that lie side by side at `to`.
void deal(SortedSamples& sorted, const std::vector<Pattern>& contents, uint32_t num_bins,
          size_t bin_size, uint32_t* to) {
  // Step by step over all bins, so that ids are read in their order.
  for (const Pattern& step : contents) {
    const uint32_t* from = sorted.ids.data.get() + sorted.begin[step.size];
    sorted.begin[step.size] += num_bins * step.count;
    if (step.count == 1) {
      for (uint32_t i = 0; i < num_bins; ++i) to[i * bin_size] = from[i];
    } else {
      for (uint32_t i = 0; i < num_bins; ++i) {
        for (uint32_t j = 0; j < step.count; ++j) to[i * bin_size + j] = *from++;
      }
    }
    to += step.count;
  }
}

template <size_t kBinSize>
void shuffle_bins_of(uint32_t* ids, size_t begin, uint32_t num_bins, const Random& random) {
  for (uint32_t i = 0; i < num_bins; ++i, begin += kBinSize) {
    shuffle_few<kBinSize>(ids + begin, random.bits(begin + 1));
  }
}

// Shuffles inside each of `num_bins` bins of `bin_size` samples that lie in ids from `begin` on.
void shuffle_bins(uint32_t* ids, size_t begin, uint32_t num_bins, size_t bin_size,
                  const Random& random) {
  switch (bin_size) {
    // Of bins this small the loop costs more than the swaps, so it is unrolled for each size.
    case 1:
      return;
    case 2:
      return shuffle_bins_of<2>(ids, begin, num_bins, random);
    case 3:
      return shuffle_bins_of<3>(ids, begin, num_bins, random);
    case 4:
      return shuffle_bins_of<4>(ids, begin, num_bins, random);
    case 5:
      return shuffle_bins_of<5>(ids, begin, num_bins, random);
    case 6:
      return shuffle_bins_of<6>(ids, begin, num_bins, random);
    case 7:
      return shuffle_bins_of<7>(ids, begin, num_bins, random);
    default:
      break;
  }
  for (uint32_t i = 0; i < num_bins; ++i, begin += bin_size) {
    shuffle(ids, begin, begin + bin_size, random);
  }
}

}  // namespace

BinPlan best_fit_decreasing(std::span<const int32_t> sizes, uint32_t capacity, uint32_t max_samples,
                            uint64_t seed, uint64_t epoch) {
  const std::vector<uint32_t> counts = count_sizes(sizes, capacity);
  GroupPacker packer(capacity, max_samples);
  for (size_t size = counts.size() - 1; size > 0; --size) {
    packer.place(static_cast<uint32_t>(size), counts[size]);
  }
  SortedSamples sorted = sort_by_size(sizes, counts, Random(seed, epoch, Stream::kEqualLengths));
  BinPlan plan{Array<uint32_t>(sizes.size()), Array<int64_t>(packer.num_bins() + 1),
               Array<uint32_t>(0)};
  const Random inside_bin(seed, epoch, Stream::kInsideBin);
  size_t bin = 0;
  size_t end = 0;
  plan.bin_offsets[0] = 0;
  packer.for_each_group([&](uint32_t num_bins, const std::vector<Pattern>& contents) {
    size_t bin_size = 0;
    for (const Pattern& step : contents) {
      bin_size += step.count;
      __builtin_prefetch(sorted.ids.data.get() + sorted.begin[step.size]);
    }
    // Block by block, so that bins are shuffled while they are in the cache.
    constexpr uint32_t kBinsPerBlock = 512;
    for (uint32_t first = 0; first < num_bins; first += kBinsPerBlock) {
      const uint32_t num_in_block = std::min(kBinsPerBlock, num_bins - first);
      deal(sorted, contents, num_in_block, bin_size, plan.sample_ids.data.get() + end);
      shuffle_bins(plan.sample_ids.data.get(), end, num_in_block, bin_size, inside_bin);
      for (uint32_t i = 0; i < num_in_block; ++i) {
        end += bin_size;
        plan.bin_offsets[++bin] = static_cast<int64_t>(end);
      }
    }
  });
  assert(end == sizes.size() && bin == packer.num_bins());
  // Memory that is needed no more goes before other is taken.
  sorted.ids.data.reset();
  plan.order = bin_order(static_cast<int64_t>(packer.num_bins()), seed, epoch);
  return plan;
}

BinPlan plan_best_fit_decreasing(std::span<const int32_t> lengths, const PlanOptions& options) {
  const Sizes sizes(lengths, options);
  return best_fit_decreasing(sizes.view(), sizes.capacity(), sizes.max_samples(), options.seed,
                             options.epoch);
}

}  // namespace sft_fast
