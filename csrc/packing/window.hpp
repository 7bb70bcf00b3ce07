// Packs a stream of samples in its own order, from a pool of those that are next in line.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <vector>

#include "packing/common.hpp"
#include "packing/integer_set.hpp"
#include "packing/plan.hpp"
#include "packing/random.hpp"

namespace sft_fast {

// Every bin starts with the oldest samples of the pool, so none waits for long and the order of the
// stream is kept but for a window; the last one or two are chosen so that the bin is exactly full.
// A stream in random order therefore gives bins that are random samples of the data.
// Memory: that of the pool, and 12 bytes a unit of capacity.
class WindowPacker {
 public:
  struct Item {
    int64_t id;
    uint32_t size;
  };

  // Of `options`, epoch and seed only decide where a search for exact fills starts.
  // `num_draws` continues the random numbers of an earlier packer; 0 for a new one.
  WindowPacker(const PlanOptions& options, uint64_t num_draws);

  // Takes in a sample of 1 to capacity units. Ids mean nothing here.
  void add(int64_t id, uint32_t size) {
    assert(size >= 1 && size <= capacity_);
    if (unused_ == kEnd) {
      unused_ = static_cast<uint32_t>(slots_.size());
      slots_.push_back({});
      ids_.push_back(0);
    }
    const uint32_t slot = unused_;
    unused_ = slots_[slot].newer;
    Queue& queue = queues_[size];
    const uint32_t newest = slots_[kEnd].older;
    slots_[slot] = {size, kEnd, newest, kEnd};
    ids_[slot] = id;
    slots_[newest].newer = slot;
    slots_[kEnd].older = slot;
    slots_[queue.tail].next_of_size = slot;
    queue.head |= slot & (uint32_t{queue.head != kEnd} - 1);
    queue.tail = slot;
    sizes_.insert(size);
    mirrored_.insert(capacity_ - size);
    ++count_;
    units_ += size;
  }

  // True until the pool holds enough to fill bins well: pool_size samples, and 8 bins' worth, but
  // never more than kMaxPoolSize samples.
  bool needs_more() const {
    return count_ < pool_size_ || (units_ < 8 * uint64_t{capacity_} && count_ < kMaxPoolSize);
  }

  // Calls emit(id) for the samples of the next bin. The pool must not be empty.
  template <typename Emit>
  void take_bin(Emit emit) {
    assert(count_ > 0);
    const int64_t reserve = std::min<int64_t>(units_ / count_, capacity_ / 3);
    int64_t room = capacity_;
    uint32_t num_free = max_samples_;
    // The oldest, as long as what is left can still be filled by choice.
    do {
      const uint32_t oldest = slots_[kEnd].newer;
      const int64_t size = slots_[oldest].size;
      const int64_t rest = room - size;
      if (rest < reserve && rest != 0 && room != capacity_) break;
      emit(take(oldest));
      room = rest;
      --num_free;
    } while (room > 0 && num_free > 0);
    while (room > 0 && num_free > 0 && count_ > 0) {
      auto size = static_cast<uint32_t>(room);
      if (!sizes_.contains(size)) {
        size = num_free > 1 ? smaller_of_pair(size) : 0;
        if (size == 0) size = greatest_within(static_cast<uint32_t>(room));
        if (size == 0) return;
      }
      emit(take(queues_[size].head));
      room -= size;
      --num_free;
    }
  }

  // Empties the pool, for the end of a stream: bins made as before, or by best-fit decreasing where
  // that needs fewer. Calls emit(id) for each sample and close_bin() after each bin.
  template <typename Emit, typename CloseBin>
  void take_rest(Emit emit, CloseBin close_bin) {
    BinPlan plan = plan_rest();
    const std::vector<Item> rest = items();
    while (count_ > 0) take(slots_[kEnd].newer);
    for (size_t i = 0; i < plan.order.size; ++i) {
      const size_t bin = plan.order[i];
      for (int64_t j = plan.bin_offsets[bin]; j < plan.bin_offsets[bin + 1]; ++j) {
        emit(rest[plan.sample_ids[static_cast<size_t>(j)]].id);
      }
      close_bin();
    }
  }

  // What a new packer must be given, in this order, to continue as this one would.
  std::vector<Item> items() const;
  uint64_t num_draws() const { return num_draws_; }
  uint32_t count() const { return count_; }

 private:
  // Of the list by age and of each queue, and itself no sample: its neighbours are the oldest and
  // the newest. What is written to it where there is no other slot saves a branch, and in a full
  // pool most of them would be mispredicted.
  static constexpr uint32_t kEnd = 0;

  struct Slot {
    uint32_t size;
    uint32_t next_of_size;
    uint32_t older;
    uint32_t newer;
  };

  // The samples of one size, oldest first.
  struct Queue {
    uint32_t head = kEnd;
    uint32_t tail = kEnd;
  };

  // Removes a sample that is the oldest of its size and returns its id.
  int64_t take(uint32_t taken) {
    const Slot& slot = slots_[taken];
    const uint32_t size = slot.size;
    const uint32_t older = slot.older;
    const uint32_t newer = slot.newer;
    const uint32_t next_of_size = slot.next_of_size;
    const bool is_last = next_of_size == kEnd;
    Queue& queue = queues_[size];
    queue.head = next_of_size;
    queue.tail &= uint32_t{is_last} - 1;
    sizes_.erase_if(is_last, size);
    mirrored_.erase_if(is_last, capacity_ - size);
    slots_[older].newer = newer;
    slots_[newer].older = older;
    slots_[taken].newer = unused_;
    unused_ = taken;
    --count_;
    units_ -= size;
    return ids_[taken];
  }

  // A size such that it and `room` minus it are both there, the smaller of the two; 0 if none.
  uint32_t smaller_of_pair(uint32_t room);

  // The greatest size that is there and at most `room`; 0 if none.
  uint32_t greatest_within(uint32_t room) const;

  // Bins of places in items().
  BinPlan plan_rest() const;

  PlanOptions options_;
  uint32_t capacity_;
  uint32_t max_samples_;
  uint32_t pool_size_;
  Random random_;
  uint64_t num_draws_;
  uint64_t next_bits_;  // of the next draw, so that no draw waits for them

  std::vector<Slot> slots_;
  std::vector<int64_t> ids_;  // of the samples in the slots
  uint32_t unused_ = kEnd;    // the first of those that hold no sample, linked by `newer`
  uint32_t count_ = 0;
  uint64_t units_ = 0;

  std::vector<Queue> queues_;  // [capacity + 1]
  IntegerSet sizes_;           // sizes that are there
  IntegerSet mirrored_;        // capacity minus them: pairs with a given sum lie side by side
};

}  // namespace sft_fast
