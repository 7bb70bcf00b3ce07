#include "packing/fill.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace sft_fast {
namespace {

constexpr size_t kPrefetchDistance = 4;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_size(const char* name, size_t found, size_t expected) {
  if (found != expected) {
    fail(std::string(name) + " has " + std::to_string(found) + " elements, expected " +
         std::to_string(expected));
  }
}

void check_buffers(const TokenStoreView& store, size_t num_samples, const MicroBatchView& out) {
  if (store.offsets.empty()) fail("offsets is empty, expected num_samples + 1 elements");
  check_size("supervised_bits", store.supervised_bits.size(), (store.tokens.size() + 7) / 8);
  const size_t num_rows = out.tokens.size();
  if (num_rows > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    fail("tokens has " + std::to_string(num_rows) +
         " rows; cu_seqlens is int32, so fewer than 2^31 fit");
  }
  check_size("labels", out.labels.size(), num_rows);
  check_size("position_ids", out.position_ids.size(), num_rows);
  check_size("active_rows", out.active_rows.size(), num_rows);
  check_size("cu_seqlens", out.cu_seqlens.size(), num_samples + 1);
}

// Returns the total and the greatest length of the samples, each checked against the store.
MicroBatchCounts check_samples(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                               size_t num_rows) {
  const auto num_samples = static_cast<int64_t>(store.offsets.size()) - 1;
  const auto total = static_cast<int64_t>(store.tokens.size());
  MicroBatchCounts counts{0, 0, 0};
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
    counts.num_tokens += end - begin;
    counts.max_seqlen = std::max(counts.max_seqlen, end - begin);
    // Checked on the way, so that the sum cannot overflow.
    if (counts.num_tokens > static_cast<int64_t>(num_rows)) {
      fail("the " + std::to_string(sample_ids.size()) + " samples do not fit: sample " +
           std::to_string(id) + " ends at row " + std::to_string(counts.num_tokens) + " of " +
           std::to_string(num_rows));
    }
  }
  return counts;
}

// Returns the first t in [begin, end) whose bit differs from `value`, or end.
int64_t run_end(const uint8_t* bits, int64_t begin, int64_t end, bool value) {
  const unsigned flip = value ? 0xffu : 0u;
  int64_t t = begin;
  while (t < end) {
    // Bits that differ, with t's own in the lowest place.
    const unsigned differing = (bits[t / 8] ^ flip) >> (t % 8);
    if (differing != 0) return std::min(end, t + std::countr_zero(differing));
    t += 8 - t % 8;
  }
  return end;
}

// Writes the labels and active rows of the sample that lies at store[begin, end) and out[row, ...).
// Returns the new number of supervised rows.
int64_t label_sample(const TokenStoreView& store, int64_t begin, int64_t end, int64_t row,
                     int64_t num_supervised, int64_t ignore_index, const MicroBatchView& out) {
  const uint8_t* bits = store.supervised_bits.data();
  const uint32_t* tokens = store.tokens.data();
  int64_t* labels = out.labels.data();
  int64_t* active_rows = out.active_rows.data();
  // Row t - 1 is labelled with token t, so the first token is never a label.
  const int64_t to_row = row - begin - 1;
  int64_t t = begin + 1;
  while (t < end) {
    const int64_t first = run_end(bits, t, end, false);
    std::fill(labels + (t + to_row), labels + (first + to_row), ignore_index);
    t = run_end(bits, first, end, true);
    std::copy(tokens + first, tokens + t, labels + (first + to_row));
    std::iota(active_rows + num_supervised, active_rows + num_supervised + (t - first),
              first + to_row);
    num_supervised += t - first;
  }
  labels[end + to_row] = ignore_index;
  return num_supervised;
}

// Samples lie anywhere in a store that is larger than any cache: their first lines are asked for
// early, the hardware finds the rest.
void prefetch(const TokenStoreView& store, int64_t id) {
  const int64_t begin = store.offsets[static_cast<size_t>(id)];
  __builtin_prefetch(store.tokens.data() + begin);
  __builtin_prefetch(store.supervised_bits.data() + begin / 8);
}

}  // namespace

MicroBatchCounts fill_micro_batch(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                                  int64_t ignore_index, const MicroBatchView& out) {
  check_buffers(store, sample_ids.size(), out);
  MicroBatchCounts counts = check_samples(store, sample_ids, out.tokens.size());
  int64_t row = 0;
  out.cu_seqlens[0] = 0;
  for (size_t i = 0; i < sample_ids.size(); ++i) {
    if (i + kPrefetchDistance < sample_ids.size()) {
      prefetch(store, sample_ids[i + kPrefetchDistance]);
    }
    const int64_t begin = store.offsets[static_cast<size_t>(sample_ids[i])];
    const int64_t end = store.offsets[static_cast<size_t>(sample_ids[i]) + 1];
    const uint32_t* sample = store.tokens.data() + begin;
    std::copy(sample, sample + (end - begin), out.tokens.data() + row);
    std::iota(out.position_ids.data() + row, out.position_ids.data() + row + (end - begin),
              int64_t{0});
    counts.num_supervised =
        label_sample(store, begin, end, row, counts.num_supervised, ignore_index, out);
    row += end - begin;
    out.cu_seqlens[i + 1] = static_cast<int32_t>(row);
  }
  std::fill(out.tokens.begin() + row, out.tokens.end(), int64_t{0});
  std::fill(out.labels.begin() + row, out.labels.end(), ignore_index);
  std::fill(out.position_ids.begin() + row, out.position_ids.end(), int64_t{0});
  return counts;
}

}  // namespace sft_fast
