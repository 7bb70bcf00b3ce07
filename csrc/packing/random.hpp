// Random numbers that are the same on every machine and with every compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "packing/inline.hpp"

namespace sft_fast {

// What a random number is used for; each use draws from its own stream.
enum class Stream : uint64_t { kEqualLengths = 1, kInsideBin, kBinOrder, kSampleOrder, kExactFill };

// Counter-based: number `counter` of a stream is a pure function, so the result does not depend on
// who asks first. Source: the output function of SplitMix64 (Steele, Lea, Flood 2014).
class Random {
 public:
  Random(uint64_t seed, uint64_t epoch, Stream stream)
      : key_(mix(mix(mix(seed + kGamma) + epoch + kGamma) + static_cast<uint64_t>(stream))) {}

  uint64_t bits(uint64_t counter) const { return mix(key_ + counter * kGamma); }

  // Uniform in [0, bound), 1 <= bound < 2^32; the bias is below bound / 2^64.
  uint64_t below(uint64_t counter, uint64_t bound) const {
    const uint64_t random = bits(counter);
    // The high word of random * bound.
    return ((random >> 32) * bound + (((random & 0xffffffffu) * bound) >> 32)) >> 32;
  }

 private:
  static constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;

  static uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return bits ^ (bits >> 31);
  }

  uint64_t key_;
};

// Fisher-Yates over items[begin, end); the counter is the position.
template <typename T>
SFT_FAST_INLINE void shuffle(T* items, size_t begin, size_t end, const Random& random) {
  size_t i = begin + 1;
  if (end - begin <= (size_t{1} << 16)) {
    // Short ranges take two numbers from one; the bias stays below 2^-16.
    for (; i + 1 < end; i += 2) {
      const uint64_t bits = random.bits(i);
      const uint64_t count = i - begin + 1;
      std::swap(items[i], items[begin + ((bits >> 32) * count >> 32)]);
      std::swap(items[i + 1], items[begin + ((bits & 0xffffffffu) * (count + 1) >> 32)]);
    }
  } else {
    // Long ranges lie outside the caches, so the lines of the next swaps are asked for together.
    constexpr size_t kBlock = 16;
    for (size_t other[kBlock]; i + kBlock <= end; i += kBlock) {
      for (size_t k = 0; k < kBlock; ++k) {
        other[k] = begin + random.below(i + k, i + k - begin + 1);
        __builtin_prefetch(items + other[k], 1);
      }
      for (size_t k = 0; k < kBlock; ++k) std::swap(items[i + k], items[other[k]]);
    }
  }
  for (; i < end; ++i) std::swap(items[i], items[begin + random.below(i, i - begin + 1)]);
}

}  // namespace sft_fast
