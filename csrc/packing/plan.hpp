// Which samples share a pack, here called a bin. Needs lengths only; touches no tokens.
//
// A strategy is one function from lengths and options to a BinPlan. All of them are deterministic,
// on any machine and with any compiler: no std::shuffle, no std::*_distribution, no floating point.
// They throw std::invalid_argument and never print.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>

namespace sft_fast {

// Histograms have one entry per possible length, which bounds the capacity.
inline constexpr int64_t kMaxCapacity = int64_t{1} << 24;
inline constexpr int64_t kMaxPoolSize = int64_t{1} << 22;

// Returns memory for std::free, of 1 MB and more in huge pages: the kernel hands out one faster
// than the 512 small ones in its place, and few of them miss the TLB. Throws std::bad_alloc.
void* allocate(size_t num_bytes);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A heap array that is not zeroed first: every planner writes each element exactly once.
template <typename T>
struct Array {
  explicit Array(size_t count) : data(static_cast<T*>(allocate(count * sizeof(T)))), size(count) {}
  T& operator[](size_t i) { return data[i]; }

  std::unique_ptr<T[], Free> data;
  size_t size;
};

struct PlanOptions {
  int64_t capacity;     // tokens per bin, a multiple of `alignment`
  int64_t alignment;    // a sample takes up a multiple of this many tokens
  int64_t max_samples;  // samples per bin; 0 = no limit
  int64_t pool_size;    // plan_window: samples to choose from, at least; see WindowPacker
  uint64_t seed;
  uint64_t epoch;
};

struct BinPlan {
  Array<uint32_t> sample_ids;  // [num_samples], bin after bin; every id exactly once
  Array<int64_t> bin_offsets;  // [num_bins + 1], into sample_ids
  Array<uint32_t> order;       // [num_bins]: the i-th bin to train on is bin order[i]
};

// Best-fit decreasing: samples from long to short, each into the fullest bin that still has room.
// Works on the length histogram: equal bins are handled together, so the number of decisions does
// not grow with the number of samples. Which of several equally long samples goes where, the order
// inside a bin, and the order of bins are random in (seed, epoch); the number of bins is not.
// Moving bins in memory would cost more than planning them, hence `order`.
// Cost: O(num_samples + capacity). Memory: 8 bytes a sample, 16 bytes a token of capacity.
BinPlan plan_best_fit_decreasing(std::span<const int32_t> lengths, const PlanOptions& options);

// Samples in an order that is random in (seed, epoch), each bin completed from a pool of those that
// are next in line; see WindowPacker. Bins stay in that order, so `order` is 0, 1, 2, ...
// The number of bins depends, a little, on (seed, epoch).
// Cost: O(num_samples). Memory: 8 bytes a sample, 12 a bin, and the pool.
BinPlan plan_window(std::span<const int32_t> lengths, const PlanOptions& options);

// Next-fit: samples in the order given, a new bin whenever the next one does not fit. No
// randomness.
BinPlan plan_sequential(std::span<const int32_t> lengths, const PlanOptions& options);

// No packing: bin i holds sample i; only the order of bins is random in (seed, epoch).
BinPlan plan_one_per_bin(std::span<const int32_t> lengths, const PlanOptions& options);

struct Strategy {
  const char* name;  // value of packing.strategy
  BinPlan (*plan)(std::span<const int32_t> lengths, const PlanOptions& options);
};

// Every strategy: bindings, fuzzing and tests go through this list.
inline constexpr Strategy kStrategies[] = {
    {"bfd", plan_best_fit_decreasing},
    {"window", plan_window},
    {"sequential", plan_sequential},
    {"none", plan_one_per_bin},
};

// 0, 1, ..., count - 1 in an order that is random in (seed, epoch): of bins as in BinPlan::order,
// and of samples as plan_window takes them.
Array<uint32_t> bin_order(int64_t count, uint64_t seed, uint64_t epoch);
Array<uint32_t> sample_order(int64_t count, uint64_t seed, uint64_t epoch);

}  // namespace sft_fast
