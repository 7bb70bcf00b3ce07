// What the planners share: checked options, and lengths in units of the alignment.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "packing/plan.hpp"
#include "packing/random.hpp"

namespace sft_fast {

// In whole units alignment costs the planners nothing, and exact fills become likelier.
class Sizes {
 public:
  // Throws std::invalid_argument if an option is out of range or a sample does not fit in a bin.
  Sizes(std::span<const int32_t> lengths, const PlanOptions& options);

  std::span<const int32_t> view() const { return view_; }  // [num_samples], units per sample
  uint32_t capacity() const { return capacity_; }          // units per bin
  uint32_t max_samples() const { return max_samples_; }    // per bin, at least 1

 private:
  Array<int32_t> rounded_;  // empty where the alignment is 1
  std::span<const int32_t> view_;
  uint32_t capacity_;
  uint32_t max_samples_;
};

constexpr size_t kIdsPerLine = 16;

// Asks for the cache line of ids[place], which may lie past the end.
inline void prefetch_to_write(const uint32_t* ids, size_t place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(ids) + place * sizeof(*ids);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 1);
}

// Throws std::invalid_argument if an option is out of range.
void check_options(const PlanOptions& options);

// The units that `sample` takes up. Throws std::invalid_argument if it does not fit in a bin.
uint32_t checked_size(int64_t sample, int64_t length, const PlanOptions& options);

// `max_samples` of the options with the limit that "no limit" has.
uint32_t sample_limit(const PlanOptions& options);

// 0, 1, ..., count - 1 in random order, shuffled in buckets of about `bucket_size`.
Array<uint32_t> order_by_buckets(size_t count, size_t bucket_size, const Random& random);

// Offsets of bins that are closed one after the other.
class BinOffsets {
 public:
  explicit BinOffsets(size_t most_bins) : offsets_(most_bins + 1) { offsets_[0] = 0; }

  // Ends the bin before sample number `end`.
  void close(size_t end) { offsets_[++num_bins_] = static_cast<int64_t>(end); }

  // Where the next bin begins.
  int64_t begin() { return offsets_[num_bins_]; }

  size_t num_bins() const { return num_bins_; }

  // [num_bins + 1]
  Array<int64_t> take() {
    offsets_.size = num_bins_ + 1;
    return std::move(offsets_);
  }

 private:
  Array<int64_t> offsets_;
  size_t num_bins_ = 0;
};

// A plan whose bins are trained on in the order in which they were made.
BinPlan bins_in_order(Array<uint32_t> sample_ids, BinOffsets bin_offsets);

// plan_best_fit_decreasing on checked sizes.
BinPlan best_fit_decreasing(std::span<const int32_t> sizes, uint32_t capacity, uint32_t max_samples,
                            uint64_t seed, uint64_t epoch);

}  // namespace sft_fast
