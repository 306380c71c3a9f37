// As resident.cuh, for images of up to 32x32 in strips: a thread block owns `images` (here: rows of a strip, at most 8) whole
// lines of one image, at most 200 pixels, and reads all of the image's x from L2, 16 channels at a time: Xh needs every line, and 7
// outputs of 28 lines cost as many matrix instructions as a quarter of the columns would that other blocks had to send back.
#pragma once
#include "resident.cuh"

struct Strip {
  static constexpr int N = 200, KC = 16;          // rows of 32 bytes, 32-byte swizzle
  static constexpr int PAD = N, OTHERS = N + 8;   // eight rows that stay zero; then the lines of the other strips
  static constexpr int X_BYTES = (OTHERS + 1024) * 32, M_BYTES = OTHERS * 32, F_BYTES = ROWS_F * 32;
  static constexpr int X_STAGES = 3, F_STAGES = 3;
  static constexpr int OFF_H = X_STAGES * X_BYTES, OFF_W = OFF_H + 2 * M_BYTES;
  static constexpr int OFF_F = (OFF_W + 2 * M_BYTES + 1023) / 1024 * 1024;
  static constexpr int OFF_OUT = OFF_F + F_STAGES * 3 * F_BYTES;
  static constexpr int SMEM = OFF_OUT + WARPS * 512 + 1024;
  static constexpr int SWEEPS = 6;                // 192 pixels each
  static constexpr int WARPS_H = 7, ROUNDS_H = 5, WARPS_W = 5, ROUNDS_W = 2;
  static_assert(SMEM <= 232448, "shared memory of an SM");
};

__device__ __forceinline__ uint32_t swizzled_32(int row, int chunk) { return row * 32 + ((chunk ^ ((row >> 2) & 1)) << 4); }
__device__ __forceinline__ uint64_t descriptor_32(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(256 >> 4) << 32 | uint64_t(3) << 62;
}

struct Where { int image, first, rows; };   // lines first .. first + rows - 1 of an image
template <class T>
__device__ __forceinline__ Where where(const Params<T>& p, int block) {
  const int strips = (p.height + p.images - 1) / p.images, first = block % strips * p.images;
  return {block / strips, first, p.height - first < p.images ? p.height - first : p.images};
}

template <class T>
__device__ __forceinline__ int strip_row(const Params<T>& p, const Where& at, int line, int w) {
  // The other lines keep the order of banks that the strip's lines have: by their distance to them, and (width 4 n) an even one.
  const int own = line - at.first, odd = p.flip_shift ? 1 : 0, before = -at.first & odd;
  if (own >= 0 && own < at.rows) return row_of(p, own, w);
  return Strip::OTHERS + (own < 0 ? line + before : line - at.rows + before + (at.rows & odd)) * p.width + (w ^ ((own >> p.flip_shift) & p.flip_mask));
}

template <class T, bool TRANSPOSED>
struct StripLoader {
  const T* x; const T* f;
  uint32_t to_x[Strip::SWEEPS / 2], to_f;   // two of 16 bits each

  __device__ __forceinline__ StripLoader(const Params<T>& p, const Where& at, int tid) {
    const int pixel = tid >> 1, places = p.height * p.width;
    x = p.x + (long(at.image) * places + pixel) * p.channels + (tid & 1) * 8;
#pragma unroll
    for (int i = 0; i < Strip::SWEEPS; ++i) {
      const int q = pixel + i * 192 < places ? pixel + i * 192 : 0, line = q * p.reciprocal >> 16;
      const uint32_t to = swizzled_32(strip_row(p, at, line, q - line * p.width), tid & 1);
      to_x[i / 2] = i & 1 ? to_x[i / 2] | to << 16 : to;
    }
    const int row_f = TRANSPOSED ? tid / 24 : tid >> 1;
    const int column_f = (TRANSPOSED ? tid % 24 : tid & 1) * 8;
    f = p.fuse + row_f * p.fuse_stride + column_f;
    to_f = TRANSPOSED ? (column_f >> 6) * 2048 + row_f * 128 + ((((column_f >> 3) & 7) ^ (row_f & 7)) << 4) : swizzled_32(row_f, tid & 1);
  }
  __device__ __forceinline__ void load_x(const Params<T>& p, uint32_t tile, int k) const {
    const int tid = thread_index(), left = p.height * p.width - (tid >> 1), bytes = k * Strip::KC + (tid & 1) * 8 < p.channels ? 16 : 0;
#pragma unroll
    for (int i = 0; i < Strip::SWEEPS; ++i)
      if (i * 192 < left) cp_async(tile + half_of(to_x[i / 2], i & 1), bytes ? x + i * 192 * p.channels + k * Strip::KC : p.x, bytes);
  }
  __device__ __forceinline__ void load_f(const Params<T>& p, uint32_t tiles, int k, int pass) const {
    const int first_channel = first_tile(p, pass) * 64, after = first_tile(p, pass + 1) * 64, end = after < p.channels ? after : p.channels;
    const int tid = thread_index(), row_f = TRANSPOSED ? tid / 24 : tid >> 1, column_f = (TRANSPOSED ? tid % 24 : tid & 1) * 8;
    const T* from = f + (TRANSPOSED ? k * Strip::KC * p.fuse_stride + first_channel : first_channel * p.fuse_stride + k * Strip::KC);
    const int row = row_f + (TRANSPOSED ? k * Strip::KC : first_channel), column = column_f + (TRANSPOSED ? first_channel : k * Strip::KC);
    const int bytes = row < (TRANSPOSED ? p.channels : end) && column < (TRANSPOSED ? end : p.channels) ? 16 : 0;
#pragma unroll
    for (int branch = 0; branch < 3; ++branch)
      cp_async(tiles + to_f + branch * Strip::F_BYTES, bytes ? from + branch * p.fuse_stride_branch : p.fuse, bytes);
  }
};

