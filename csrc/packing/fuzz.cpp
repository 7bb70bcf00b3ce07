// Random and hostile input for every function of csrc/packing, for a build with sanitizers.
//
// fuzz_packing [rounds] [seed]; see tests/csrc/test_sanitizers.py. A round that breaks a promise of
// the headers aborts; reading or writing where it should not is the sanitizers' to find.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "packing/common.hpp"
#include "packing/fill.hpp"
#include "packing/plan.hpp"
#include "packing/random.hpp"
#include "packing/window.hpp"

namespace sft_fast {
namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

// One round's source of decisions.
class Dice {
 public:
  Dice(uint64_t seed, uint64_t round) : random_(seed, round, Stream::kSampleOrder) {}

  uint64_t bits() { return random_.bits(counter_++); }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t count) { return between(1, count) == 1; }

  // A number that is likely to be the first that something did not expect.
  int64_t hostile() {
    constexpr int64_t kEdges[] = {0,
                                  -1,
                                  1,
                                  2,
                                  63,
                                  64,
                                  65,
                                  int64_t{1} << 24,
                                  (int64_t{1} << 24) + 1,
                                  std::numeric_limits<int32_t>::min(),
                                  std::numeric_limits<int32_t>::max(),
                                  std::numeric_limits<int64_t>::min(),
                                  std::numeric_limits<int64_t>::max()};
    return kEdges[static_cast<size_t>(between(0, std::size(kEdges) - 1))];
  }

 private:
  Random random_;
  uint64_t counter_ = 0;
};

PlanOptions draw_options(Dice& dice) {
  PlanOptions options;
  options.alignment = dice.one_in(2) ? 1 : dice.between(1, 9);
  options.capacity = options.alignment * dice.between(1, dice.one_in(4) ? 2000 : 130);
  options.max_samples = dice.one_in(2) ? 0 : dice.between(1, 12);
  options.pool_size = dice.between(1, 60);
  options.seed = dice.bits();
  options.epoch = dice.bits();
  return options;
}

void damage(Dice& dice, PlanOptions& options) {
  // A capacity of 2^24 is legal, but a plan of it for each round would take hours.
  const int64_t value = dice.hostile();
  switch (dice.between(0, 3)) {
    case 0:
      options.capacity = value == int64_t{1} << 24 ? 0 : value;
      break;
    case 1:
      options.alignment = value;
      break;
    case 2:
      options.max_samples = value;
      break;
    default:
      options.pool_size = value;
  }
}

bool is_valid(const PlanOptions& options, std::span<const int32_t> lengths) {
  const bool has_valid_options =
      options.capacity >= 1 && options.capacity <= kMaxCapacity && options.alignment >= 1 &&
      options.alignment <= options.capacity && options.capacity % options.alignment == 0 &&
      options.max_samples >= 0 && options.max_samples <= std::numeric_limits<int32_t>::max() &&
      options.pool_size >= 1 && options.pool_size <= kMaxPoolSize;
  for (const int32_t length : lengths) {
    if (length < 1 || length > options.capacity) return false;
  }
  return has_valid_options;
}

int64_t round_up(int64_t length, int64_t alignment) {
  return (length + alignment - 1) / alignment * alignment;
}

void check_plan(BinPlan& plan, std::span<const int32_t> lengths, const PlanOptions& options) {
  require(plan.sample_ids.size == lengths.size(), "as many ids as samples");
  require(plan.bin_offsets.size == plan.order.size + 1, "an offset per bin");
  require(plan.bin_offsets[0] == 0, "offsets start at 0");
  require(plan.bin_offsets[plan.order.size] == static_cast<int64_t>(lengths.size()),
          "and end at N");
  std::vector<int> seen(lengths.size()), places(plan.order.size);
  for (size_t i = 0; i < plan.order.size; ++i) {
    require(plan.order[i] < places.size() && ++places[plan.order[i]] == 1, "order: each bin once");
    int64_t used = 0;
    const int64_t begin = plan.bin_offsets[i];
    const int64_t end = plan.bin_offsets[i + 1];
    require(end > begin, "no bin is empty");
    require(options.max_samples == 0 || end - begin <= options.max_samples, "max_samples");
    for (int64_t j = begin; j < end; ++j) {
      const uint32_t id = plan.sample_ids[static_cast<size_t>(j)];
      require(id < seen.size() && ++seen[id] == 1, "each sample once");
      used += round_up(lengths[id], options.alignment);
    }
    require(used <= options.capacity, "no bin over capacity");
  }
}

