// Whole images, H and W up to 16, at most N pixels a block.
#pragma once
#include "block.cuh"

template <int N_>
struct Tile {
  static constexpr int N = N_, LOADED = N, KC = 32;
  // Eight rows that stay zero, for the positions that a line does not have. A tile of 256 has no room for more rows:
  // there, at most 248 pixels are allowed, or 256 with lines of 8 or 16.
  static constexpr int PAD = N < 256 ? N : 248;
  static constexpr int X_BYTES = (PAD + 8) * KC * 2, M_BYTES = X_BYTES, F_BYTES = ROWS_F * KC * 2;   // F: of one branch
  static constexpr int STAGES_X = N > 200 ? 3 : 4;
  static constexpr int OFF_H = STAGES_X * X_BYTES, OFF_W = OFF_H + STAGES_MIXED * M_BYTES;
  static constexpr int OFF_F = (OFF_W + STAGES_MIXED * M_BYTES + 1023) / 1024 * 1024;
  static constexpr int OFF_OUT = OFF_F + STAGES_F * 3 * F_BYTES;
  static constexpr int ROUNDS = N > 200 ? 6 : 7;   // of mixing: 3 lines of an axis each, or 3 pairs
  static_assert(OFF_OUT + WARPS * 512 + 1024 <= MAX_SHARED, "with 16 pixels x 32 bytes a warp, and alignment");

  template <class T> DEVICE static Pixels loaded(const Params<T>& p, int group) {
    const int places = p.height * p.width, left = p.batch - group * p.held;
    return {long(group) * p.held * places, (left < p.held ? left : p.held) * places};
  }
  template <class T> DEVICE static Pixels stored(const Params<T>& p, int group) { return loaded(p, group); }
  template <class T> DEVICE static int row(const Params<T>& p, int, int line, int w) { return row_of(p, line, w); }
};

// A warp always has the same axis and the same 16 of the 32 channels. Per item: a line (two where one has at most 8
// positions), read and written at the same place of X and of Xh or Xw. Positions that a line does not have are in the
// padding rows: zero in X, where nothing ever writes; of no effect in Xh and Xw.
template <int N, class T>
struct Mixer<Tile<N>, T> {
  using S = Tile<N>;
  uint32_t offset[(S::ROUNDS + 1) / 2];   // two of 16 bits each
  uint32_t proj[4], to; float bias[4];
  int left;      // items from the warp's first
  bool pairs;

  DEVICE Mixer(const Params<T>& p, int, int warp, int lane) {
    const int axis = warp & 1, half = (warp >> 1) & 1, first = warp >> 2;
    const int size = axis ? p.width : p.height, across = axis ? p.height : p.width, lines = p.held * across;
    pairs = size <= 8;
    left = (pairs ? (lines + 1) / 2 : lines) - first;
    to = axis ? S::OFF_W : S::OFF_H;
#pragma unroll
    for (int i = 0; i < S::ROUNDS; ++i) {
      const int item = 3 * i + first, line = pairs ? item * 2 + (lane >> 4) : item;
      const int position = pairs ? lane & 7 : (lane & 7) + 8 * (lane >> 4);
      const int row = axis ? row_of(p, line, position) : row_of(p, line / across * p.height + position, line % across);
      const bool there = position < size && line < lines;
      const uint32_t from = swizzled<S::KC>(there ? row : S::PAD + (row & 7), half * 2 + ((lane >> 3) & 1));
      offset[i / 2] = i & 1 ? offset[i / 2] | from << 16 : from;
    }
    load_weights<2, 2>(proj, p, axis, 0, size, lane);
    const T* const b = p.proj_bias[axis];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (lane & 3) * 2 + 8 * (i >> 1) + (i & 1);
      bias[i] = b && at < size ? to_float(b[at]) : 0.f;
    }
  }
  DEVICE void operator()(uint32_t x, uint32_t mixed) const {
#pragma unroll
    for (int i = 0; i < S::ROUNDS; ++i) {
      if (3 * i >= left) break;
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
      store_mixed<T>(mixed + to + at, c);
    }
  }
};
