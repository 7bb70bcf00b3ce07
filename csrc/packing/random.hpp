// Random numbers that are the same on every machine and with every compiler.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "packing/inline.hpp"

namespace sft_fast {

// What a random number is used for; each use draws from its own stream.
enum class Stream : uint64_t { kEqualLengths = 1, kInsideBin, kBinOrder, kSampleOrder, kExactFill };

// Several small numbers out of one of 64 bits, each draw from what the ones before left of it. The
// bias of each is below the product of all bounds so far / 2^64.
// Source: Brackett-Rozinsky and Lemire, "Batched Ranged Random Integer Generation" (2024).
class Draws {
 public:
  explicit Draws(uint64_t bits) : bits_(bits) {}

  // Uniform in [0, bound), 1 <= bound < 2^32.
  uint64_t below(uint64_t bound) {
#if defined(__SIZEOF_INT128__)
    __extension__ using uint128 = unsigned __int128;
    const uint128 product = static_cast<uint128>(bits_) * bound;
    bits_ = static_cast<uint64_t>(product);
    return static_cast<uint64_t>(product >> 64);
#else
    const uint64_t low = (bits_ & 0xffffffffu) * bound;
    const uint64_t high = (bits_ >> 32) * bound + (low >> 32);
    bits_ = (high << 32) | (low & 0xffffffffu);
    return high >> 32;
#endif
  }

 private:
  uint64_t bits_;
};

// Counter-based: number `counter` of a stream is a pure function, so the result does not depend on
// who asks first. Source: the output function of SplitMix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  Random(uint64_t seed, uint64_t epoch, Stream stream)
      : key_(mix(mix(mix(seed + kGamma) + epoch + kGamma) + static_cast<uint64_t>(stream))) {}

  uint64_t bits(uint64_t counter) const { return mix(key_ + counter * kGamma); }

 private:
  static constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;

  static uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return bits ^ (bits >> 31);
  }

  uint64_t key_;
};

// Fisher-Yates over kCount items, at most 7, by one random number.
template <size_t kCount, typename T>
SFT_FAST_INLINE void shuffle_few(T* items, uint64_t bits) {
  static_assert(kCount <= 7);
  Draws draws(bits);
  for (size_t i = 1; i < kCount; ++i) std::swap(items[i], items[draws.below(i + 1)]);
}

// Fisher-Yates over items[begin, end), kDraws swaps by each random number; its counter is the
// position of the first of them.
template <size_t kDraws, typename T>
void shuffle_by(T* items, size_t begin, size_t end, const Random& random) {
  size_t i = begin + 1;
  for (; i + kDraws <= end; i += kDraws) {
    Draws draws(random.bits(i));
    for (size_t k = i; k < i + kDraws; ++k) {
      std::swap(items[k], items[begin + draws.below(k - begin + 1)]);
    }
  }
  if (i >= end) return;
  Draws draws(random.bits(i));
  for (; i < end; ++i) std::swap(items[i], items[begin + draws.below(i - begin + 1)]);
}

// The same for ranges outside the caches: the lines of the next swaps are asked for together.
template <size_t kDraws, typename T>
void shuffle_far_by(T* items, size_t begin, size_t end, const Random& random) {
  constexpr size_t kBlock = 16;
  static_assert(kBlock % kDraws == 0);
  size_t others[kBlock];
  for (size_t i = begin + 1; i < end; i += kBlock) {
    const size_t count = std::min(kBlock, end - i);
    for (size_t k = 0; k < count; k += kDraws) {
      Draws draws(random.bits(i + k));
      for (size_t d = k; d < std::min(k + kDraws, count); ++d) {
        others[d] = begin + draws.below(i + d - begin + 1);
        __builtin_prefetch(items + others[d], 1);
      }
    }
    for (size_t k = 0; k < count; ++k) std::swap(items[i + k], items[others[k]]);
  }
}

// Puts items[begin, end) into random order; the bias of a draw is below 2^-16.
template <typename T>
void shuffle(T* items, size_t begin, size_t end, const Random& random) {
  const size_t count = end - begin;
  if (count <= (size_t{1} << 8)) return shuffle_by<6>(items, begin, end, random);
  if (count <= (size_t{1} << 12)) return shuffle_by<4>(items, begin, end, random);
  if (count <= (size_t{1} << 16)) return shuffle_by<3>(items, begin, end, random);
  if (count <= (size_t{1} << 24)) return shuffle_far_by<2>(items, begin, end, random);
  shuffle_far_by<1>(items, begin, end, random);
}

}  // namespace sft_fast
