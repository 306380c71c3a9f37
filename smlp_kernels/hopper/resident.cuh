// The sMLP block for small images (H, W <= 16) on Hopper, in one launch and without scratch memory:
//   y = Fh (Ph x + bh) + Fw (x Pw' + bw) + Fi x + bias,    F = [Fh | Fw | Fi],
// and its input gradient, the same with Ph', Pw' (strides) and Fh', Fw', Fi' (template argument TRANSPOSED: F stays as it is).
//
// One thread block owns `images` whole images (at most N pixels) and walks the output channels in passes of up to 3 x 64.
// Channels are the rows and pixels the columns of the channel product, wgmma m64 n N k16, so that F and x are operands as they
// lie in memory. Per step of 32 input channels:
//   - three warpgroups issue 6 asynchronous wgmma each on the step's Xh, Xw, X and F, and wait for those of the step before,
//   - meanwhile all 12 warps mix the next step's X into Xh and Xw (mma.sync, ldmatrix/stmatrix.trans, no transposes),
//   - and cp.async brings x and F of the step after next from L2.
// x and y are [B, H, W, C] dense, C a multiple of 8. Channels beyond C are zeros in shared memory and are not stored.
#pragma once
#include <cstdint>
#include "instructions.cuh"

constexpr int THREADS = 384, WARPS = 12;
constexpr int KC = 32;           // input channels a step: rows of 64 bytes in shared memory, 64-byte swizzle
constexpr int ROWS_F = 192;      // output channels a pass
constexpr int F_BYTES = ROWS_F * KC * 2;   // of one branch

template <int N_>
struct Tile {
  static constexpr int N = N_;
  // Eight rows that stay zero, for the positions that a line does not have. A tile of 256 has no room for more rows: there,
  // at most 248 pixels are allowed, or 256 with lines of 8 or 16.
  static constexpr int PAD = N < 256 ? N : 248;
  static constexpr int X_BYTES = (PAD + 8) * KC * 2;
  static constexpr int X_STAGES = N > 200 ? 3 : 4, F_STAGES = 3, MIXED_STAGES = 2;
  static constexpr int OFF_X = 0;
  static constexpr int OFF_H = OFF_X + X_STAGES * X_BYTES;
  static constexpr int OFF_W = OFF_H + MIXED_STAGES * X_BYTES;
  static constexpr int OFF_F = (OFF_W + MIXED_STAGES * X_BYTES + 1023) / 1024 * 1024;
  static constexpr int OFF_OUT = OFF_F + F_STAGES * 3 * F_BYTES;   // 12 warps x 16 pixels x 32 bytes
  static constexpr int SMEM = OFF_OUT + WARPS * 512 + 1024;        // + alignment
  static constexpr int ROUNDS = N > 200 ? 6 : 7;                   // of mixing: 3 lines of an axis each, or 3 pairs
  static_assert(SMEM <= 232448, "shared memory of an SM");
};

template <class T>
struct Params {                  // pointers first, then 32-bit integers: see PARAMETERS in plan.py
  const T* x; T* y; const T* proj[2]; const T* proj_bias[2]; const T* fuse;
  const T* bias;                 // [C], or nothing
  const T* bias_map;             // [H, W, C], or nothing
  int batch, channels, height, width, images;
  int proj_stride_out[2], proj_stride_in[2];
  int fuse_stride_branch, fuse_stride;   // the other axis of F is contiguous
  int passes, passes_step;       // a block's passes: blockIdx.y, + passes_step, ...
  int pass_tiles;                // tiles of 64 output channels a pass, times 65536, rounded up: see first_tile
  int reciprocal, flip_shift, flip_mask;   // 65536 / width + 1; 3 - z and 2^z - 1 where 2^z, at most 8, divides width: see row_of
};

// Of a pass, or of its end: the last pass ends with all tiles, since the rounding is less than 1 / 65536 a pass.
template <class T>
__device__ __forceinline__ int first_tile(const Params<T>& p, int pass) { return pass * p.pass_tiles >> 16; }

__device__ __forceinline__ uint32_t swizzled(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }

