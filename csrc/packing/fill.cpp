#include "packing/fill.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "packing/inline.hpp"

namespace sft_fast {
namespace {

constexpr size_t kPrefetchDistance = 3;
constexpr int64_t kPrefetchTokens = 128;
constexpr int64_t kTokensPerLine = 16;
constexpr int64_t kMaxCpSize = int64_t{1} << 16;
constexpr int64_t kMaxAlignment = int64_t{1} << 24;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_size(const char* name, size_t found, size_t expected) {
  if (found != expected) {
    fail(std::string(name) + " has " + std::to_string(found) + " elements, expected " +
         std::to_string(expected));
  }
}

void check_layout(const SequenceLayout& layout) {
  if (layout.cp_size < 1 || layout.cp_size > kMaxCpSize || layout.cp_rank < 0 ||
      layout.cp_rank >= layout.cp_size) {
    fail("context-parallel rank " + std::to_string(layout.cp_rank) + " of " +
         std::to_string(layout.cp_size) + "; expected a size from 1 to " +
         std::to_string(kMaxCpSize) + " and a rank in [0, size)");
  }
  const int64_t factor = layout.cp_size == 1 ? 1 : 2 * layout.cp_size;
  if (layout.alignment < 1 || layout.alignment > kMaxAlignment || layout.alignment % factor != 0) {
    fail("packing.alignment is " + std::to_string(layout.alignment) + "; expected a multiple of " +
         std::to_string(factor) + " from 1 to " + std::to_string(kMaxAlignment) +
         ", with context-parallel size " + std::to_string(layout.cp_size));
  }
}

void check_store(const TokenStoreView& store) {
  if (store.offsets.empty()) fail("offsets is empty, expected num_samples + 1 elements");
  check_size("supervised_bits", store.supervised_bits.size(), (store.tokens.size() + 7) / 8);
  if (!store.weights.empty()) {
    check_size("token_weights", store.weights.size(), store.tokens.size());
  }
}

// The tokens [begin, end) of a sample that exists.
std::pair<int64_t, int64_t> checked_span(const TokenStoreView& store, size_t id) {
  const int64_t begin = store.offsets[id];
  const int64_t end = store.offsets[id + 1];
  const auto total = static_cast<int64_t>(store.tokens.size());
  if (begin < 0 || end <= begin || end > total) {
    fail("the token store is damaged: sample " + std::to_string(id) + " spans tokens " +
         std::to_string(begin) + " to " + std::to_string(end) + " of " + std::to_string(total));
  }
  return {begin, end};
}

template <typename Id>
void check_buffers(const TokenStoreView& store, size_t num_samples, const SequenceLayout& layout,
                   const MicroBatchView<Id>& out) {
  check_store(store);
  const size_t length = out.tokens.size();
  constexpr auto kMaxLength = static_cast<size_t>(std::numeric_limits<int32_t>::max());
  if (length > kMaxLength / static_cast<size_t>(layout.cp_size)) {
    fail("tokens has " + std::to_string(length) + " tokens on each of " +
         std::to_string(layout.cp_size) +
         " ranks; cu_seqlens is int32, so fewer than 2^31 fit in all");
  }
  check_size("labels", out.labels.size(), length);
  check_size("position_ids", out.position_ids.size(), length);
  check_size("active_tokens", out.active_tokens.size(), length);
  check_size("cu_seqlens", out.cu_seqlens.size(), num_samples + 1);
  check_size("weights", out.weights.size(), store.weights.empty() ? 0 : length);
}

int64_t round_up(int64_t length, int64_t alignment) {
  return (length + alignment - 1) / alignment * alignment;
}

// Checks each sample against the store, and that they fit. Returns the longest padded sample.
int64_t check_samples(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                      const SequenceLayout& layout, size_t length) {
  const auto num_samples = static_cast<int64_t>(store.offsets.size()) - 1;
  const int64_t capacity = static_cast<int64_t>(length) * layout.cp_size;
  int64_t end_of_sample = 0;
  int64_t longest = 0;
  for (const int64_t id : sample_ids) {
    if (id < 0 || id >= num_samples) {
      fail("sample " + std::to_string(id) + " was asked for, but the token store holds " +
           std::to_string(num_samples) + " samples");
    }
    const auto [begin, end] = checked_span(store, static_cast<size_t>(id));
    const int64_t padded = round_up(end - begin, layout.alignment);
    longest = std::max(longest, padded);
    end_of_sample += padded;
    // Checked on the way, so that the sum cannot overflow.
    if (end_of_sample > capacity) {
      fail("the " + std::to_string(sample_ids.size()) + " samples do not fit: sample " +
           std::to_string(id) + " ends at token " + std::to_string(end_of_sample) + " of " +
           std::to_string(capacity));
    }
  }
  return longest;
}

// Returns the first t in [begin, end) whose bit differs from `value`, or end.
SFT_FAST_INLINE int64_t run_end(std::span<const uint8_t> bits, int64_t begin, int64_t end,
                                bool value) {
  static_assert(std::endian::native == std::endian::little);
  const uint64_t flip = value ? ~uint64_t{0} : 0;
  int64_t t = begin;
  while (t < end) {
    const auto place = static_cast<size_t>(t / 8);
    uint64_t word = 0;
    if (place + sizeof(word) <= bits.size()) {
      std::memcpy(&word, bits.data() + place, sizeof(word));
    } else {
      std::memcpy(&word, bits.data() + place, bits.size() - place);
    }
    // Bits that differ, with t's own in the lowest place; 0 from above the word is no difference.
    const uint64_t differing = (word ^ flip) >> (t % 8);
    if (differing != 0) return std::min(end, t + std::countr_zero(differing));
    t += 64 - t % 8;
  }
  return end;
}

// Returns all ids or-ed.
SFT_FAST_INLINE uint32_t copy_ids(const uint32_t* __restrict from, int64_t count,
                                  int32_t* __restrict to) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    any |= from[i];
    to[i] = static_cast<int32_t>(from[i]);
  }
  return any;
}

