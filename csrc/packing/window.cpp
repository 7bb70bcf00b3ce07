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
      next_bits_(random_.bits(num_draws)),
      // No sample fits after the end.
      slots_{{2 * capacity_, kEnd, kEnd, kEnd}},
      ids_(1),
      queues_(size_t{capacity_} + 1),
      sizes_(capacity_),
      mirrored_(capacity_) {}

uint32_t WindowPacker::smaller_of_pair(uint32_t room) {
  const uint32_t half = room / 2;
  const uint32_t num_words = half / 64 + 1;
  // From a random place on, so that no size is favoured.
  auto word = static_cast<uint32_t>(Draws(next_bits_).below(num_words));
  next_bits_ = random_.bits(++num_draws_);
  for (uint32_t i = 0; i < num_words; ++i) {
    const uint32_t first = word * 64;
    uint64_t pairs = sizes_.bits_from(first) & mirrored_.bits_from(capacity_ - room + first);
    if (half - first < 63) pairs &= (uint64_t{2} << (half - first)) - 1;
    while (pairs != 0) {
      const uint32_t size = first + static_cast<uint32_t>(std::countr_zero(pairs));
      // Two halves must be two samples.
      if (2 * size != room || slots_[queues_[size].head].next_of_size != kEnd) return size;
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
  for (uint32_t slot = slots_[kEnd].newer; slot != kEnd; slot = slots_[slot].newer) {
    found.push_back({ids_[slot], slots_[slot].size});
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
  BinOffsets bin_offsets(rest.size());
  size_t end = 0;
  while (copy.count() > 0) {
    copy.take_bin([&](int64_t i) { places[end++] = static_cast<uint32_t>(i); });
    bin_offsets.close(end);
  }
  BinPlan decreasing =
      best_fit_decreasing(sizes, capacity_, max_samples_, options_.seed, options_.epoch);
  if (decreasing.order.size < bin_offsets.num_bins()) return decreasing;
  return bins_in_order(std::move(places), std::move(bin_offsets));
}

}  // namespace sft_fast