// Of a tile whose rows are contiguous along K (64-byte swizzle, groups of 8 rows 512 bytes apart) ...
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}
// ... and of one of 64 channels x K that is contiguous along the channels (128-byte swizzle, groups of 8 k 1024 bytes apart).
__device__ __forceinline__ uint64_t descriptor_transposed(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Where pixels lie in a tile: in order, but with w flipped within aligned groups of 2, 4 or 8 in some of the lines, so that both
// 8 neighbours in a line and 8 in a column lie in different banks.
template <class T>
__device__ __forceinline__ int row_of(const Params<T>& p, int line, int w) { return line * p.width + (w ^ ((line >> p.flip_shift) & p.flip_mask)); }
template <class T>
__device__ __forceinline__ int pixel_of(const Params<T>& p, int row) {   // and the way back: row is at most 287
  const int line = row * p.reciprocal >> 16, w = row - line * p.width;
  return row - w + (w ^ ((line >> p.flip_shift) & p.flip_mask));
}

// Of a block: how many pixels it has. The first is number group * images * height * width.
template <class T>
__device__ __forceinline__ int pixels_of(const Params<T>& p, int group) {
  const int left = p.batch - group * p.images;
  return (left < p.images ? left : p.images) * p.height * p.width;
}

// A thread copies 16 bytes at a time, always at the same place of a row: rows of x 96 apart, rows of F 96 (16 TRANSPOSED) apart.
template <class T, int N, bool TRANSPOSED>
struct Loader {
  static constexpr int SWEEPS = (N + 95) / 96;
  const T* x; const T* f;
  uint32_t to_x, to_f;
  int offset_x[SWEEPS], rows_x;

  __device__ __forceinline__ Loader(const Params<T>& p, int group, int tid) {
    const int row = tid >> 2, chunk = tid & 3;
    x = p.x + long(group) * p.images * p.height * p.width * p.channels + chunk * 8;
    rows_x = pixels_of(p, group) - row;
    to_x = swizzled(row, chunk);   // the swizzle repeats every 8 rows, and 96 is a multiple of that
#pragma unroll
    for (int i = 0; i < SWEEPS; ++i) offset_x[i] = pixel_of(p, row + i * 96) * p.channels;
    const int row_f = row_of_f(tid), column_f = column_of_f(tid);
    f = p.fuse + row_f * p.fuse_stride + column_f;
    to_f = TRANSPOSED ? (column_f >> 6) * 4096 + row_f * 128 + ((((column_f >> 3) & 7) ^ (row_f & 7)) << 4) : to_x;
  }
  __device__ __forceinline__ static int row_of_f(int tid) { return TRANSPOSED ? tid / 24 : tid >> 2; }                  // k, or output channel
  __device__ __forceinline__ static int column_of_f(int tid) { return (TRANSPOSED ? tid % 24 : tid & 3) * 8; }        // output channel, or k
  __device__ __forceinline__ void load_x(const Params<T>& p, uint32_t tile, int k) const {
    const int bytes = k * KC + (thread_index() & 3) * 8 < p.channels ? 16 : 0;   // of 0: zeros
#pragma unroll
    for (int i = 0; i < SWEEPS; ++i)
      if (i * 96 < rows_x) cp_async(tile + to_x + i * 96 * 64, bytes ? x + offset_x[i] + k * KC : p.x, bytes);
  }
  __device__ __forceinline__ void load_f(const Params<T>& p, uint32_t tiles, int k, int pass) const {
    const int first_channel = first_tile(p, pass) * 64, after = first_tile(p, pass + 1) * 64, end = after < p.channels ? after : p.channels;
    constexpr int APART = TRANSPOSED ? 16 : 96;
    const T* from = f + (TRANSPOSED ? k * KC * p.fuse_stride + first_channel : first_channel * p.fuse_stride + k * KC);
    const int tid = thread_index(), row = row_of_f(tid) + (TRANSPOSED ? k * KC : first_channel), column = column_of_f(tid) + (TRANSPOSED ? first_channel : k * KC);
#pragma unroll
    for (int branch = 0; branch < 3; ++branch)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int bytes = row + i * APART < (TRANSPOSED ? p.channels : end) && column < (TRANSPOSED ? end : p.channels) ? 16 : 0;
        cp_async(tiles + to_f + branch * F_BYTES + i * APART * (TRANSPOSED ? 128 : 64),
                 bytes ? from + branch * p.fuse_stride_branch + i * APART * p.fuse_stride : p.fuse, bytes);
      }
  }
};

// Xh or Xw of one step: a warp always has the same axis and the same 16 of the 32 channels. Per item: a line (two where one has
// at most 8 positions), read and written at the same place of X and of Xh or Xw. Positions that a line does not have are in the
// padding rows: zero in X, where nothing ever writes; of no effect in Xh and Xw.
template <class T, int N>
struct Mixer {
  using S = Tile<N>;
  uint32_t offset[(S::ROUNDS + 1) / 2];   // two of 16 bits each
  uint32_t proj[4], to; float bias[4];
  int left;      // items from the warp's first
  bool pairs;

