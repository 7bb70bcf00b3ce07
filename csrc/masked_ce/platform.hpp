// What differs between CUDA, HIP and the CPU that stands in for them in tests.
#pragma once

#include <cstdint>

#if defined(SFT_FAST_HOST_EMULATION)
#include "masked_ce/host_emulation.hpp"
#elif defined(__HIP__) && !defined(SFT_FAST_NO_HIP_HEADERS)
#include <hip/hip_runtime.h>
#define SFT_FAST_HIP 1
#elif defined(__HIP__)
#include "masked_ce/hip_device_only.hpp"
#define SFT_FAST_HIP 1
#else
#include <cuda_fp16.h>
#define SFT_FAST_CUDA 1
#endif

#if defined(SFT_FAST_HOST_EMULATION)
#define SFT_FAST_UNROLL
#else
#define SFT_FAST_UNROLL _Pragma("unroll")
#endif

namespace sft_fast {

#if defined(SFT_FAST_HOST_EMULATION)

constexpr int kWaveSize = 32;
constexpr int kRegisterPacks = 4;  // small, so that tests reach shared memory
constexpr int kSharedBytes = 48 * 1024;

#elif defined(SFT_FAST_HIP)

constexpr int kWaveSize = 64;
constexpr int kRegisterPacks = 12;       // 1024 threads have 128 registers each, packs take 48
constexpr int kSharedBytes = 63 * 1024;  // of 64 KB; the rest is for reductions

__device__ inline int lane_id() {
  return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0));
}

__device__ inline float shuffle_xor(float value, int mask) {
  const int bits = __builtin_bit_cast(int, value);
  const int other = __builtin_amdgcn_ds_bpermute((lane_id() ^ mask) << 2, bits);
  return __builtin_bit_cast(float, other);
}

__device__ inline float exp2_fast(float value) { return __builtin_amdgcn_exp2f(value); }
__device__ inline float log_fast(float value) {
  return 0.693147180559945f * __builtin_amdgcn_logf(value);
}

__device__ inline float half_to_float(uint16_t bits) {
  return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}
__device__ inline uint16_t float_to_half(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}

#else  // CUDA

constexpr int kWaveSize = 32;
constexpr int kRegisterPacks = 5;         // 1024 threads have 64 registers each, packs take 20
constexpr int kSharedBytes = 225 * 1024;  // of 227 KB on Hopper

__device__ inline float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ inline float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ inline float log_fast(float value) { return logf(value); }

__device__ inline float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ inline uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

#endif

// Keeps the compiler from working on several packs at a time, for which registers do not suffice.
__device__ inline void keep_order() {
#if defined(SFT_FAST_HIP)
  __builtin_amdgcn_sched_barrier(0);
#endif
}

// Makes the compiler forget what it knows of a register, so that it does not keep values derived
// from it in other registers.
__device__ inline void forget(unsigned& value) {
#if defined(SFT_FAST_HIP)
  asm volatile("" : "+v"(value));
#elif !defined(SFT_FAST_HOST_EMULATION)
  asm volatile("" : "+r"(value));
#else
  static_cast<void>(value);
#endif
}

#if !defined(SFT_FAST_HOST_EMULATION)

#if !defined(SFT_FAST_DEVICE_CODE_ONLY)
__device__ inline unsigned block_x() { return blockIdx.x; }
__device__ inline unsigned block_y() { return blockIdx.y; }
__device__ inline unsigned thread_x() { return threadIdx.x; }
#endif

__device__ inline uint4* dynamic_shared() {
  extern __shared__ uint4 sft_fast_dynamic_shared[];
  return sft_fast_dynamic_shared;
}

#endif

}  // namespace sft_fast
