#include "packing/plan.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "packing/common.hpp"
#include "packing/random.hpp"
#include "packing/window.hpp"

namespace sft_fast {
namespace {

Array<uint32_t> ascending(size_t count) {
  Array<uint32_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<uint32_t>(i);
  return values;
}

Array<uint32_t> random_order(int64_t count, const Random& random) {
  if (count < 0 || count > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("count is " + std::to_string(count) + "; expected 0 to 2^31 - 1");
  }
  // More do not fit in the caches, and swaps all over them would wait for memory.
  constexpr size_t kMostInPlace = size_t{1} << 21;
  constexpr size_t kBucketSize = 60000;
  const auto size = static_cast<size_t>(count);
  if (size > kMostInPlace) return order_by_buckets(size, kBucketSize, random);
  Array<uint32_t> order = ascending(size);
  shuffle(order.data.get(), 0, size, random);
  return order;
}

// Returns values[places[i]] for every i.
Array<int32_t> gather(std::span<const int32_t> values, Array<uint32_t>& places) {
  constexpr size_t kPrefetchDistance = 16;
  Array<int32_t> gathered(places.size);
  for (size_t i = 0; i < places.size; ++i) {
    if (i + kPrefetchDistance < places.size) {
      __builtin_prefetch(values.data() + places[i + kPrefetchDistance]);
    }
    gathered[i] = values[places[i]];
  }
  return gathered;
}

}  // namespace

// Every number goes to a random bucket, and each bucket is shuffled within a cache: as uniform as a
// shuffle of all. Source: C. R. Rao 1961, M. Sandelius 1962.
Array<uint32_t> order_by_buckets(size_t count, size_t bucket_size, const Random& random) {
  const auto num_bits = static_cast<unsigned>(std::bit_width(count / bucket_size));
  assert(num_bits <= 16);
  // Calls visit(i, bucket) for i = 0, 1, 2, ...; a random number decides on four buckets.
  const auto for_each = [&](auto visit) {
    for (size_t i = 0; i < count; i += 4) {
      // The counters below are those of the shuffles.
      uint64_t bits = random.bits(count + i / 4);
      for (size_t j = i; j < std::min(i + 4, count); ++j, bits >>= 16) {
        visit(j, static_cast<size_t>((bits & 0xffffu) >> (16 - num_bits)));
      }
    }
  };
  std::vector<uint32_t> next((size_t{1} << num_bits) + 1);
  for_each([&](size_t, size_t bucket) { ++next[bucket + 1]; });
  for (size_t b = 1; b < next.size(); ++b) next[b] += next[b - 1];
  Array<uint32_t> order(count);
  for_each([&](size_t i, size_t bucket) {
    const size_t place = next[bucket]++;
    prefetch_to_write(order.data.get(), place + kIdsPerLine);
    order[place] = static_cast<uint32_t>(i);
  });
  size_t begin = 0;
  for (size_t b = 0; b + 1 < next.size(); begin = next[b++]) {
    shuffle(order.data.get(), begin, next[b], random);
  }
  return order;
}

Array<uint32_t> bin_order(int64_t count, uint64_t seed, uint64_t epoch) {
  return random_order(count, Random(seed, epoch, Stream::kBinOrder));
}

Array<uint32_t> sample_order(int64_t count, uint64_t seed, uint64_t epoch) {
  return random_order(count, Random(seed, epoch, Stream::kSampleOrder));
}

BinPlan bins_in_order(Array<uint32_t> sample_ids, BinOffsets bin_offsets) {
  return {std::move(sample_ids), bin_offsets.take(), ascending(bin_offsets.num_bins())};
}

BinPlan plan_window(std::span<const int32_t> lengths, const PlanOptions& options) {
  const Sizes sizes(lengths, options);
  const size_t num_samples = lengths.size();
  // Ids of bins take the places of those that came in, of which there are never fewer.
  Array<uint32_t> ids =
      sample_order(static_cast<int64_t>(num_samples), options.seed, options.epoch);
  Array<int32_t> incoming = gather(sizes.view(), ids);
  BinOffsets bin_offsets(num_samples);
  size_t num_out = 0;
  const auto emit = [&](int64_t id) { ids[num_out++] = static_cast<uint32_t>(id); };
  const auto close_bin = [&] { bin_offsets.close(num_out); };
  WindowPacker packer(options, 0);
  for (size_t i = 0; i < num_samples; ++i) {
    packer.add(ids[i], static_cast<uint32_t>(incoming[i]));
    if (packer.needs_more()) continue;
    packer.take_bin(emit);
    close_bin();
  }
  packer.take_rest(emit, close_bin);
  incoming.data.reset();
  return bins_in_order(std::move(ids), std::move(bin_offsets));
}

BinPlan plan_sequential(std::span<const int32_t> lengths, const PlanOptions& options) {
  const Sizes sizes(lengths, options);
  BinOffsets bin_offsets(lengths.size());
  uint32_t room = sizes.capacity();
  for (size_t i = 0; i < lengths.size(); ++i) {
    const auto size = static_cast<uint32_t>(sizes.view()[i]);
    const int64_t num_samples = static_cast<int64_t>(i) - bin_offsets.begin();
    if (size > room || num_samples == sizes.max_samples()) {
      bin_offsets.close(i);
      room = sizes.capacity();
    }
    room -= size;
  }
  if (!lengths.empty()) bin_offsets.close(lengths.size());
  return bins_in_order(ascending(lengths.size()), std::move(bin_offsets));
}

BinPlan plan_one_per_bin(std::span<const int32_t> lengths, const PlanOptions& options) {
  const Sizes sizes(lengths, options);
  const size_t num_bins = lengths.size();
  BinPlan plan{ascending(num_bins), Array<int64_t>(num_bins + 1),
               bin_order(static_cast<int64_t>(num_bins), options.seed, options.epoch)};
  for (size_t i = 0; i <= num_bins; ++i) plan.bin_offsets[i] = static_cast<int64_t>(i);
  return plan;
}

}  // namespace sft_fast
