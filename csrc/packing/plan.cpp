#include "packing/plan.hpp"

#include <algorithm>
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
  Array<uint32_t> order = ascending(static_cast<size_t>(count));
  shuffle(order.data.get(), 0, order.size, random);
  return order;
}

}  // namespace

Array<uint32_t> bin_order(int64_t count, uint64_t seed, uint64_t epoch) {
  return random_order(count, Random(seed, epoch, Stream::kBinOrder));
}

Array<uint32_t> sample_order(int64_t count, uint64_t seed, uint64_t epoch) {
  return random_order(count, Random(seed, epoch, Stream::kSampleOrder));
}

BinPlan bins_in_order(Array<uint32_t> sample_ids, const std::vector<int64_t>& bin_offsets) {
  Array<int64_t> offsets(bin_offsets.size());
  std::copy(bin_offsets.begin(), bin_offsets.end(), offsets.data.get());
  return {std::move(sample_ids), std::move(offsets), ascending(bin_offsets.size() - 1)};
}

BinPlan plan_window(std::span<const int32_t> lengths, const PlanOptions& options) {
  constexpr size_t kPrefetchDistance = 16;
  const Sizes sizes(lengths, options);
  const int32_t* size_of = sizes.view().data();
  const size_t num_samples = lengths.size();
  Array<uint32_t> incoming =
      sample_order(static_cast<int64_t>(num_samples), options.seed, options.epoch);
  Array<uint32_t> sample_ids(num_samples);
  std::vector<int64_t> bin_offsets{0};
  WindowPacker packer(options, 0);
  uint32_t* next_id = sample_ids.data.get();
  const auto emit = [&](int64_t id) { *next_id++ = static_cast<uint32_t>(id); };
  const auto close_bin = [&] { bin_offsets.push_back(next_id - sample_ids.data.get()); };
  for (size_t i = 0; i < num_samples; ++i) {
    if (i + kPrefetchDistance < num_samples) {
      __builtin_prefetch(size_of + incoming[i + kPrefetchDistance]);
    }
    packer.add(incoming[i], static_cast<uint32_t>(size_of[incoming[i]]));
    if (packer.needs_more()) continue;
    packer.take_bin(emit);
    close_bin();
  }
  packer.take_rest(emit, close_bin);
  return bins_in_order(std::move(sample_ids), bin_offsets);
}

BinPlan plan_sequential(std::span<const int32_t> lengths, const PlanOptions& options) {
  const Sizes sizes(lengths, options);
  std::vector<int64_t> bin_offsets{0};
  uint32_t room = sizes.capacity();
  for (size_t i = 0; i < lengths.size(); ++i) {
    const auto size = static_cast<uint32_t>(sizes.view()[i]);
    const int64_t num_samples = static_cast<int64_t>(i) - bin_offsets.back();
    if (size > room || num_samples == sizes.max_samples()) {
      bin_offsets.push_back(static_cast<int64_t>(i));
      room = sizes.capacity();
    }
    room -= size;
  }
  if (!lengths.empty()) bin_offsets.push_back(static_cast<int64_t>(lengths.size()));
  return bins_in_order(ascending(lengths.size()), bin_offsets);
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
