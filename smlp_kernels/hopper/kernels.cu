#include "resident.cuh"
// Grid: (groups of images, blocks that share out the passes); THREADS threads; Tile<N>::SMEM bytes of dynamic shared memory.
#define KERNEL(NAME, T, N, TRANSPOSED) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Params<T> p) { \
    extern __shared__ uint8_t raw[]; \
    resident_body<T, N, TRANSPOSED>(p, (uint32_t(__cvta_generic_to_shared(raw)) + 1023) & ~1023u, threadIdx.x, blockIdx.x, blockIdx.y); \
  }
#define KERNELS(N) \
  KERNEL(smlp_bf16_##N, bf16, N, false) KERNEL(smlp_bf16_##N##_t, bf16, N, true) \
  KERNEL(smlp_fp16_##N, fp16, N, false) KERNEL(smlp_fp16_##N##_t, fp16, N, true)
KERNELS(200)
KERNELS(248)
KERNELS(256)
#include "strips.cuh"
#define STRIPS(NAME, T, TRANSPOSED) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Params<T> p) { \
    extern __shared__ uint8_t raw[]; \
    strips_body<T, TRANSPOSED>(p, (uint32_t(__cvta_generic_to_shared(raw)) + 1023) & ~1023u, threadIdx.x, blockIdx.x, blockIdx.y); \
  }
STRIPS(smlp_bf16_strips, bf16, false) STRIPS(smlp_bf16_strips_t, bf16, true)
STRIPS(smlp_fp16_strips, fp16, false) STRIPS(smlp_fp16_strips_t, fp16, true)
