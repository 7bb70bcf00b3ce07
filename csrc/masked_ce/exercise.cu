// Runs every native kernel on buffers of exactly the size it may touch, for compute-sanitizer:
//   nvcc -std=c++20 -O1 -lineinfo -arch=sm_90 -I csrc csrc/masked_ce/{exercise,masked_ce}.cu -o
//   exercise compute-sanitizer --tool memcheck ./exercise
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "masked_ce/masked_ce.h"

namespace {

constexpr int64_t kIgnore = -100;

void check(int code) {
  if (code == 0) return;
  std::fprintf(stderr, "%s\n", sft_fast_masked_ce_error(code));
  std::exit(1);
}

template <typename T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(const std::vector<T>& values) {
    check(cudaMalloc(&data, values.size() * sizeof(T)));
    check(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  explicit Buffer(size_t count) { check(cudaMalloc(&data, count * sizeof(T))); }
  ~Buffer() { cudaFree(data); }
};

// Loss of the last token, whose logits are all 0: log(num_columns).
void check_loss(const float* loss, int64_t num_tokens, int64_t num_columns) {
  float value = 0.0f;
  check(cudaMemcpy(&value, loss + num_tokens - 1, sizeof(value), cudaMemcpyDeviceToHost));
  if (std::fabs(value - std::log(static_cast<float>(num_columns))) < 1e-3f) return;
  std::fprintf(stderr, "loss %g of %lld columns\n", value, static_cast<long long>(num_columns));
  std::exit(1);
}

void run(int dtype, int64_t num_tokens, int64_t width, int64_t num_columns, double softcap) {
  const int64_t element = dtype == SFT_FAST_FP32 ? 4 : 2;
  Buffer<unsigned char> logits(std::vector<unsigned char>(num_tokens * width * element, 0));
  std::vector<int64_t> ids(num_tokens, kIgnore);
  for (int64_t token = 0; token < num_tokens; token += 2) ids[token] = (token * 7919) % num_columns;
  ids.back() = num_columns - 1;
  Buffer<int64_t> labels(ids);
  const SftFastLogits described{logits.data, width,       labels.data, num_tokens, width,
                                num_columns, /*start=*/0, num_columns, kIgnore,    dtype};
  // Room for more options, which are off.
  const double plain[16] = {0.0, 0.0, softcap}, options[16] = {0.1, 1e-4, softcap};
  const int64_t splits = sft_fast_masked_ce_num_splits(num_tokens, width);
  Buffer<float> grads(std::vector<float>(2 * num_tokens, 0.5f));
  for (const bool with_outputs : {false, true}) {
    const int64_t count = 3 + 3 * with_outputs;
    Buffer<float> statistics(std::vector<float>(splits * count * num_tokens, 0.0f));
    Buffer<unsigned char> gradient(num_tokens * width * element);
    const double* used = with_outputs ? options : plain;
    check(sft_fast_masked_ce_statistics(&described, used, statistics.data, with_outputs, nullptr));
    const SftFastStatistics parts{statistics.data, labels.data, splits,      num_tokens,
                                  num_columns,     kIgnore,     with_outputs};
    Buffer<float> outputs(static_cast<size_t>((with_outputs ? 4 : 1) * num_tokens));
    check(sft_fast_masked_ce_losses(&parts, used, outputs.data, nullptr));
    check(sft_fast_masked_ce_gradient(&described, options, gradient.data, width, statistics.data,
                                      splits, count, grads.data, nullptr));
    check(cudaDeviceSynchronize());
  }
  if (width <= sft_fast_masked_ce_one_pass_width(&described)) {
    Buffer<float> loss(num_tokens);
    check(sft_fast_masked_ce_one_pass(&described, plain, loss.data, grads.data, nullptr));
    check(cudaDeviceSynchronize());
    check_loss(loss.data, num_tokens, num_columns);
  }
}

}  // namespace

int main() {
  for (int dtype : {SFT_FAST_BF16, SFT_FAST_FP16, SFT_FAST_FP32}) {
    for (const double softcap : {0.0, 30.0}) {
      run(dtype, 1, 1, 1, softcap);
      run(dtype, 7, 13, 13, softcap);
      run(dtype, 5, 4104, 4100, softcap);
      run(dtype, 3, 50257, 50257, softcap);
      run(dtype, 3, 65536, 65500, softcap);
      run(dtype, 2, 128256, 128256, softcap);
    }
  }
  std::puts("done");
}
