// The sMLP block on Hopper, in one launch and without scratch memory:
//   y = Fh (Ph x + bh) + Fw (x Pw' + bw) + Fi x + bias,    F = [Fh | Fw | Fi],
// and its input gradient: the same with Ph', Pw' (by strides) and Fh', Fw', Fi' (TRANSPOSED: F keeps its layout).
//
// A thread block owns some pixels, all output channels of them, and walks the channels in passes of up to 3 x 64.
// Channels are the rows and pixels the columns of the product, wgmma m64 n N k16, so that F and x are operands as
// they are in memory. In a step of KC input channels
//   - three warpgroups issue wgmma on the step's Xh, Xw, X and F, and wait for those of the step before,
//   - meanwhile all 12 warps mix the next step's X into Xh and Xw (mma.sync, ldmatrix and stmatrix transposed),
//   - and cp.async brings x and F of the step after next from L2.
// x and y are [B, H, W, C] dense, C a multiple of 8. Channels beyond C are zeros in shared memory and are not stored.
// S is a Layout. nvcc unrolls all loops over registers by itself: tests see that nothing is in local memory.
#pragma once
#include "mixer.cuh"

// A thread copies 16 bytes at a time, always at the same place of a row: pixels of x, and rows of F, which has a row
// for each output channel or, TRANSPOSED, for each k.
template <class S, class T, bool TRANSPOSED>
struct Loader {
  static constexpr int KC = S::KC, CHUNKS = KC / 8, CHUNKS_F = TRANSPOSED ? ROWS_F / 8 : CHUNKS;
  static constexpr int APART = THREADS / CHUNKS, APART_F = THREADS / CHUNKS_F;
  static constexpr int SWEEPS = (S::LOADED + APART - 1) / APART;
  static constexpr uint32_t NOWHERE = 0xFFFF;   // no such pixel
  const T* x; int f;
  Halves<SWEEPS> to_x; uint32_t to_f;

  DEVICE Loader(const Params<T>& p, const Lines& lines, int tid) {
    const int pixel = tid / CHUNKS, chunk = tid % CHUNKS, row = tid / CHUNKS_F, chunk_f = tid % CHUNKS_F;
    x = p.x + (lines.first * p.width + pixel) * p.channels + chunk * 8;
    for (int i = 0; i < SWEEPS; ++i) {
      const int q = pixel + i * APART, line = q * p.reciprocal >> 16;
      const int row = row_of<S>(p, lines, line, q - line * p.width);
      to_x.set(i, line < lines.count ? swizzled<KC * 2>(row, chunk) : NOWHERE);
    }
    f = row * p.fuse_stride + chunk_f * 8;
    to_f = TRANSPOSED ? chunk_f / 8 * KC * 128 + swizzled<128>(row, chunk_f % 8) : swizzled<KC * 2>(row, chunk);
  }
  DEVICE void load_x(const Params<T>& p, uint32_t tile, int k) const {
    const int channels = again(p.channels);
    const int bytes = k + int(thread_index() % CHUNKS) * 8 < channels ? 16 : 0;   // of 0: zeros
    for (int i = 0; i < SWEEPS; ++i) {
      const uint32_t to = to_x[i];
      if (to != NOWHERE) cp_async(tile + to, bytes ? x + i * APART * channels + k : p.x, bytes);
    }
  }
  DEVICE void load_f(const Params<T>& p, uint32_t tiles, int k, int pass) const {
    const int first = first_tile(p, pass) * 64, end = min(first_tile(p, pass + 1) * 64, p.channels);
    const int at_row = TRANSPOSED ? k : first, at_column = TRANSPOSED ? first : k;
    const uint32_t tid = thread_index();
    const int row = tid / CHUNKS_F + at_row, column = tid % CHUNKS_F * 8 + at_column;
    const int from = f + at_row * p.fuse_stride + at_column;
    for (int branch = 0; branch < 3; ++branch)
      for (int i = 0; i < KC / 16; ++i) {
        const int below = i * APART_F;
        const bool real = row + below < (TRANSPOSED ? p.channels : end) && column < (TRANSPOSED ? end : p.channels);
        cp_async(tiles + to_f + branch * S::F_BYTES + below * (TRANSPOSED ? 128 : KC * 2),
                 p.fuse + (real ? from + branch * p.fuse_stride_branch + below * p.fuse_stride : 0), real ? 16 : 0);
      }
  }
};