  __device__ __forceinline__ Mixer(const Params<T>& p, int warp, int lane) {
    const int axis = warp & 1, half = (warp >> 1) & 1, first = warp >> 2;
    const int size = axis ? p.width : p.height, across = axis ? p.height : p.width, lines = p.images * across;
    pairs = size <= 8;
    left = (pairs ? (lines + 1) / 2 : lines) - first;
    to = axis ? S::OFF_W : S::OFF_H;
#pragma unroll
    for (int i = 0; i < S::ROUNDS; ++i) {
      const int item = 3 * i + first, line = pairs ? item * 2 + (lane >> 4) : item;
      const int position = pairs ? lane & 7 : (lane & 7) + 8 * (lane >> 4);
      const int row = axis ? row_of(p, line, position) : row_of(p, line / across * p.height + position, line % across);
      const uint32_t from = swizzled(position < size && line < lines ? row : S::PAD + (row & 7), half * 2 + ((lane >> 3) & 1));
      offset[i / 2] = i & 1 ? offset[i / 2] | from << 16 : from;
    }
    const T* const w = p.proj[axis]; const T* const b = p.proj_bias[axis];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int out = (lane >> 2) + 8 * j, in = (lane & 3) * 2 + 8 * i + e;
          v[e] = out < size && in < size ? to_float(w[out * p.proj_stride_out[axis] + in * p.proj_stride_in[axis]]) : 0.f;
        }
        proj[2 * j + i] = pack<T>(v[0], v[1]);
        const int at = (lane & 3) * 2 + 8 * j + i;
        bias[2 * j + i] = b && at < size ? to_float(b[at]) : 0.f;
      }
    }
  }
  __device__ __forceinline__ void operator()(uint32_t x, uint32_t mixed) const {
#pragma unroll
    for (int i = 0; i < S::ROUNDS; ++i) {
      if (3 * i < left) {
        const uint32_t at = half_of(offset[i / 2], i & 1);
        uint32_t a[4]; float c[2][4];
        ldmatrix_x4_trans(a, x + at);
        if (pairs) {
          mma_k8<T>(c[0], a[0], a[1], proj[0], bias[0], bias[1]);
          mma_k8<T>(c[1], a[2], a[3], proj[0], bias[0], bias[1]);
        } else {
          mma_k16<T>(c[0], a, proj[0], proj[1], bias[0], bias[1]);
          mma_k16<T>(c[1], a, proj[2], proj[3], bias[2], bias[3]);
        }
        const uint32_t out[4] = {pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]), pack<T>(c[1][0], c[1][1]), pack<T>(c[1][2], c[1][3])};
        stmatrix_x4_trans(mixed + to + at, out);
      }
    }
  }
};

// [64 channels x N pixels] of a warpgroup to y: 16 pixels at a time through 512 bytes of the warp's own; a bias map comes the
// same way in the opposite direction.
template <class T, int N>
__device__ __forceinline__ void store(const Params<T>& p, long first, int pixels, uint32_t stage, float (&acc)[N / 2], int first_channel, int warp, int lane) {
  const int channel = first_channel + (warp & 3) * 16, places = p.height * p.width, first_place = int(first % places);
  T* const y = p.y + first * p.channels;
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
    const bool real = n + px < pixels && mine < p.channels;
    const int pixel = pixel_of(p, n + px);
    uint32_t b[4] = {0, 0, 0, 0}, out[4];
    if (p.bias_map) {
      load_16(as_row, real ? p.bias_map + (first_place + pixel) % places * p.channels + mine : p.bias_map);   // 8 numbers that are there
      warp_sync();
      ldmatrix_x4_trans(b, as_matrix);
      warp_sync();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {    // 8 pixels x 8 channels each
      const int j = 2 * n + 2 * i < N * 2 ? n / 2 + (i >> 1) * 4 + (i & 1) * 2 : 0;
      out[i] = n + (i >> 1) * 8 < N ? pack<T>(acc[j] + bias[i & 1] + low<T>(b[i]), acc[j + 1] + bias[i & 1] + high<T>(b[i])) : 0;
    }
    stmatrix_x4_trans(as_matrix, out);
    warp_sync();
    if (real) store_16(y + pixel * p.channels + mine, as_row);
    warp_sync();
  }
}

