// The sMLP block on Hopper, in one launch and without scratch memory:
//   y = Fh (Ph x + bh) + Fw (x Pw' + bw) + Fi x + bias,    F = [Fh | Fw | Fi],
// and its input gradient: the same with Ph', Pw' (by strides) and Fh', Fw', Fi' (TRANSPOSED: F stays as it lies).
//
// A thread block owns some pixels, all output channels of them, and walks the channels in passes of up to 3 x 64.
// Channels are the rows and pixels the columns of the product, wgmma m64 n N k16, so that F and x are operands as
// they lie in memory. In a step of KC input channels
//   - three warpgroups issue wgmma on the step's Xh, Xw, X and F, and wait for those of the step before,
//   - meanwhile all 12 warps mix the next step's X into Xh and Xw (mma.sync, ldmatrix and stmatrix transposed),
//   - and cp.async brings x and F of the step after next from L2.
// x and y are [B, H, W, C] dense, C a multiple of 8. Channels beyond C are zeros in shared memory and are not stored.
//
// S is Tile (resident.cuh: whole images) or Strip (strips.cuh: some lines of an image): sizes, and which pixels lie
// where.
#pragma once
#include "instructions.cuh"
#include "products.cuh"

constexpr int THREADS = 384, WARPS = 12;
constexpr int ROWS_F = 192;                // output channels a pass
constexpr int STAGES_F = 3, STAGES_MIXED = 2;
constexpr int MAX_SHARED = 232448;         // bytes of a block

template <class T>
struct Params {                            // pointers first, then 32-bit integers: PARAMETERS in plan.py
  const T* x; T* y; const T* proj[2]; const T* proj_bias[2]; const T* fuse;
  const T* bias;                           // [C], or nothing
  const T* bias_map;                       // [H, W, C], or nothing
  int batch, channels, height, width;
  int held;                                // by a block: images of Tile, lines of Strip
  int proj_stride_out[2], proj_stride_in[2];
  int fuse_stride_branch, fuse_stride;     // the other axis of F is contiguous
  int passes, passes_step;                 // a block's passes: blockIdx.y, + passes_step, ...
  int pass_tiles;                          // tiles of 64 output channels a pass, times 65536, rounded up: first_tile
  int reciprocal;                          // 65536 / width + 1
  int flip_shift, flip_mask;               // 3 - z and 2^z - 1 where 2^z, at most 8, divides width: flipped
};
struct Pixels { long first; int count; };  // of x or y

// Of a pass, or of its end: the last pass ends with all tiles, since the rounding is less than 1 / 65536 a pass.
template <class T> DEVICE int first_tile(const Params<T>& p, int pass) { return pass * p.pass_tiles >> 16; }

// A tile has rows of KC channels, its 16-byte chunks swizzled over 64 (KC 32) or 32 bytes (KC 16), as wgmma reads it
// ...
template <int KC> DEVICE uint32_t swizzled(int row, int chunk) {
  return row * KC * 2 + ((chunk ^ ((row >> (KC == 32 ? 1 : 2)) & (KC / 8 - 1))) << 4);
}
template <int KC> DEVICE uint64_t descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(KC) << 32 | uint64_t(KC == 32 ? 2 : 3) << 62;
}
// ... or, F TRANSPOSED, rows of 64 channels for each k, swizzled over 128 bytes.
DEVICE uint64_t descriptor_transposed(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Where pixels lie in a tile: in order, but with w flipped within aligned groups of 2, 4 or 8 in some of the lines,
// so that both 8 neighbours in a line and 8 in a column lie in different banks.
template <class T> DEVICE int flipped(const Params<T>& p, int line, int w) {
  return w ^ ((line >> p.flip_shift) & p.flip_mask);
}
template <class T> DEVICE int row_of(const Params<T>& p, int line, int w) {
  return line * p.width + flipped(p, line, w);
}
template <class T> DEVICE int pixel_of(const Params<T>& p, int row) {   // and the way back
  const int line = row * p.reciprocal >> 16;
  return line * p.width + flipped(p, line, row - line * p.width);
}

template <class S, class T> struct Mixer;   // Xh and Xw of one step from its X

// The weights of an axis as operand B of mma.sync: from output `shift` on, 8 outputs a row of `proj` and 8 inputs a
// number.
template <int OUT, int IN, class T>
DEVICE void load_weights(uint32_t (&proj)[OUT * IN], const Params<T>& p, int axis, int shift, int size, int lane) {
  const T* const w = p.proj[axis];
#pragma unroll
  for (int j = 0; j < OUT; ++j)
#pragma unroll
    for (int i = 0; i < IN; ++i) {
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int out = shift + j * 8 + (lane >> 2), in = i * 8 + (lane & 3) * 2 + e;
        v[e] = out < size && in < size ? to_float(w[out * p.proj_stride_out[axis] + in * p.proj_stride_in[axis]]) : 0.f;
      }
      proj[IN * j + i] = pack<T>(v[0], v[1]);
    }
}
template <class T> DEVICE void store_mixed(uint32_t at, const float (&c)[2][4]) {
  const uint32_t out[4] = {pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]),
                           pack<T>(c[1][0], c[1][1]), pack<T>(c[1][2], c[1][3])};
  stmatrix_x4_trans(at, out);
}