// [64 channels x N pixels] of a warpgroup to y: 16 pixels at a time through 512 bytes of the warp's own; a bias map
// comes the same way in the opposite direction.
template <class S, class T>
DEVICE void store(const Params<T>& p, uint32_t stage, float (&acc)[S::N / 2], int channel) {
  const Lines lines = lines_of<S>(p, block_index());
  const int lane = thread_index() % 32;
  const int places = p.height * p.width, first_place = lines.own * p.width, count = lines.own_count * p.width;
  T* const y = p.y + (lines.first + lines.own) * p.width * p.channels;
  float bias[2];
  for (int i = 0; i < 2; ++i) bias[i] = bias_of(p.bias, channel + (lane >> 2) + 8 * i, p.channels);
  const int matrix_row = (lane & 7) + 8 * (lane >> 4), px = lane >> 1, mine = channel + (lane & 1) * 8;
  const uint32_t as_row = stage + swizzled<32>(px, lane & 1);
  const uint32_t as_matrix = stage + swizzled<32>(matrix_row, (lane >> 3) & 1);
#pragma unroll
  for (int n = 0; n < S::N; n += 16) {
    const bool real = n + px < count && mine < p.channels;
    const int pixel = pixel_of(p, n + px);
    uint32_t b[4] = {0, 0, 0, 0}, out[4];
    if (p.bias_map) {
      // where there is no pixel, 8 numbers that are there
      const T* const from = p.bias_map + (real ? (first_place + pixel) % places * p.channels + mine : 0);
      chunk_at(as_row) = *reinterpret_cast<const uint4*>(from);
      __syncwarp();
      ldmatrix_x4_trans(b, as_matrix);
      __syncwarp();
    }
    for (int i = 0; i < 4; ++i) {          // 8 pixels x 8 channels each
      const int at = n + (i >> 1) * 8, j = at / 2 + (i & 1) * 2;
      out[i] = at < S::N ? pack<T>(acc[j] + bias[i & 1] + low<T>(b[i]), acc[j + 1] + bias[i & 1] + high<T>(b[i])) : 0;
    }
    stmatrix_x4_trans(as_matrix, out);
    __syncwarp();
    if (real) *reinterpret_cast<uint4*>(y + pixel * p.channels + mine) = chunk_at(as_row);
    __syncwarp();
  }
}

template <class S, class T, bool TRANSPOSED>
DEVICE void block(const Params<T>& p) {
  extern __shared__ uint8_t raw[];
  const uint32_t smem = (uint32_t(__cvta_generic_to_shared(raw)) + 1023) & ~1023u;
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(0xffffffffu, tid >> 5, 0), warpgroup = warp >> 2;
  const int first_pass = blockIdx.x % p.passes_step;
  const Lines lines = lines_of<S>(p, blockIdx.x);
  const Mixer<S, T> mix(p, lines, warp, lane);
  const Loader<S, T, TRANSPOSED> loader(p, lines, tid);
  for (int i = tid * 16; i < S::OFF_F; i += THREADS * 16) chunk_at(smem + i) = uint4{};   // where no pixel comes: zeros
  __syncthreads();
  // F of step s + 2 and x of step s + STAGES_X - 1 are asked for in step s, a group each, empty at the end. x comes
  // first where it is for the same step, so that the next step's x can be waited for while its F is on the way.
  constexpr bool FAR = S::STAGES_X == 4;
  int at_k = 0, at_pass = first_pass;
  auto load_x = [&](int stage) {
    if (at_pass < p.passes) loader.load_x(p, smem + stage * S::X_BYTES, at_k);
    cp_async_commit();
  };
  auto load = [&](int stage_f, int stage_x) {
    if (!FAR) load_x(stage_x);
    if (at_pass < p.passes) loader.load_f(p, smem + S::OFF_F + stage_f * 3 * S::F_BYTES, at_k, at_pass);
    cp_async_commit();
    if ((at_k += S::KC) >= p.channels) { at_k = 0; at_pass += p.passes_step; }
    if (FAR) load_x(stage_x);
  };
  if (FAR) load_x(0);
  load(0, FAR ? 1 : 0);
  load(1, FAR ? 2 : 1);
  cp_async_wait<FAR ? 3 : 2>();            // x and F of step 0
  __syncthreads();
  mix(smem, smem);
  fence_async();
  __syncthreads();

  float acc[S::N / 2];
  int f_at = 0, far_at = 0, m_at = 0;      // stages of this step
  int& x_at = FAR ? far_at : f_at;
  for (int pass = first_pass; pass < p.passes; pass += p.passes_step) {
    const int tile = first_tile(p, pass) + warpgroup;
    const bool active = tile < first_tile(p, pass + 1);
    for (int i = 0; i < S::N / 2; ++i) acc[i] = 0.f;
    for (int k = 0; k < p.channels; k += S::KC) {
      if (active) {
        wgmma_arrive();
        const uint32_t f = smem + S::OFF_F + f_at * 3 * S::F_BYTES + warpgroup * S::KC * 128;
        const uint32_t mixed = smem + m_at * S::M_BYTES;
        const uint32_t operand[3] = {mixed + S::OFF_H, mixed + S::OFF_W, smem + x_at * S::X_BYTES};
        for (int branch = 0; branch < 3; ++branch)
          for (int kk = 0; kk < S::KC / 16; ++kk) {
            const uint32_t a = f + branch * S::F_BYTES + kk * (TRANSPOSED ? 2048 : 32);
            wgmma<T, TRANSPOSED>(acc, descriptor<TRANSPOSED ? 128 : S::KC * 2>(a),
                                 descriptor<S::KC * 2>(operand[branch] + kk * 32));
          }
        wgmma_commit();
      }
      wgmma_wait_but_last();               // the step before is through: its buffers are free, once all warps are here
      cp_async_wait<FAR ? 2 : 1>();        // x of the next step
      __syncthreads();
      load(f_at == 0 ? 2 : f_at - 1, x_at == 0 ? S::STAGES_X - 1 : x_at - 1);
      f_at = f_at == 2 ? 0 : f_at + 1;
      far_at = (far_at + 1) & 3;
      m_at ^= 1;
      mix(smem + x_at * S::X_BYTES, smem + m_at * S::M_BYTES);   // after the last step: of old numbers, for nothing
      cp_async_wait<FAR ? 3 : 2>();        // F of the next step
      fence_async();
      __syncthreads();
    }
    wgmma_wait(acc);
    if (active) store<S>(p, smem + S::OFF_OUT + warp * 512, acc, tile * 64 + warp % 4 * 16);
  }
}