template <class T, int N, bool TRANSPOSED>
__device__ __forceinline__ void resident_body(const Params<T>& p, uint32_t smem, int tid, int group, int block_y) {
  using S = Tile<N>;
  const int lane = tid & 31, warp = broadcast_first(tid >> 5), warpgroup = warp >> 2;
  const int steps_k = (p.channels + KC - 1) / KC;
  const int my_passes = (p.passes - block_y + p.passes_step - 1) / p.passes_step, steps = my_passes * steps_k;
  const Mixer<T, N> mix(p, warp, lane);
  const Loader<T, N, TRANSPOSED> loader(p, group, tid);
  zero_fill(smem, S::OFF_F, tid);   // padding rows of X, and its rows beyond the last image, stay zero
  block_sync();
  // x of step s + X_STAGES - 1 and F of step s + 2 are asked for in step s: a group each, empty at the end. The order of the
  // groups lets the next step's x be waited for while its F is on the way.
  constexpr bool FAR = S::X_STAGES == 4;
  int x_step = 0, x_k = 0, f_step = 0, f_k = 0, f_pass = block_y, f_stage = 0, x_stage = 0;
  auto load_x = [&]() {
    if (x_step < steps) {
      loader.load_x(p, smem + S::OFF_X + x_stage * S::X_BYTES, x_k);
      ++x_step;
      x_stage = x_stage + 1 == S::X_STAGES ? 0 : x_stage + 1;
      if (++x_k == steps_k) x_k = 0;
    }
    cp_async_commit();
  };
  auto load_f = [&]() {
    if (f_step < steps) {
      loader.load_f(p, smem + S::OFF_F + f_stage * 3 * F_BYTES, f_k, f_pass);
      ++f_step;
      f_stage = f_stage == 2 ? 0 : f_stage + 1;
      if (++f_k == steps_k) { f_k = 0; f_pass += p.passes_step; }
    }
    cp_async_commit();
  };
  load_x(); load_f();
  load_x(); load_f();
  if (FAR) load_x();
  cp_async_wait<FAR ? 3 : 2>();     // x and F of step 0
  block_sync();
  mix(smem + S::OFF_X, smem);
  fence_async();
  block_sync();

  float acc[N / 2];
  int f_at = 0, x_at = 0, m_at = 0; // stages of this step
  for (int pass = block_y; pass < p.passes; pass += p.passes_step) {
    const int tile = first_tile(p, pass) + warpgroup;
    const bool active = tile < first_tile(p, pass + 1);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
    for (int k = 0; k < steps_k; ++k) {
      if (active) {
        wgmma_arrive();
        const uint32_t f = smem + S::OFF_F + f_at * 3 * F_BYTES + warpgroup * 4096;
        const uint32_t h = smem + S::OFF_H + m_at * S::X_BYTES, w = smem + S::OFF_W + m_at * S::X_BYTES;
        const uint32_t x = smem + S::OFF_X + x_at * S::X_BYTES;
#pragma unroll
        for (int branch = 0; branch < 3; ++branch)
#pragma unroll
          for (int kk = 0; kk < KC / 16; ++kk)
            wgmma<T, TRANSPOSED>(acc, TRANSPOSED ? descriptor_transposed(f + branch * F_BYTES + kk * 2048) : descriptor(f + branch * F_BYTES + kk * 32),
                                 descriptor((branch == 0 ? h : branch == 1 ? w : x) + kk * 32));
        wgmma_commit();
      }
      wgmma_wait_but_last();        // the step before is through: its buffers are free, once all warps are here
      cp_async_wait<FAR ? 2 : 1>(); // x of the next step
      block_sync();
      if (FAR) { load_f(); load_x(); } else { load_x(); load_f(); }
      f_at = f_at == 2 ? 0 : f_at + 1;
      x_at = x_at + 1 == S::X_STAGES ? 0 : x_at + 1;
      m_at ^= 1;
      mix(smem + S::OFF_X + x_at * S::X_BYTES, smem + m_at * S::X_BYTES);   // after the last step: of old numbers, for nothing
      cp_async_wait<FAR ? 3 : 2>(); // F of the next step
      fence_async();
      block_sync();
    }
    wgmma_wait(acc);
    if (active) store<T, N>(p, long(group) * p.images * p.height * p.width, pixels_of(p, group), smem + S::OFF_OUT + warp * 512, acc, tile * 64, warp, lane);
  }
}
