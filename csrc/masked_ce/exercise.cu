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

// Loss of the last row, whose logits are all 0: log(num_columns).
void check_loss(const float* loss, int64_t num_rows, int64_t num_columns) {
  float value = 0.0f;
  check(cudaMemcpy(&value, loss + num_rows - 1, sizeof(value), cudaMemcpyDeviceToHost));
  if (std::fabs(value - std::log(static_cast<float>(num_columns))) < 1e-3f) return;
  std::fprintf(stderr, "loss %g of %lld columns\n", value, static_cast<long long>(num_columns));
  std::exit(1);
}

void run(int dtype, int64_t num_rows, int64_t width, int64_t num_columns, float softcap) {
  const int64_t element = dtype == SFT_FAST_FP32 ? 4 : 2;
  Buffer<unsigned char> logits(std::vector<unsigned char>(num_rows * width * element, 0));
  std::vector<int64_t> ids(num_rows, kIgnore);
  for (int64_t row = 0; row < num_rows; row += 2) ids[row] = (row * 7919) % num_columns;
  ids.back() = num_columns - 1;
  Buffer<int64_t> labels(ids);
  const SftFastLogits described{logits.data, width,       labels.data, num_rows, width,
                                num_columns, /*start=*/0, kIgnore,     softcap,  dtype};
  const SftFastLossOptions options{0.1f, 0.1f / static_cast<float>(num_columns), 1e-4f};
  const int64_t splits = sft_fast_masked_ce_num_splits(num_rows, width);
  const SftFastLossOptions plain{0.0f, 0.0f, 0.0f};
  Buffer<float> grads(std::vector<float>(2 * num_rows, 0.5f));
  for (const bool with_outputs : {false, true}) {
    const int64_t count = 3 + 3 * with_outputs;
    Buffer<float> statistics(std::vector<float>(splits * count * num_rows, 0.0f));
    Buffer<unsigned char> gradient(num_rows * width * element);
    check(sft_fast_masked_ce_statistics(&described, statistics.data, with_outputs, with_outputs,
                                        nullptr));
    const SftFastStatistics parts{statistics.data, labels.data, splits,      num_rows,
                                  num_columns,     kIgnore,     with_outputs};
    Buffer<float> outputs(static_cast<size_t>((with_outputs ? 4 : 1) * num_rows));
    check(
        sft_fast_masked_ce_losses(&parts, outputs.data, with_outputs ? &options : &plain, nullptr));
    check(sft_fast_masked_ce_gradient(&described, gradient.data, width, statistics.data, splits,
                                      count, grads.data, &options, nullptr));
    check(cudaDeviceSynchronize());
  }
  if (width <= sft_fast_masked_ce_one_pass_width(&described)) {
    Buffer<float> loss(num_rows);
    check(sft_fast_masked_ce_one_pass(&described, loss.data, grads.data, &plain, nullptr));
    check(cudaDeviceSynchronize());
    check_loss(loss.data, num_rows, num_columns);
  }
}

}  // namespace

int main() {
  for (int dtype : {SFT_FAST_BF16, SFT_FAST_FP16, SFT_FAST_FP32}) {
    for (const float softcap : {0.0f, 30.0f}) {
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
