// A GPU made of one CPU thread, to hold the kernels' arithmetic to the oracle where no GPU is.
//
// The threads of a block are fibers that run one after the other up to the next barrier. Every
// second block runs them in reverse order, so that a missing barrier shows as a wrong result.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace sft_fast::emulation {

constexpr size_t kStackBytes = 32 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool finished = false;
};

struct Block {
  dim3 index, thread;
  std::vector<Fiber> fibers;
  std::vector<float> exchange;
  std::vector<uint4> shared;
  ucontext_t scheduler;
  std::function<void()> kernel;
};

inline Block block;

inline void yield() {
  const unsigned thread = block.thread.x;
  swapcontext(&block.fibers[thread].context, &block.scheduler);
  block.thread.x = thread;
}

inline void run_fiber() {
  const unsigned thread = block.thread.x;
  block.kernel();
  block.fibers[thread].finished = true;
  swapcontext(&block.fibers[thread].context, &block.scheduler);
}

inline void start_fiber(Fiber& fiber) {
  fiber.finished = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_block(bool reversed) {
  const size_t count = block.fibers.size();
  for (Fiber& fiber : block.fibers) start_fiber(fiber);
  for (bool running = true; running;) {
    running = false;
    for (size_t turn = 0; turn < count; ++turn) {
      const size_t thread = reversed ? count - 1 - turn : turn;
      if (block.fibers[thread].finished) continue;
      block.thread.x = static_cast<unsigned>(thread);
      swapcontext(&block.scheduler, &block.fibers[thread].context);
      running = true;
    }
  }
}

inline void launch(std::function<void()> kernel, dim3 grid, unsigned threads, size_t shared_bytes) {
  block.kernel = std::move(kernel);
  if (block.fibers.size() != threads) block.fibers = std::vector<Fiber>(threads);
  block.exchange.assign(threads, 0.0f);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      // NaN in 16 and 32 bits: what a kernel forgets to write shows.
      block.shared.assign(shared_bytes / sizeof(uint4) + 1, uint4{~0u, ~0u, ~0u, ~0u});
      block.index = {x, y, 0};
      run_block((x + y) % 2 == 1);
    }
  }
}

}  // namespace sft_fast::emulation

inline void __syncthreads() { sft_fast::emulation::yield(); }

namespace sft_fast {

inline unsigned block_x() { return emulation::block.index.x; }
inline unsigned block_y() { return emulation::block.index.y; }
inline unsigned thread_x() { return emulation::block.thread.x; }
inline uint4* dynamic_shared() { return emulation::block.shared.data(); }

// All threads of a block call it together, so the barriers of the warp may be those of the block.
inline float shuffle_xor(float value, int mask) {
  const unsigned thread = thread_x();
  emulation::block.exchange[thread] = value;
  __syncthreads();
  const float other = emulation::block.exchange[thread ^ static_cast<unsigned>(mask)];
  __syncthreads();
  return other;
}

inline float exp2_fast(float value) { return std::exp2(value); }
inline float log_fast(float value) { return std::log(value); }

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const int exponent = (bits >> 10) & 31;
  const float mantissa = static_cast<float>(bits & 1023);
  float magnitude = std::ldexp(mantissa, -24);
  if (exponent == 31) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent > 0) {
    magnitude = std::ldexp(mantissa + 1024, exponent - 25);
  }
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

// Rounds to nearest even: the steps of fp16 at this magnitude are whole numbers after scaling.
inline uint16_t float_to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>((std::bit_cast<uint32_t>(value) >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent = magnitude == 0 ? -14 : std::ilogb(magnitude);
  if (exponent < -14) exponent = -14;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // A mantissa that was rounded up to 2048 carries into the exponent by itself.
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + steps);
}

}  // namespace sft_fast
