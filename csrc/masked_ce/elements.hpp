// Logits as they lie in memory, and as fp32.
#pragma once

#include "masked_ce/masked_ce.h"
#include "masked_ce/platform.hpp"

namespace sft_fast {

template <bool kIs32Bit>
struct ConditionalBits {
  using Type = uint16_t;
};
template <>
struct ConditionalBits<true> {
  using Type = uint32_t;
};

template <bool kAligned, typename Bits>
struct ConditionalRaw {
  using Type = Bits;
};
template <typename Bits>
struct ConditionalRaw<true, Bits> {
  using Type = uint4;
};

__device__ inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

__device__ inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <int kDtype>
__device__ inline float to_float(uint32_t bits) {
  if (kDtype == SFT_FAST_FP32) return from_bits(bits);
  if (kDtype == SFT_FAST_BF16) return from_bits(bits << 16);
  return half_to_float(static_cast<uint16_t>(bits));
}

// Rounds to nearest even, as every GPU and PyTorch do.
template <int kDtype>
__device__ inline uint32_t from_float(float value) {
  const uint32_t bits = to_bits(value);
  if (kDtype == SFT_FAST_FP32) return bits;
  if (kDtype == SFT_FAST_FP16) return float_to_half(value);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Two 16-bit numbers in one word, the first in its low half.
template <int kDtype>
__device__ inline uint32_t from_pair(float low, float high) {
#if defined(SFT_FAST_CUDA)
  uint32_t word;
  if (kDtype == SFT_FAST_BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return from_float<kDtype>(low) | (from_float<kDtype>(high) << 16);
#endif
}

}  // namespace sft_fast