void fuzz_plans(Dice& dice) {
  PlanOptions options = draw_options(dice);
  std::vector<int32_t> lengths(static_cast<size_t>(dice.between(0, dice.one_in(9) ? 5000 : 150)));
  const int64_t longest = dice.between(1, options.capacity);
  for (auto& length : lengths) length = static_cast<int32_t>(dice.between(1, longest));
  if (dice.one_in(4)) damage(dice, options);
  if (dice.one_in(4) && !lengths.empty()) {
    const auto place =
        static_cast<size_t>(dice.between(0, static_cast<int64_t>(lengths.size()) - 1));
    lengths[place] = static_cast<int32_t>(dice.hostile());
  }
  const bool should_work = is_valid(options, lengths);
  for (const Strategy& strategy : kStrategies) {
    try {
      BinPlan plan = strategy.plan(lengths, options);
      require(should_work, "bad input is refused");
      check_plan(plan, lengths, options);
    } catch (const std::invalid_argument&) {
      require(!should_work, "good input is taken");
    }
  }
}

// Both ways of swapping by the same draws, in a part of an array.
template <size_t kDraws>
void fuzz_shuffle(Dice& dice, const Random& random) {
  const auto begin = static_cast<size_t>(dice.between(0, 9));
  const size_t end = begin + static_cast<size_t>(dice.between(0, 100));
  std::vector<uint32_t> near(end), far(end);
  for (size_t i = 0; i < end; ++i) near[i] = far[i] = static_cast<uint32_t>(i);
  shuffle_by<kDraws>(near.data(), begin, end, random);
  shuffle_far_by<kDraws>(far.data(), begin, end, random);
  require(near == far, "the same order near and far");
  for (size_t i = 0; i < begin; ++i) require(near[i] == i, "nothing moves before the range");
}

void fuzz_orders(Dice& dice) {
  const Random random(dice.bits(), dice.bits(), Stream::kBinOrder);
  fuzz_shuffle<1>(dice, random);
  fuzz_shuffle<2>(dice, random);
  fuzz_shuffle<4>(dice, random);
  const auto count = static_cast<size_t>(dice.between(0, 500));
  Array<uint32_t> order =
      order_by_buckets(count, static_cast<size_t>(dice.between(1, 600)), random);
  require(order.size == count, "as many as asked for");
  std::vector<int> seen(count);
  for (size_t i = 0; i < count; ++i) {
    require(order[i] < count && ++seen[order[i]] == 1, "each number once");
  }
}

void fuzz_stream(Dice& dice) {
  const PlanOptions options = draw_options(dice);
  const auto capacity = options.capacity / options.alignment;
  WindowPacker packer(options, dice.bits());
  std::vector<uint32_t> sizes;
  std::vector<int> seen;
  int64_t used = 0;
  const auto emit = [&](int64_t id) {
    require(++seen.at(static_cast<size_t>(id)) == 1, "each sample once");
    used += sizes[static_cast<size_t>(id)];
  };
  const auto close_bin = [&] {
    require(used >= 1 && used <= capacity, "no bin empty or over capacity");
    used = 0;
  };
  for (int64_t i = dice.between(0, 300); i > 0; --i) {
    if (packer.count() > 0 && dice.one_in(4)) {
      packer.take_bin(emit);
      close_bin();
    } else {
      sizes.push_back(static_cast<uint32_t>(dice.between(1, capacity)));
      seen.push_back(0);
      packer.add(static_cast<int64_t>(sizes.size()) - 1, sizes.back());
    }
    require(packer.items().size() == packer.count(), "the pool knows its size");
  }
  packer.take_rest(emit, close_bin);
  require(packer.count() == 0, "nothing is left");
  for (const int count : seen) require(count == 1, "every sample came out");
}

