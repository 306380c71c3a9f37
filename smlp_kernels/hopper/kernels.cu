// Grid: for each group of lines the blocks that share out its passes; THREADS threads, MAX_SHARED bytes.
#include "block.cuh"

#define KERNEL(NAME, S, T, TRANSPOSED) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME( \
      const T* x, T* y, const T* proj_h, const T* bias_h, const T* proj_w, const T* bias_w, const T* fuse, \
      const T* bias, const T* bias_map, int batch, int channels, int height, int width, int h_out, int h_in, \
      int w_out, int w_in, int fuse_branch, int fuse_row, int held, int passes, int passes_step, int pass_tiles, \
      int reciprocal, int flip_shift, int flip_mask) { \
    block<S, T, TRANSPOSED>({x, y, batch, channels, height, width, {height, proj_h, h_out, h_in, bias_h}, \
                             {width, proj_w, w_out, w_in, bias_w}, fuse, fuse_branch, fuse_row, bias, bias_map, \
                             held, passes, passes_step, pass_tiles, reciprocal, flip_shift, flip_mask}); \
  }
#define KERNELS(N, S) \
  KERNEL(smlp_bf16_##N, S, bf16, false) KERNEL(smlp_bf16_##N##_t, S, bf16, true) \
  KERNEL(smlp_fp16_##N, S, fp16, false) KERNEL(smlp_fp16_##N##_t, S, fp16, true)
KERNELS(200, Images<200>)
KERNELS(248, Images<248>)
KERNELS(256, Images<256>)
KERNELS(strips, Strip)
