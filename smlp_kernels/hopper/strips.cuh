// Images of up to 32x32 in strips: a block owns at most 8 whole lines of one image, at most 200 pixels, and reads all
// of the image's x, 16 channels at a time: Xh needs every line, and 7 outputs of 28 lines cost as many matrix
// instructions as a quarter of the columns would that other blocks had to send back.
#pragma once
#include "block.cuh"

struct Strip {
  static constexpr int N = 200, LOADED = 1024, KC = 16;
  static constexpr int PAD = N, OTHERS = N + 8;   // eight rows that stay zero; then the lines of the other strips
  static constexpr int X_BYTES = (OTHERS + LOADED) * KC * 2, M_BYTES = OTHERS * KC * 2, F_BYTES = ROWS_F * KC * 2;
  static constexpr int STAGES_X = 3;
  static constexpr int OFF_H = STAGES_X * X_BYTES, OFF_W = OFF_H + STAGES_MIXED * M_BYTES;
  static constexpr int OFF_F = (OFF_W + STAGES_MIXED * M_BYTES + 1023) / 1024 * 1024;
  static constexpr int OFF_OUT = OFF_F + STAGES_F * 3 * F_BYTES;
  static constexpr int WARPS_H = 7, ROUNDS_H = 5, WARPS_W = 5, ROUNDS_W = 2;
  static_assert(OFF_OUT + WARPS * 512 + 1024 <= MAX_SHARED, "with 16 pixels x 32 bytes a warp, and alignment");

  struct Lines { int image, first, count; };
  template <class T> DEVICE static Lines lines(const Params<T>& p, int group) {
    const int strips = (p.height + p.held - 1) / p.held, first = group % strips * p.held;
    return {group / strips, first, p.height - first < p.held ? p.height - first : p.held};
  }
  template <class T> DEVICE static Pixels loaded(const Params<T>& p, int group) {
    return {long(lines(p, group).image) * p.height * p.width, p.height * p.width};
  }
  template <class T> DEVICE static Pixels stored(const Params<T>& p, int group) {
    const Lines at = lines(p, group);
    return {(long(at.image) * p.height + at.first) * p.width, at.count * p.width};
  }
  template <class T> DEVICE static int row(const Params<T>& p, int group, int line, int w) {
    // The other lines keep the order of banks that the strip's lines have: by their distance to them, and (width 4 n)
    // an even one.
    const Lines at = lines(p, group);
    const int own = line - at.first, odd = p.flip_shift ? 1 : 0, before = -at.first & odd;
    if (own >= 0 && own < at.count) return row_of(p, own, w);
    const int other = own < 0 ? line + before : line - at.count + before + (at.count & odd);
    return OTHERS + other * p.width + flipped(p, own, w);
  }
};

// Warps 0 to 6 mix columns into Xh (the strip's lines only), warps 7 to 11 the strip's lines into Xw. Columns have
// more rounds and fewer weights: their places from round 2 on are in proj.
template <class T>
struct Mixer<Strip, T> {
  using S = Strip;
  uint32_t from[2], to[2];   // two of 16 bits each: of positions 0-15 and 16-31, to: of columns those of two rounds
  uint32_t proj[16], bias[4];
  int left; bool along_w;

  DEVICE Mixer(const Params<T>& p, int group, int warp, int lane) {
    along_w = warp >= S::WARPS_H;
    const S::Lines at = S::lines(p, group);
    const int each = along_w ? S::WARPS_W : S::WARPS_H, first = along_w ? warp - S::WARPS_H : warp;
    const int items = along_w ? at.count : p.width, size = along_w ? p.width : p.height;
    left = items - first;
    const int axis = along_w, shift = along_w ? 0 : at.first;
    load_weights<4, 4>(proj, p, axis, shift, size, lane);
    const T* const b = p.proj_bias[axis];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
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
        const int row = S::row(p, group, line, w);
        f[e] = swizzled<S::KC>(q < size && item < items ? row : S::PAD + (row & 7), chunk);
        // Xw goes to where X is; Xh of the strip's line q (q < 8) to where that line is
        const int own = along_w ? item : lane & 7, mixed = row_of(p, own, w);
        const bool there = item < items && (along_w ? q < size : own < at.count);
        t[e] = swizzled<S::KC>(there ? mixed : S::PAD + (mixed & 7), chunk);
      }
      if (i < 2) from[i] = f[0] | f[1] << 16;
      else if (!along_w) proj[2 + i] = f[0] | f[1] << 16;
      if (along_w) { if (i < 2) to[i] = t[0] | t[1] << 16; }
      else if (i == 4) proj[7] = t[0];
      else to[i / 2] = i & 1 ? to[i / 2] | t[0] << 16 : t[0];
    }
  }
  DEVICE void operator()(uint32_t x, uint32_t mixed) const {
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
        const uint32_t to_line = half_of(i == 4 ? proj[7] : to[i / 2], i & 1);
        stmatrix_x2_trans(mixed + S::OFF_H + to_line, pack<T>(c[0], c[1]), pack<T>(c[2], c[3]));
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
          store_mixed<T>(mixed + S::OFF_W + half_of(to[i], e), c);
        }
      }
    }
  }
};
