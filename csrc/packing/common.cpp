#include "packing/common.hpp"

#include <algorithm>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sft_fast {
namespace {

constexpr int64_t kMaxSamples = std::numeric_limits<int32_t>::max();

void check_range(const char* key, int64_t value, int64_t least, int64_t greatest,
                 const char* unit) {
  if (value < least || value > greatest) {
    throw std::invalid_argument(std::string(key) + " is " + std::to_string(value) + "; expected " +
                                std::to_string(least) + " to " + std::to_string(greatest) + unit);
  }
}

}  // namespace

void* allocate(size_t num_bytes) {
  void* memory = nullptr;
#if defined(__linux__)
  constexpr size_t kHugePage = size_t{1} << 21;
  if (num_bytes >= kHugePage && posix_memalign(&memory, kHugePage, num_bytes) == 0) {
    // Advice only: where there are no huge pages, and for the rest at the end, small ones do.
    madvise(memory, num_bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
    return memory;
  }
#endif
  memory = std::malloc(std::max(num_bytes, size_t{1}));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void check_options(const PlanOptions& options) {
  check_range("packing.capacity", options.capacity, 1, kMaxCapacity, " tokens");
  check_range("packing.alignment", options.alignment, 1, options.capacity, " tokens");
  check_range("packing.max_samples_per_bin", options.max_samples, 0, kMaxSamples, " samples");
  check_range("packing.pool_size", options.pool_size, 1, kMaxPoolSize, " samples");
  if (options.capacity % options.alignment != 0) {
    throw std::invalid_argument("packing.capacity is " + std::to_string(options.capacity) +
                                "; expected a multiple of packing.alignment (" +
                                std::to_string(options.alignment) + ")");
  }
}

uint32_t sample_limit(const PlanOptions& options) {
  return static_cast<uint32_t>(options.max_samples == 0 ? kMaxSamples : options.max_samples);
}

uint32_t checked_size(int64_t sample, int64_t length, const PlanOptions& options) {
  if (length < 1 || length > options.capacity) {
    throw std::invalid_argument("sample " + std::to_string(sample) + " has " +
                                std::to_string(length) + " tokens; expected 1 to " +
                                std::to_string(options.capacity) +
                                " (packing.capacity): raise it, or set data.over_length");
  }
  return static_cast<uint32_t>((length + options.alignment - 1) / options.alignment);
}

Sizes::Sizes(std::span<const int32_t> lengths, const PlanOptions& options)
    : rounded_(options.alignment == 1 ? 0 : lengths.size()), view_(lengths) {
  check_options(options);
  if (lengths.size() > static_cast<size_t>(kMaxSamples)) {
    throw std::invalid_argument("a plan holds fewer than 2^31 samples, but there are " +
                                std::to_string(lengths.size()));
  }
  capacity_ = static_cast<uint32_t>(options.capacity / options.alignment);
  max_samples_ = sample_limit(options);
  // Without branches inside, so that compilers use vector instructions.
  int32_t shortest = 1;
  int32_t longest = 1;
  for (const int32_t length : lengths) {
    shortest = std::min(shortest, length);
    longest = std::max(longest, length);
  }
  if (shortest < 1 || longest > options.capacity) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      checked_size(static_cast<int64_t>(i), lengths[i], options);
    }
  }
  if (options.alignment == 1) return;
  const auto alignment = static_cast<uint32_t>(options.alignment);
  for (size_t i = 0; i < lengths.size(); ++i) {
    rounded_[i] =
        static_cast<int32_t>((static_cast<uint32_t>(lengths[i]) + alignment - 1) / alignment);
  }
  view_ = {rounded_.data.get(), rounded_.size};
}

}  // namespace sft_fast