// Warps 0 to 6 mix columns into Xh (the strip's lines only), warps 7 to 11 the strip's lines into Xw. Columns have more rounds and
// fewer weights: their places from round 2 on are in proj.
template <class T>
struct StripMixer {
  using S = Strip;
  uint32_t from[2], to[2];   // two of 16 bits each: of positions 0-15 and 16-31, to: of columns those of two rounds
  uint32_t proj[16], bias[4];
  int left; bool along_w;

  __device__ __forceinline__ StripMixer(const Params<T>& p, const Where& at, int warp, int lane) {
    along_w = warp >= S::WARPS_H;
    const int each = along_w ? S::WARPS_W : S::WARPS_H, first = along_w ? warp - S::WARPS_H : warp, items = along_w ? at.rows : p.width, size = along_w ? p.width : p.height;
    left = items - first;
    const int axis = along_w, shift = along_w ? 0 : at.first;
    const T* const w = p.proj[axis]; const T* const b = p.proj_bias[axis];
#pragma unroll
    for (int j = 0; j < 4; ++j) {     // 8 outputs each
      const int out = shift + j * 8 + (lane >> 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {   // 8 inputs each
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int in = i * 8 + (lane & 3) * 2 + e;
          v[e] = out < size && in < size ? to_float(w[out * p.proj_stride_out[axis] + in * p.proj_stride_in[axis]]) : 0.f;
        }
        proj[4 * j + i] = pack<T>(v[0], v[1]);
      }
      const int o = shift + j * 8 + (lane & 3) * 2;
      bias[j] = pack<T>(b && o < size ? to_float(b[o]) : 0.f, b && o + 1 < size ? to_float(b[o + 1]) : 0.f);
    }
    const int position = (lane & 7) + 8 * (lane >> 4), chunk = (lane >> 3) & 1;
#pragma unroll
    for (int i = 0; i < S::ROUNDS_H; ++i) {
      const int item = first + each * i;
      uint32_t f[2], t[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int q = position + 16 * e, line = along_w ? at.first + item : q, w = along_w ? q : item;
        const bool real = q < size && item < items;
        f[e] = swizzled_32(real ? strip_row(p, at, line, w) : S::PAD + (strip_row(p, at, line, w) & 7), chunk);
        // Xw goes to where X is; Xh of the strip's line q (q < 8) to where that line is
        const int own = along_w ? item : lane & 7;
        const bool there = item < items && (along_w ? q < size : own < at.rows);
        t[e] = swizzled_32(there ? row_of(p, own, w) : S::PAD + (row_of(p, own, w) & 7), chunk);
      }
      if (i < 2) from[i] = f[0] | f[1] << 16;
      else if (!along_w) proj[2 + i] = f[0] | f[1] << 16;
      if (along_w) { if (i < 2) to[i] = t[0] | t[1] << 16; }
      else if (i == 4) proj[7] = t[0];
      else to[i / 2] = i & 1 ? to[i / 2] | t[0] << 16 : t[0];
    }
  }
  __device__ __forceinline__ void operator()(uint32_t x, uint32_t smem, int m) const {
    uint32_t a[2][4];
    if (!along_w) {
#pragma unroll
      for (int i = 0; i < S::ROUNDS_H; ++i) {
        if (S::WARPS_H * i >= left) break;
        const uint32_t at = i < 2 ? from[i] : proj[2 + i];
        float c[4];
        ldmatrix_x4_trans(a[0], x + half_of(at, 0));
        ldmatrix_x4_trans(a[1], x + half_of(at, 1));
        mma_k16<T>(c, a[0], proj[0], proj[1], low<T>(bias[0]), high<T>(bias[0]));
        mma_k16_add<T>(c, a[1], proj[2], proj[3]);
        stmatrix_x2_trans(smem + S::OFF_H + m * S::M_BYTES + half_of(i == 4 ? proj[7] : to[i / 2], i & 1), pack<T>(c[0], c[1]), pack<T>(c[2], c[3]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < S::ROUNDS_W; ++i) {
        if (S::WARPS_W * i >= left) break;
        ldmatrix_x4_trans(a[0], x + half_of(from[i], 0));
        ldmatrix_x4_trans(a[1], x + half_of(from[i], 1));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float c[2][4];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int q = 8 * e + 4 * j;
            mma_k16<T>(c[j], a[0], proj[q], proj[q + 1], low<T>(bias[2 * e + j]), high<T>(bias[2 * e + j]));
            mma_k16_add<T>(c[j], a[1], proj[q + 2], proj[q + 3]);
          }
          const uint32_t out[4] = {pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]), pack<T>(c[1][0], c[1][1]), pack<T>(c[1][2], c[1][3])};
          stmatrix_x4_trans(smem + S::OFF_W + m * S::M_BYTES + half_of(to[i], e), out);
        }
      }
    }
  }
};

