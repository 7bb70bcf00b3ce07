// The few names of HIP that the kernels use, for compiling their device code where ROCm is absent:
//   clang++ -x hip --offload-arch=gfx942 --cuda-device-only -nogpuinc -nogpulib -I csrc \
//     -DSFT_FAST_NO_HIP_HEADERS -S csrc/masked_ce/masked_ce.cu
#pragma once

#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define SFT_FAST_DEVICE_CODE_ONLY 1

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace sft_fast {

__device__ inline unsigned block_x() { return __builtin_amdgcn_workgroup_id_x(); }
__device__ inline unsigned block_y() { return __builtin_amdgcn_workgroup_id_y(); }
__device__ inline unsigned thread_x() { return __builtin_amdgcn_workitem_id_x(); }

}  // namespace sft_fast

__device__ inline void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