SFT_FAST_INLINE uint32_t copy_ids(const uint32_t* __restrict from, int64_t count,
                                  int64_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  return 0;
}

SFT_FAST_INLINE void count_up(int32_t first, int64_t count, int32_t* __restrict to) {
  const auto last = static_cast<int32_t>(count);
  for (int32_t i = 0; i < last; ++i) to[i] = first + i;
}

SFT_FAST_INLINE void count_up(int64_t first, int64_t count, int64_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = first + i;
}

SFT_FAST_INLINE void repeat(int32_t value, int64_t count, int32_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

SFT_FAST_INLINE void repeat(int64_t value, int64_t count, int64_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// IEEE 754 binary16; C++20 has no type for it.
float from_half(uint16_t bits) {
  const uint32_t exponent = (bits >> 10) & 31u;
  const uint32_t fraction = bits & 1023u;
  const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31;
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign == 0 ? value : -value;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

float weight_of(const TokenStoreView& store, int64_t t) {
  return from_half(store.weights[static_cast<size_t>(t)]);
}

bool is_valid_weight(float weight) {
  return weight > 0.0f && weight <= std::numeric_limits<float>::max();
}

[[noreturn]] void fail_on_weight(const TokenStoreView& store, int64_t t) {
  fail("the token store is damaged: token " + std::to_string(t) +
       " is supervised with the weight " + std::to_string(weight_of(store, t)) +
       "; expected a positive number");
}

// What a sequence holds, and what is wrong with it.
struct SequenceResult {
  int64_t num_tokens = 0;
  int64_t num_supervised = 0;
  uint32_t all_ids = 0;     // or-ed, where ids are int32
  int64_t bad_weight = -1;  // the first target whose weight is not positive and finite
};

// Writes a sequence from left to right.
template <typename Id>
class SequenceWriter {
 public:
  SequenceWriter(const TokenStoreView& store, int64_t ignore_index, const MicroBatchView<Id>& out)
      : store_(store), ignore_index_(static_cast<Id>(ignore_index)), out_(out) {}

  // Appends positions [begin, end) of the padded sample that is store[first, last).
  SFT_FAST_INLINE void append(int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t length = last - first;
    const int64_t num_real = std::clamp(length - begin, int64_t{0}, end - begin);
    copy_tokens(first + begin, num_real);
    count_up(static_cast<Id>(begin), end - begin, out_.position_ids.data() + end_);
    // Token t is labelled with token t + 1, so the first token is never a label.
    const int64_t num_labels = std::clamp(length - 1 - begin, int64_t{0}, end - begin);
    label(first + begin + 1, num_labels);
    ignore(end_ + num_labels, end_ + (end - begin));
    result_.num_tokens += num_real;
    end_ += num_real;
    const int64_t num_padding = end - begin - num_real;
    repeat(Id{0}, num_padding, out_.tokens.data() + end_);
    end_ += num_padding;
  }

  SFT_FAST_INLINE void pad() {
    const auto length = static_cast<int64_t>(out_.tokens.size());
    repeat(Id{0}, length - end_, out_.tokens.data() + end_);
    repeat(Id{0}, length - end_, out_.position_ids.data() + end_);
    ignore(end_, length);
  }

  const SequenceResult& result() const { return result_; }

 private:
  SFT_FAST_INLINE void copy_tokens(int64_t t, int64_t count) {
    result_.all_ids |= copy_ids(store_.tokens.data() + t, count, out_.tokens.data() + end_);
  }

  // Labels `count` tokens from end_ on with the stored ones from t on.
  SFT_FAST_INLINE void label(int64_t t, int64_t count) {
    const std::span<const uint8_t> bits = store_.supervised_bits;
    const int64_t shift = end_ - t;
    const int64_t end = t + count;
    while (t < end) {
      const int64_t first = run_end(bits, t, end, false);
      ignore(t + shift, first + shift);
      t = run_end(bits, first, end, true);
      copy_ids(store_.tokens.data() + first, t - first, out_.labels.data() + (first + shift));
      count_up(first + shift, t - first, out_.active_tokens.data() + result_.num_supervised);
      if (!out_.weights.empty()) {
        float* weights = out_.weights.data() + shift;
        for (int64_t i = first; i < t; ++i) {
          weights[i] = weight_of(store_, i);
          if (result_.bad_weight < 0 && !is_valid_weight(weights[i])) result_.bad_weight = i;
        }
      }
      result_.num_supervised += t - first;
    }
  }

  SFT_FAST_INLINE void ignore(int64_t begin, int64_t end) {
    repeat(ignore_index_, end - begin, out_.labels.data() + begin);
    if (!out_.weights.empty()) {
      std::fill(out_.weights.begin() + begin, out_.weights.begin() + end, 0.0f);
    }
  }

  const TokenStoreView& store_;
  Id ignore_index_;
  const MicroBatchView<Id>& out_;
  int64_t end_ = 0;
  SequenceResult result_;
};

// Samples lie anywhere in a store that is larger than any cache: their first lines are asked for
// early, the hardware finds the rest.
SFT_FAST_INLINE void prefetch(const TokenStoreView& store, int64_t id) {
  const int64_t begin = store.offsets[static_cast<size_t>(id)];
  const int64_t end = std::min(store.offsets[static_cast<size_t>(id) + 1], begin + kPrefetchTokens);
  for (int64_t t = begin; t < end; t += kTokensPerLine) {
    __builtin_prefetch(store.tokens.data() + t);
  }
  __builtin_prefetch(store.supervised_bits.data() + begin / 8);
}

template <typename Id>
SFT_FAST_INLINE SequenceResult write_sequence(const TokenStoreView& store,
                                              std::span<const int64_t> sample_ids,
                                              int64_t ignore_index, const SequenceLayout& layout,
                                              const MicroBatchView<Id>& out) {
  SequenceWriter<Id> writer(store, ignore_index, out);
  out.cu_seqlens[0] = 0;
  for (size_t i = 0; i < std::min(kPrefetchDistance, sample_ids.size()); ++i) {
    prefetch(store, sample_ids[i]);
  }
  for (size_t i = 0; i < sample_ids.size(); ++i) {
    if (i + kPrefetchDistance < sample_ids.size()) {
      prefetch(store, sample_ids[i + kPrefetchDistance]);
    }
    const int64_t first = store.offsets[static_cast<size_t>(sample_ids[i])];
    const int64_t last = store.offsets[static_cast<size_t>(sample_ids[i]) + 1];
    const int64_t padded = round_up(last - first, layout.alignment);
    if (layout.cp_size == 1) {
      writer.append(first, last, 0, padded);
    } else {
      const int64_t chunk = padded / (2 * layout.cp_size);
      const int64_t early = layout.cp_rank * chunk;
      const int64_t late = (2 * layout.cp_size - 1 - layout.cp_rank) * chunk;
      writer.append(first, last, early, early + chunk);
      writer.append(first, last, late, late + chunk);
    }
    out.cu_seqlens[i + 1] = out.cu_seqlens[i] + static_cast<int32_t>(padded);
  }
  writer.pad();
  return writer.result();
}

// All of a sequence is one function for each instruction set, because a call of each loop costs as
// much as the loop where samples are short.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 19 : __GNUC__ >= 12)
template <typename Id>
[[gnu::target("arch=x86-64-v4")]] SequenceResult write_row_v4(const TokenStoreView& store,
                                                              std::span<const int64_t> sample_ids,
                                                              int64_t ignore_index,
                                                              const SequenceLayout& layout,
                                                              const MicroBatchView<Id>& out) {
  return write_sequence(store, sample_ids, ignore_index, layout, out);
}

template <typename Id>
[[gnu::target("arch=x86-64-v3")]] SequenceResult write_row_v3(const TokenStoreView& store,
                                                              std::span<const int64_t> sample_ids,
                                                              int64_t ignore_index,
                                                              const SequenceLayout& layout,
                                                              const MicroBatchView<Id>& out) {
  return write_sequence(store, sample_ids, ignore_index, layout, out);
}

template <typename Id>
auto* best_write_sequence() {
  if (__builtin_cpu_supports("x86-64-v4")) return write_row_v4<Id>;
  if (__builtin_cpu_supports("x86-64-v3")) return write_row_v3<Id>;
  return write_sequence<Id>;
}
#else
template <typename Id>
auto* best_write_sequence() {
  return write_sequence<Id>;
}
#endif

}  // namespace

template <typename Id>
MicroBatchCounts fill_micro_batch(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                                  int64_t ignore_index, const SequenceLayout& layout,
                                  const MicroBatchView<Id>& out) {
  check_layout(layout);
  check_buffers(store, sample_ids.size(), layout, out);
  if (!std::in_range<Id>(ignore_index)) {
    fail("ignore_index is " + std::to_string(ignore_index) + "; the labels' type cannot hold it");
  }
  const int64_t max_seqlen = check_samples(store, sample_ids, layout, out.tokens.size());
  static auto* const write = best_write_sequence<Id>();
  const SequenceResult result = write(store, sample_ids, ignore_index, layout, out);
  if (result.all_ids > static_cast<uint32_t>(std::numeric_limits<int32_t>::max())) {
    fail("the token store holds an id of 2^31 or more; int32 cannot hold it");
  }
  if (result.bad_weight >= 0) fail_on_weight(store, result.bad_weight);
  return {result.num_tokens, result.num_supervised, max_seqlen};
}

void count_targets(const TokenStoreView& store, std::span<int32_t> counts,
                   std::span<double> weights) {
  check_store(store);
  const size_t num_samples = store.offsets.size() - 1;
  check_size("counts", counts.size(), num_samples);
  check_size("weights", weights.size(), store.weights.empty() ? 0 : num_samples);
  const std::span<const uint8_t> bits = store.supervised_bits;
  for (size_t id = 0; id < num_samples; ++id) {
    const auto [begin, end] = checked_span(store, id);
    int64_t count = 0;
    double weight = 0.0;
    for (int64_t t = begin + 1; t < end;) {
      const int64_t first = run_end(bits, t, end, false);
      t = run_end(bits, first, end, true);
      count += t - first;
      if (weights.empty()) continue;
      for (int64_t i = first; i < t; ++i) {
        const float one = weight_of(store, i);
        if (!is_valid_weight(one)) fail_on_weight(store, i);
        weight += one;
      }
    }
    if (count > std::numeric_limits<int32_t>::max()) {
      fail("sample " + std::to_string(id) + " has " + std::to_string(count) +
           " targets; expected fewer than 2^31");
    }
    counts[id] = static_cast<int32_t>(count);
    if (!weights.empty()) weights[id] = weight;
  }
}

template MicroBatchCounts fill_micro_batch(const TokenStoreView&, std::span<const int64_t>, int64_t,
                                           const SequenceLayout&, const MicroBatchView<int32_t>&);
template MicroBatchCounts fill_micro_batch(const TokenStoreView&, std::span<const int64_t>, int64_t,
                                           const SequenceLayout&, const MicroBatchView<int64_t>&);

}  // namespace sft_fast