template <class T, bool TRANSPOSED>
__device__ __forceinline__ void strips_body(const Params<T>& p, uint32_t smem, int tid, int group, int block_y) {
  using S = Strip;
  const int lane = tid & 31, warp = broadcast_first(tid >> 5), warpgroup = warp >> 2;
  const int steps_k = (p.channels + S::KC - 1) / S::KC;
  const int my_passes = (p.passes - block_y + p.passes_step - 1) / p.passes_step, steps = my_passes * steps_k;
  const StripMixer<T> mix(p, where(p, group), warp, lane);
  const StripLoader<T, TRANSPOSED> loader(p, where(p, group), tid);
  zero_fill(smem, S::OFF_F, tid);
  block_sync();
  int step = 0, at_k = 0, at_pass = block_y;
  auto load = [&](int to) {   // x and F of a step, a group each
    const bool more = step++ < steps;
    if (more) loader.load_x(p, smem + to * S::X_BYTES, at_k);
    cp_async_commit();
    if (more) loader.load_f(p, smem + S::OFF_F + to * 3 * S::F_BYTES, at_k, at_pass);
    cp_async_commit();
    if (++at_k == steps_k) { at_k = 0; at_pass += p.passes_step; }
  };
  load(0); load(1);
  cp_async_wait<2>();
  block_sync();
  mix(smem, smem, 0);
  fence_async();
  block_sync();

  float acc[S::N / 2];
  int stage = 0, m_at = 0;
  for (int pass = block_y; pass < p.passes; pass += p.passes_step) {
    const int tile = first_tile(p, pass) + warpgroup;
    const bool active = tile < first_tile(p, pass + 1);
#pragma unroll
    for (int i = 0; i < S::N / 2; ++i) acc[i] = 0.f;
    for (int k = 0; k < steps_k; ++k) {
      if (active) {
        wgmma_arrive();
        const uint32_t f = smem + S::OFF_F + stage * 3 * S::F_BYTES + warpgroup * 2048;
        const uint32_t b[3] = {smem + S::OFF_H + m_at * S::M_BYTES, smem + S::OFF_W + m_at * S::M_BYTES, smem + stage * S::X_BYTES};
#pragma unroll
        for (int branch = 0; branch < 3; ++branch)
          wgmma<T, TRANSPOSED>(acc, TRANSPOSED ? descriptor_transposed(f + branch * S::F_BYTES) : descriptor_32(f + branch * S::F_BYTES), descriptor_32(b[branch]));
        wgmma_commit();
      }
      wgmma_wait_but_last();
      cp_async_wait<1>();   // x of the next step
      block_sync();
      load(stage == 0 ? 2 : stage - 1);
      stage = stage == 2 ? 0 : stage + 1;
      m_at ^= 1;
      mix(smem + stage * S::X_BYTES, smem, m_at);
      cp_async_wait<2>();   // F of the next step
      fence_async();
      block_sync();
    }
    wgmma_wait(acc);
    const Where at = where(p, block_index());
    if (active) store<T, S::N>(p, (long(at.image) * p.height + at.first) * p.width, at.rows * p.width, smem + S::OFF_OUT + warp * 512, acc, tile * 64, warp, lane);
  }
}
