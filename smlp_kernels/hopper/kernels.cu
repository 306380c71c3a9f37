// Grid: groups of pixels, blocks that share out the passes; THREADS threads; OFF_OUT + 7168 bytes of shared memory.
#include "resident.cuh"
#include "strips.cuh"

#define KERNEL(NAME, S, T, TRANSPOSED) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Params<T> p) { \
    block<S, T, TRANSPOSED>(p); \
  }
#define KERNELS(N, S) \
  KERNEL(smlp_bf16_##N, S, bf16, false) KERNEL(smlp_bf16_##N##_t, S, bf16, true) \
  KERNEL(smlp_fp16_##N, S, fp16, false) KERNEL(smlp_fp16_##N##_t, S, fp16, true)
KERNELS(200, Tile<200>)
KERNELS(248, Tile<248>)
KERNELS(256, Tile<256>)
KERNELS(strips, Strip)