// A thread copies 16 bytes at a time, always at the same place of a row: pixels ROWS apart, rows of F ROWS (16
// TRANSPOSED) apart.
template <class S, class T, bool TRANSPOSED>
struct Loader {
  static constexpr int KC = S::KC, CHUNKS = KC / 8, SHIFT = KC == 32 ? 2 : 1;
  static constexpr int ROWS = THREADS / CHUNKS, SWEEPS = (S::LOADED + ROWS - 1) / ROWS;
  static constexpr uint32_t NOWHERE = 0xFFFF;   // pixels that there are not
  const T* x; int f;
  uint32_t to_x[(SWEEPS + 1) / 2], to_f;   // two of 16 bits each

  DEVICE Loader(const Params<T>& p, int group, int tid) {
    const int pixel = tid >> SHIFT, chunk = (tid & (CHUNKS - 1));
    const Pixels all = S::loaded(p, group);
    x = p.x + (all.first + pixel) * p.channels + chunk * 8;
#pragma unroll
    for (int i = 0; i < SWEEPS; ++i) {
      const int q = pixel + i * ROWS, line = q * p.reciprocal >> 16;
      const uint32_t to = q < all.count ? swizzled<KC>(S::row(p, group, line, q - line * p.width), chunk) : NOWHERE;
      to_x[i / 2] = i & 1 ? to_x[i / 2] | to << 16 : to;
    }
    const int row = row_of_f(tid), column = column_of_f(tid);
    f = row * p.fuse_stride + column;
    to_f = TRANSPOSED ? (column >> 6) * KC * 128 + row * 128 + ((((column >> 3) & 7) ^ (row & 7)) << 4)
                      : swizzled<KC>(row, chunk);
  }
  // of F: k and output channel if TRANSPOSED, else output channel and k
  DEVICE static int row_of_f(int tid) { return TRANSPOSED ? tid / 24 : tid >> SHIFT; }
  DEVICE static int column_of_f(int tid) { return (TRANSPOSED ? tid % 24 : (tid & (CHUNKS - 1))) * 8; }
  DEVICE void load_x(const Params<T>& p, uint32_t tile, int k) const {
    const int channels = again(p.channels);
    const int bytes = k * KC + (thread_index() & (CHUNKS - 1)) * 8 < channels ? 16 : 0;   // of 0: zeros
#pragma unroll
    for (int i = 0; i < SWEEPS; ++i) {
      const uint32_t to = half_of(to_x[i / 2], i & 1);
      if (to != NOWHERE) cp_async(tile + to, bytes ? x + i * ROWS * channels + k * KC : p.x, bytes);
    }
  }
  DEVICE void load_f(const Params<T>& p, uint32_t tiles, int k, int pass) const {
    const int first = first_tile(p, pass) * 64, after = first_tile(p, pass + 1) * 64;
    const int end = after < p.channels ? after : p.channels;
    constexpr int APART = TRANSPOSED ? 16 : ROWS;
    const int from = f + (TRANSPOSED ? k * KC * p.fuse_stride + first : first * p.fuse_stride + k * KC);
    const int tid = thread_index(), row = row_of_f(tid) + (TRANSPOSED ? k * KC : first);
    const int column = column_of_f(tid) + (TRANSPOSED ? first : k * KC);
#pragma unroll
    for (int branch = 0; branch < 3; ++branch)
#pragma unroll
      for (int i = 0; i < KC / 16; ++i) {
        const bool real = row + i * APART < (TRANSPOSED ? p.channels : end) && column < (TRANSPOSED ? end : p.channels);
        cp_async(tiles + to_f + branch * S::F_BYTES + i * APART * (TRANSPOSED ? 128 : KC * 2),
                 p.fuse + (real ? from + branch * p.fuse_stride_branch + i * APART * p.fuse_stride : 0), real ? 16 : 0);
      }
  }
};

