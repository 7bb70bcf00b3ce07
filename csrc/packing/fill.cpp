#include "packing/fill.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace sft_fast {
namespace {

constexpr size_t kPrefetchDistance = 4;
constexpr int64_t kMaxCpSize = int64_t{1} << 16;
constexpr int64_t kMaxAlignment = int64_t{1} << 24;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_size(const char* name, size_t found, size_t expected) {
  if (found != expected) {
    fail(std::string(name) + " has " + std::to_string(found) + " elements, expected " +
         std::to_string(expected));
  }
}

void check_layout(const RowLayout& layout) {
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

template <typename Id>
void check_buffers(const TokenStoreView& store, size_t num_samples, const RowLayout& layout,
                   const MicroBatchView<Id>& out) {
  if (store.offsets.empty()) fail("offsets is empty, expected num_samples + 1 elements");
  check_size("supervised_bits", store.supervised_bits.size(), (store.tokens.size() + 7) / 8);
  const size_t num_rows = out.tokens.size();
  constexpr auto kMaxRows = static_cast<size_t>(std::numeric_limits<int32_t>::max());
  if (num_rows > kMaxRows / static_cast<size_t>(layout.cp_size)) {
    fail("tokens has " + std::to_string(num_rows) + " rows on each of " +
         std::to_string(layout.cp_size) +
         " ranks; cu_seqlens is int32, so fewer than 2^31 fit in all");
  }
  check_size("labels", out.labels.size(), num_rows);
  check_size("position_ids", out.position_ids.size(), num_rows);
  check_size("active_rows", out.active_rows.size(), num_rows);
  check_size("cu_seqlens", out.cu_seqlens.size(), num_samples + 1);
  const bool has_weights = !out.sample_weights.empty() || !out.weights.empty();
  check_size("sample_weights", out.sample_weights.size(), has_weights ? num_samples : 0);
  check_size("weights", out.weights.size(), has_weights ? num_rows : 0);
}

int64_t round_up(int64_t length, int64_t alignment) {
  return (length + alignment - 1) / alignment * alignment;
}

// Checks each sample against the store, and that their slots fit. Returns the longest slot.
int64_t check_samples(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                      const RowLayout& layout, size_t num_rows) {
  const auto num_samples = static_cast<int64_t>(store.offsets.size()) - 1;
  const auto total = static_cast<int64_t>(store.tokens.size());
  const int64_t end_of_row = static_cast<int64_t>(num_rows) * layout.cp_size;
  int64_t row = 0;
  int64_t longest = 0;
  for (const int64_t id : sample_ids) {
    if (id < 0 || id >= num_samples) {
      fail("sample " + std::to_string(id) + " was asked for, but the token store holds " +
           std::to_string(num_samples) + " samples");
    }
    const int64_t begin = store.offsets[static_cast<size_t>(id)];
    const int64_t end = store.offsets[static_cast<size_t>(id) + 1];
    if (begin < 0 || end <= begin || end > total) {
      fail("the token store is damaged: sample " + std::to_string(id) + " spans tokens " +
           std::to_string(begin) + " to " + std::to_string(end) + " of " + std::to_string(total));
    }
    const int64_t slot = round_up(end - begin, layout.alignment);
    longest = std::max(longest, slot);
    row += slot;
    // Checked on the way, so that the sum cannot overflow.
    if (row > end_of_row) {
      fail("the " + std::to_string(sample_ids.size()) + " samples do not fit: sample " +
           std::to_string(id) + " ends at row " + std::to_string(row) + " of " +
           std::to_string(end_of_row));
    }
  }
  return longest;
}

// Returns the first t in [begin, end) whose bit differs from `value`, or end.
int64_t run_end(const uint8_t* bits, int64_t begin, int64_t end, bool value) {
  const unsigned flip = value ? 0xffu : 0u;
  const uint64_t unbroken = value ? ~uint64_t{0} : 0;
  int64_t t = begin;
  while (t < end) {
    if (t % 8 == 0 && t + 64 <= end) {
      uint64_t word;
      std::memcpy(&word, bits + t / 8, sizeof(word));
      if (word == unbroken) {
        t += 64;
        continue;
      }
    }
    // Bits that differ, with t's own in the lowest place.
    const unsigned differing = (bits[t / 8] ^ flip) >> (t % 8);
    if (differing != 0) return std::min(end, t + std::countr_zero(differing));
    t += 8 - t % 8;
  }
  return end;
}

// Writes a row from left to right.
template <typename Id>
class RowWriter {
 public:
  RowWriter(const TokenStoreView& store, int64_t ignore_index, const MicroBatchView<Id>& out)
      : store_(store), ignore_index_(static_cast<Id>(ignore_index)), out_(out) {}

  // Appends positions [begin, end) of the slot of the sample that is store[first, last).
  void append(int64_t first, int64_t last, int64_t begin, int64_t end, float weight) {
    const int64_t length = last - first;
    const int64_t num_real = std::clamp(length - begin, int64_t{0}, end - begin);
    copy_tokens(first + begin, num_real);
    std::iota(out_.position_ids.data() + row_, out_.position_ids.data() + row_ + (end - begin),
              static_cast<Id>(begin));
    // The row of token t is labelled with token t + 1, so the first token is never a label.
    const int64_t num_labels = std::clamp(length - 1 - begin, int64_t{0}, end - begin);
    label(first + begin + 1, num_labels, weight);
    ignore(row_ + num_labels, row_ + (end - begin));
    num_tokens_ += num_real;
    row_ += num_real;
    const int64_t num_padding = end - begin - num_real;
    std::fill_n(out_.tokens.data() + row_, num_padding, Id{0});
    row_ += num_padding;
  }

  void pad() {
    std::fill(out_.tokens.begin() + row_, out_.tokens.end(), Id{0});
    std::fill(out_.position_ids.begin() + row_, out_.position_ids.end(), Id{0});
    ignore(row_, static_cast<int64_t>(out_.labels.size()));
  }

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_supervised() const { return num_supervised_; }

 private:
  void copy_tokens(int64_t t, int64_t count) {
    const uint32_t* from = store_.tokens.data() + t;
    std::copy(from, from + count, out_.tokens.data() + row_);
    if constexpr (sizeof(Id) == sizeof(uint32_t)) {
      uint32_t any = 0;
      for (int64_t i = 0; i < count; ++i) any |= from[i];
      if (any > static_cast<uint32_t>(std::numeric_limits<Id>::max())) {
        fail("the token store holds an id of 2^31 or more; int32 rows cannot");
      }
    }
  }

  // Labels `count` rows from row_ on with the tokens from t on.
  void label(int64_t t, int64_t count, float weight) {
    const uint8_t* bits = store_.supervised_bits.data();
    const int64_t to_row = row_ - t;
    const int64_t end = t + count;
    while (t < end) {
      const int64_t first = run_end(bits, t, end, false);
      ignore(t + to_row, first + to_row);
      t = run_end(bits, first, end, true);
      std::copy(store_.tokens.data() + first, store_.tokens.data() + t,
                out_.labels.data() + (first + to_row));
      int64_t* active_rows = out_.active_rows.data() + num_supervised_;
      std::iota(active_rows, active_rows + (t - first), first + to_row);
      if (!out_.weights.empty())
        std::fill_n(out_.weights.data() + first + to_row, t - first, weight);
      num_supervised_ += t - first;
    }
  }

  void ignore(int64_t begin, int64_t end) {
    std::fill(out_.labels.begin() + begin, out_.labels.begin() + end, ignore_index_);
    if (!out_.weights.empty()) {
      std::fill(out_.weights.begin() + begin, out_.weights.begin() + end, 0.0f);
    }
  }

  const TokenStoreView& store_;
  Id ignore_index_;
  const MicroBatchView<Id>& out_;
  int64_t row_ = 0;
  int64_t num_tokens_ = 0;
  int64_t num_supervised_ = 0;
};

// Samples lie anywhere in a store that is larger than any cache: their first lines are asked for
// early, the hardware finds the rest.
void prefetch(const TokenStoreView& store, int64_t id) {
  const int64_t begin = store.offsets[static_cast<size_t>(id)];
  __builtin_prefetch(store.tokens.data() + begin);
  __builtin_prefetch(store.supervised_bits.data() + begin / 8);
}

}  // namespace

template <typename Id>
MicroBatchCounts fill_micro_batch(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                                  int64_t ignore_index, const RowLayout& layout,
                                  const MicroBatchView<Id>& out) {
  check_layout(layout);
  check_buffers(store, sample_ids.size(), layout, out);
  if (!std::in_range<Id>(ignore_index)) {
    fail("ignore_index is " + std::to_string(ignore_index) + "; the labels' type cannot hold it");
  }
  const int64_t max_seqlen = check_samples(store, sample_ids, layout, out.tokens.size());
  RowWriter<Id> writer(store, ignore_index, out);
  out.cu_seqlens[0] = 0;
  for (size_t i = 0; i < sample_ids.size(); ++i) {
    if (i + kPrefetchDistance < sample_ids.size()) {
      prefetch(store, sample_ids[i + kPrefetchDistance]);
    }
    const int64_t first = store.offsets[static_cast<size_t>(sample_ids[i])];
    const int64_t last = store.offsets[static_cast<size_t>(sample_ids[i]) + 1];
    const int64_t slot = round_up(last - first, layout.alignment);
    const float weight = out.weights.empty() ? 0.0f : out.sample_weights[i];
    if (layout.cp_size == 1) {
      writer.append(first, last, 0, slot, weight);
    } else {
      const int64_t chunk = slot / (2 * layout.cp_size);
      const int64_t early = layout.cp_rank * chunk;
      const int64_t late = (2 * layout.cp_size - 1 - layout.cp_rank) * chunk;
      writer.append(first, last, early, early + chunk, weight);
      writer.append(first, last, late, late + chunk, weight);
    }
    out.cu_seqlens[i + 1] = out.cu_seqlens[i] + static_cast<int32_t>(slot);
  }
  writer.pad();
  return {writer.num_tokens(), writer.num_supervised(), max_seqlen};
}

template MicroBatchCounts fill_micro_batch(const TokenStoreView&, std::span<const int64_t>, int64_t,
                                           const RowLayout&, const MicroBatchView<int32_t>&);
template MicroBatchCounts fill_micro_batch(const TokenStoreView&, std::span<const int64_t>, int64_t,
                                           const RowLayout&, const MicroBatchView<int64_t>&);

}  // namespace sft_fast