template <typename Id>
void fuzz_fill(Dice& dice) {
  std::vector<int64_t> offsets{0};
  for (int64_t i = dice.between(0, 9); i > 0; --i) {
    offsets.push_back(offsets.back() + dice.between(1, dice.one_in(5) ? 400 : 40));
  }
  std::vector<uint32_t> tokens(static_cast<size_t>(offsets.back()));
  for (auto& token : tokens) token = static_cast<uint32_t>(dice.bits() % 100'000);
  std::vector<uint8_t> bits((tokens.size() + 7) / 8);
  const bool is_noise = dice.one_in(2);
  for (auto& byte : bits) {
    byte = is_noise ? static_cast<uint8_t>(dice.bits()) : dice.one_in(2) ? 0 : 0xff;
  }
  SequenceLayout layout{dice.between(1, 8), dice.one_in(2) ? 1 : dice.between(1, 5), 0};
  if (layout.cp_size > 1) layout.alignment *= 2 * layout.cp_size;
  layout.cp_rank = dice.between(0, layout.cp_size - 1);
  std::vector<int64_t> ids;
  int64_t used = 0;
  if (offsets.size() > 1) {
    for (int64_t i = dice.between(0, 8); i > 0; --i) {
      ids.push_back(dice.between(0, static_cast<int64_t>(offsets.size()) - 2));
      const auto id = static_cast<size_t>(ids.back());
      used += round_up(offsets[id + 1] - offsets[id], layout.alignment);
    }
  }
  auto length = static_cast<size_t>(used / layout.cp_size + dice.between(0, 3));
  enum class Fate { kWorks, kFails, kUnknown } fate = Fate::kWorks;
  if (dice.one_in(3)) {
    fate = Fate::kFails;
    switch (dice.between(0, 4)) {
      case 0:
        ids.push_back(dice.one_in(2) ? -1 : static_cast<int64_t>(offsets.size()) - 1);
        break;
      case 1:
        bits.push_back(0);
        break;
      case 2:
        layout.cp_rank = layout.cp_size;
        break;
      case 3:
        layout.alignment = -dice.between(0, 9);
        break;
      default: {
        // May hit a sample that is not used, or move the edge between two.
        const auto last = static_cast<int64_t>(offsets.size()) - 1;
        offsets[static_cast<size_t>(dice.between(0, last))] = dice.hostile();
        fate = Fate::kUnknown;
      }
    }
  }
  // Exactly as long as promised, so that one element too many is seen.
  std::vector<Id> filled(length), labels(length), position_ids(length);
  std::vector<int32_t> cu_seqlens(ids.size() + 1);
  std::vector<int64_t> active_tokens(length);
  // The bits of 1, or any: a weight may then be negative or no number.
  const bool has_weights = !tokens.empty() && length > 0 && dice.one_in(2);
  std::vector<uint16_t> token_weights(has_weights ? tokens.size() : 0, 0x3c00);
  if (has_weights && dice.one_in(4)) {
    for (auto& weight : token_weights) weight = static_cast<uint16_t>(dice.bits());
    if (fate == Fate::kWorks) fate = Fate::kUnknown;
  }
  std::vector<float> weights(has_weights ? length : 0);
  const MicroBatchView<Id> out{filled, labels, position_ids, cu_seqlens, active_tokens, weights};
  const TokenStoreView store{tokens, bits, offsets, token_weights};
  std::vector<int32_t> targets(offsets.size() - 1);
  std::vector<double> sums(has_weights ? targets.size() : 0);
  try {
    count_targets(store, targets, sums);
    for (size_t i = 0; i < targets.size(); ++i) {
      require(targets[i] >= 0 && targets[i] < offsets[i + 1] - offsets[i], "targets of a sample");
    }
  } catch (const std::invalid_argument&) {
    require(fate != Fate::kWorks, "good stores are counted");
  }
  try {
    const MicroBatchCounts counts = fill_micro_batch<Id>(store, ids, -100, layout, out);
    require(fate != Fate::kFails, "bad input is refused");
    int64_t num_labels = 0;
    for (const Id label : labels) num_labels += label != -100;
    require(num_labels == counts.num_supervised, "num_supervised");
    for (int64_t i = 0; i < counts.num_supervised; ++i) {
      const int64_t place = active_tokens[static_cast<size_t>(i)];
      require(labels[static_cast<size_t>(place)] != -100, "active tokens have labels");
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      require((weights[i] != 0) == (labels[i] != -100), "weights on tokens with labels");
    }
  } catch (const std::invalid_argument&) {
    require(fate != Fate::kWorks, "good input is taken");
  }
}

}  // namespace
}  // namespace sft_fast

int main(int argc, char** argv) {
  const uint64_t rounds = argc > 1 ? std::stoull(argv[1]) : 20'000;
  const uint64_t seed = argc > 2 ? std::stoull(argv[2]) : 0;
  for (uint64_t round = 0; round < rounds; ++round) {
    sft_fast::Dice dice(seed, round);
    switch (round % 5) {
      case 0:
        sft_fast::fuzz_plans(dice);
        break;
      case 1:
        sft_fast::fuzz_stream(dice);
        break;
      case 2:
        sft_fast::fuzz_orders(dice);
        break;
      case 3:
        sft_fast::fuzz_fill<int32_t>(dice);
        break;
      default:
        sft_fast::fuzz_fill<int64_t>(dice);
    }
  }
  std::printf("%llu rounds\n", static_cast<unsigned long long>(rounds));
}