// [64 channels x N pixels] of a warpgroup to y: 16 pixels at a time through 512 bytes of the warp's own; a bias map
// comes the same way in the opposite direction.
template <int N, class T>
DEVICE void store(const Params<T>& p, const Pixels& pixels, uint32_t stage, float (&acc)[N / 2], int first_channel,
                  int warp, int lane) {
  const int channel = first_channel + (warp & 3) * 16;
  const int places = p.height * p.width, first_place = int(pixels.first % places);
  T* const y = p.y + pixels.first * p.channels;
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int c = channel + (lane >> 2) + 8 * i;
    bias[i] = p.bias && c < p.channels ? to_float(p.bias[c]) : 0.f;
  }
  const int matrix_row = (lane & 7) + 8 * (lane >> 4), px = lane >> 1, mine = channel + (lane & 1) * 8;
  const uint32_t as_matrix = stage + matrix_row * 32 + ((((lane >> 3) & 1) ^ ((matrix_row >> 2) & 1)) << 4);
  const uint32_t as_row = stage + px * 32 + (((lane & 1) ^ ((px >> 2) & 1)) << 4);
#pragma unroll
  for (int n = 0; n < N; n += 16) {
    const bool real = n + px < pixels.count && mine < p.channels;
    const int pixel = pixel_of(p, n + px);
    uint32_t b[4] = {0, 0, 0, 0}, out[4];
    if (p.bias_map) {
      // where there is no pixel, 8 numbers that are there
      load_16(as_row, real ? p.bias_map + (first_place + pixel) % places * p.channels + mine : p.bias_map);
      __syncwarp();
      ldmatrix_x4_trans(b, as_matrix);
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {          // 8 pixels x 8 channels each
      const int j = 2 * n + 2 * i < N * 2 ? n / 2 + (i >> 1) * 4 + (i & 1) * 2 : 0;
      const float c0 = acc[j] + bias[i & 1] + low<T>(b[i]), c1 = acc[j + 1] + bias[i & 1] + high<T>(b[i]);
      out[i] = n + (i >> 1) * 8 < N ? pack<T>(c0, c1) : 0;
    }
    stmatrix_x4_trans(as_matrix, out);
    __syncwarp();
    if (real) store_16(y + pixel * p.channels + mine, as_row);
    __syncwarp();
  }
}

template <class S, class T, bool TRANSPOSED>
DEVICE void block(const Params<T>& p) {
  extern __shared__ uint8_t raw[];
  const uint32_t smem = (uint32_t(__cvta_generic_to_shared(raw)) + 1023) & ~1023u;
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(0xffffffffu, tid >> 5, 0), warpgroup = warp >> 2;
  const int steps_k = (p.channels + S::KC - 1) / S::KC, first_pass = blockIdx.y;
  const Mixer<S, T> mix(p, blockIdx.x, warp, lane);
  const Loader<S, T, TRANSPOSED> loader(p, blockIdx.x, tid);
  for (int i = tid * 16; i < S::OFF_F; i += THREADS * 16) zero_16(smem + i);   // what no pixel is copied to stays zero
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
    if (++at_k == steps_k) { at_k = 0; at_pass += p.passes_step; }
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
#pragma unroll
    for (int i = 0; i < S::N / 2; ++i) acc[i] = 0.f;
    for (int k = 0; k < steps_k; ++k) {
      if (active) {
        wgmma_arrive();
        const uint32_t f = smem + S::OFF_F + f_at * 3 * S::F_BYTES + warpgroup * S::KC * 128;
        const uint32_t mixed = smem + m_at * S::M_BYTES;
        const uint32_t operand[3] = {mixed + S::OFF_H, mixed + S::OFF_W, smem + x_at * S::X_BYTES};
#pragma unroll
        for (int branch = 0; branch < 3; ++branch)
#pragma unroll
          for (int kk = 0; kk < S::KC / 16; ++kk) {
            const uint32_t a = f + branch * S::F_BYTES + kk * (TRANSPOSED ? 2048 : 32);
            wgmma<T, TRANSPOSED>(acc, TRANSPOSED ? descriptor_transposed(a) : descriptor<S::KC>(a),
                                 descriptor<S::KC>(operand[branch] + kk * 32));
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
    const uint32_t stage = smem + S::OFF_OUT + warp * 512;
    if (active) store<S::N, T>(p, S::stored(p, block_index()), stage, acc, tile * 64, warp, lane);
  }
}
