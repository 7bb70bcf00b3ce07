// Launches of the kernels, behind a plain C interface. One source for CUDA and HIP.
#include "masked_ce/kernels.hpp"
#include "masked_ce/masked_ce.h"

namespace sft_fast {

#if defined(SFT_FAST_DEVICE_CODE_ONLY)

// No host code: name the kernels, so that they are compiled.
#define SFT_FAST_INSTANTIATE(dtype, aligned, full)                                             \
  template __global__ void statistics_kernel<dtype, aligned, full>(SftFastLogits, LossOptions, \
                                                                   float*, int, bool);         \
  template __global__ void gradient_kernel<dtype, aligned, full>(                              \
      SftFastLogits, void*, int64_t, const float*, int, int64_t, const float*, LossOptions, int);
#define SFT_FAST_INSTANTIATE_DTYPE(dtype)                                                     \
  SFT_FAST_INSTANTIATE(dtype, true, true)                                                     \
  SFT_FAST_INSTANTIATE(dtype, true, false)                                                    \
  SFT_FAST_INSTANTIATE(dtype, false, true)                                                    \
  template __global__ void one_pass_kernel<dtype, true>(SftFastLogits, float*, const float*,  \
                                                        LossOptions);                         \
  template __global__ void one_pass_kernel<dtype, false>(SftFastLogits, float*, const float*, \
                                                         LossOptions);
SFT_FAST_INSTANTIATE_DTYPE(SFT_FAST_BF16)
SFT_FAST_INSTANTIATE_DTYPE(SFT_FAST_FP16)
SFT_FAST_INSTANTIATE_DTYPE(SFT_FAST_FP32)

#else

template <auto kConstant>
struct Constant {
  static constexpr auto kValue = kConstant;
};

// Calls `call` with a constant, which selects an instantiation.
template <typename Call>
void with_dtype(int dtype, Call call) {
  if (dtype == SFT_FAST_BF16) return call(Constant<SFT_FAST_BF16>{});
  if (dtype == SFT_FAST_FP16) return call(Constant<SFT_FAST_FP16>{});
  call(Constant<SFT_FAST_FP32>{});
}

template <typename Call>
void with_flag(bool flag, Call call) {
  if (flag) return call(Constant<true>{});
  call(Constant<false>{});
}

// Unaligned rows are rare and slow anyway: one instantiation serves them all.
template <typename Call>
void with_kind(bool is_aligned, bool is_full, Call call) {
  if (!is_aligned) return call(Constant<false>{}, Constant<true>{});
  with_flag(is_full, [&](auto full) { call(Constant<true>{}, full); });
}

#if defined(SFT_FAST_HOST_EMULATION)
#define SFT_FAST_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  static_cast<void>(stream),                                              \
      emulation::launch([&] { kernel(__VA_ARGS__); }, grid, threads, shared_bytes)
int last_error() { return 0; }
#elif defined(SFT_FAST_HIP)
#define SFT_FAST_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, static_cast<hipStream_t>(stream)>>>(__VA_ARGS__)
int last_error() { return hipGetLastError(); }
#else
#define SFT_FAST_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                      \
  do {                                                                                         \
    if ((shared_bytes) > 0) {                                                                  \
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes); \
    }                                                                                          \
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);   \
  } while (false)
int last_error() { return cudaGetLastError(); }
#endif

int64_t element_bytes(int dtype) { return dtype == SFT_FAST_FP32 ? 4 : 2; }

bool is_aligned(const SftFastLogits& logits) {
  const int64_t bytes = element_bytes(logits.dtype);
  return (reinterpret_cast<uintptr_t>(logits.data) | (logits.row_stride * bytes) |
          (logits.width * bytes)) %
             16 ==
         0;
}

dim3 grid_of(int64_t num_tokens, int64_t num_splits) {
  dim3 grid;
  grid.x = static_cast<unsigned>(num_tokens);
  grid.y = static_cast<unsigned>(num_splits);
  return grid;
}

#endif

}  // namespace sft_fast

#if !defined(SFT_FAST_DEVICE_CODE_ONLY)

using namespace sft_fast;

int64_t sft_fast_masked_ce_num_splits(int64_t num_tokens, int64_t width) {
  // About 1024 blocks, a few for each compute unit; a split reads at least 8192 logits.
  const int64_t wanted = num_tokens > 0 ? (1024 + num_tokens - 1) / num_tokens : 1;
  const int64_t most = (width + 8191) / 8192;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits > 16 ? 16 : splits;
}

