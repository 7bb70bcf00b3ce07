#include "packing/window.hpp"

#include <bit>
#include <utility>

namespace sft_fast {

WindowPacker::WindowPacker(const PlanOptions& options, uint64_t num_draws)
    : options_(options),
      capacity_(static_cast<uint32_t>(options.capacity / options.alignment)),
      max_samples_(sample_limit(options)),
      pool_size_(static_cast<uint32_t>(options.pool_size)),
      random_(options.seed, options.epoch, Stream::kExactFill),
      num_draws_(num_draws),
      heads_(size_t{capacity_} + 1, kNil),
      tails_(size_t{capacity_} + 1, kNil),
      sizes_(capacity_),
      mirrored_(capacity_) {}

void WindowPacker::add(int64_t id, uint32_t size) {
  assert(size >= 1 && size <= capacity_);
  if (unused_.empty()) {
    unused_.push_back(static_cast<uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const uint32_t slot = unused_.back();
  unused_.pop_back();
  slots_[slot] = {id, size, kNil, newest_, kNil};
  (newest_ == kNil ? oldest_ : slots_[newest_].newer) = slot;
  newest_ = slot;
  if (heads_[size] == kNil) {
    heads_[size] = slot;
    sizes_.insert(size);
    mirrored_.insert(capacity_ - size);
  } else {
    slots_[tails_[size]].next_of_size = slot;
  }
  tails_[size] = slot;
  ++count_;
  units_ += size;
}

int64_t WindowPacker::take(uint32_t size) {
  const uint32_t taken = heads_[size];
  const Slot& slot = slots_[taken];
  heads_[size] = slot.next_of_size;
  if (slot.next_of_size == kNil) {
    sizes_.erase(size);
    mirrored_.erase(capacity_ - size);
  }
  (slot.older == kNil ? oldest_ : slots_[slot.older].newer) = slot.newer;
  (slot.newer == kNil ? newest_ : slots_[slot.newer].older) = slot.older;
  unused_.push_back(taken);
  --count_;
  units_ -= size;
  return slot.id;
}

uint32_t WindowPacker::smaller_of_pair(uint32_t room) {
  const uint32_t half = room / 2;
  const uint32_t num_words = half / 64 + 1;
  // From a random place on, so that no size is favoured.
  auto word = static_cast<uint32_t>(random_.below(num_draws_++, num_words));
  for (uint32_t i = 0; i < num_words; ++i) {
    const uint32_t first = word * 64;
    uint64_t pairs = sizes_.bits_from(first) & mirrored_.bits_from(capacity_ - room + first);
    if (half - first < 63) pairs &= (uint64_t{2} << (half - first)) - 1;
    while (pairs != 0) {
      const uint32_t size = first + static_cast<uint32_t>(std::countr_zero(pairs));
      // Two halves must be two samples.
      if (2 * size != room || slots_[heads_[size]].next_of_size != kNil) return size;
      pairs &= pairs - 1;
    }
    word = word + 1 == num_words ? 0 : word + 1;
  }
  return 0;
}

uint32_t WindowPacker::greatest_within(uint32_t room) const {
  const size_t mirrored = mirrored_.successor(capacity_ - room);
  return mirrored == IntegerSet::kNone ? 0 : capacity_ - static_cast<uint32_t>(mirrored);
}

std::vector<WindowPacker::Item> WindowPacker::items() const {
  std::vector<Item> found;
  found.reserve(count_);
  for (uint32_t slot = oldest_; slot != kNil; slot = slots_[slot].newer) {
    found.push_back({slots_[slot].id, slots_[slot].size});
  }
  return found;
}

BinPlan WindowPacker::plan_rest() const {
  const std::vector<Item> rest = items();
  std::vector<int32_t> sizes;
  WindowPacker copy(options_, num_draws_);
  for (size_t i = 0; i < rest.size(); ++i) {
    sizes.push_back(static_cast<int32_t>(rest[i].size));
    copy.add(static_cast<int64_t>(i), rest[i].size);
  }
  Array<uint32_t> places(rest.size());
  std::vector<int64_t> bin_offsets{0};
  int64_t end = 0;
  while (copy.count() > 0) {
    copy.take_bin(
        [&](int64_t i) { places[static_cast<size_t>(end++)] = static_cast<uint32_t>(i); });
    bin_offsets.push_back(end);
  }
  BinPlan decreasing =
      best_fit_decreasing(sizes, capacity_, max_samples_, options_.seed, options_.epoch);
  if (decreasing.order.size + 1 < bin_offsets.size()) return decreasing;
  return bins_in_order(std::move(places), bin_offsets);
}

}  // namespace sft_fast