int sft_fast_masked_ce_statistics(const SftFastLogits* logits, const double* options,
                                  float* statistics, int with_outputs, void* stream) {
  if (logits->num_tokens == 0) return 0;
  const LossOptions made = make_options(options, logits->vocab_size);
  const int64_t splits = sft_fast_masked_ce_num_splits(logits->num_tokens, logits->width);
  with_dtype(logits->dtype, [&](auto dtype) {
    with_kind(is_aligned(*logits), is_full_read(made, with_outputs), [&](auto aligned, auto full) {
      const auto kernel = statistics_kernel<decltype(dtype)::kValue, decltype(aligned)::kValue,
                                            decltype(full)::kValue>;
      SFT_FAST_LAUNCH(kernel, grid_of(logits->num_tokens, splits), kThreads, 0, stream, *logits,
                      made, statistics, static_cast<int>(splits), with_outputs != 0);
    });
  });
  return last_error();
}

int sft_fast_masked_ce_losses(const SftFastStatistics* statistics, const double* options,
                              float* outputs, void* stream) {
  if (statistics->num_tokens == 0) return 0;
  const LossOptions made = make_options(options, statistics->vocab_size);
  const int64_t blocks = (statistics->num_tokens + kLossThreads - 1) / kLossThreads;
  SFT_FAST_LAUNCH(losses_kernel, grid_of(blocks, 1), kLossThreads, 0, stream, *statistics, outputs,
                  made);
  return last_error();
}

int sft_fast_masked_ce_gradient(const SftFastLogits* logits, const double* options, void* gradient,
                                int64_t gradient_stride, const float* statistics, int64_t num_parts,
                                int64_t num_statistics, const float* grads, void* stream) {
  if (logits->num_tokens == 0) return 0;
  const LossOptions made = make_options(options, logits->vocab_size);
  const int64_t splits = sft_fast_masked_ce_num_splits(logits->num_tokens, logits->width);
  SftFastLogits output = *logits;
  output.data = gradient;
  output.row_stride = gradient_stride;
  const bool is_both_aligned = is_aligned(*logits) && is_aligned(output);
  with_dtype(logits->dtype, [&](auto dtype) {
    with_kind(is_both_aligned, is_full_gradient(made), [&](auto aligned, auto full) {
      const auto kernel = gradient_kernel<decltype(dtype)::kValue, decltype(aligned)::kValue,
                                          decltype(full)::kValue>;
      SFT_FAST_LAUNCH(kernel, grid_of(logits->num_tokens, splits), kThreads, 0, stream, *logits,
                      gradient, gradient_stride, statistics, static_cast<int>(num_parts),
                      num_statistics, grads, made, static_cast<int>(splits));
    });
  });
  return last_error();
}

int64_t sft_fast_masked_ce_one_pass_width(const SftFastLogits* logits) {
  if (!is_aligned(*logits)) return 0;
  const int64_t bytes = int64_t{16} * kRegisterPacks * kOnePassThreads + kSharedBytes;
  return bytes / element_bytes(logits->dtype);
}

int sft_fast_masked_ce_one_pass(const SftFastLogits* logits, const double* options, float* loss,
                                const float* weights, void* stream) {
  if (logits->num_tokens == 0) return 0;
  const LossOptions made = make_options(options, logits->vocab_size);
  const int64_t row_bytes = logits->width * element_bytes(logits->dtype);
  const int64_t beyond = row_bytes - int64_t{16} * kRegisterPacks * kOnePassThreads;
  const int shared_bytes = beyond > 0 ? static_cast<int>(beyond) : 0;
  with_dtype(logits->dtype, [&](auto dtype) {
    with_flag(is_full_read(made, false), [&](auto full) {
      const auto kernel = one_pass_kernel<decltype(dtype)::kValue, decltype(full)::kValue>;
      SFT_FAST_LAUNCH(kernel, grid_of(logits->num_tokens, 1), kOnePassThreads, shared_bytes, stream,
                      *logits, loss, weights, made);
    });
  });
  return last_error();
}

const char* sft_fast_masked_ce_options() { return kOptionNames; }

const char* sft_fast_masked_ce_error(int code) {
#if defined(SFT_FAST_HOST_EMULATION)
  return code == 0 ? "no error" : "unknown error";
#elif defined(SFT_FAST_HIP)
  return hipGetErrorString(static_cast<hipError_t>(code));
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

#endif
