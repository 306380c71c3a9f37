// Xh and Xw of a step from its X, by mma.sync.
#pragma once
#include "layout.cuh"
#include "products.cuh"

// The weights of an axis as operands B, from output `first` on: 8 outputs a row, 8 inputs a number.
template <int COUNT, class T>
struct Weights {
  uint32_t proj[COUNT][COUNT];
  float bias[COUNT][2];

  DEVICE void load(Axis<T> axis, int first, int lane) {
    for (int j = 0; j < COUNT; ++j)
      for (int i = 0; i < COUNT; ++i) {
        float v[2];
        for (int e = 0; e < 2; ++e) {
          const int out = first + j * 8 + (lane >> 2), in = i * 8 + (lane & 3) * 2 + e;
          const bool there = out < axis.size && in < axis.size;
          v[e] = there ? to_float(axis.proj[out * axis.stride_out + in * axis.stride_in]) : 0.f;
          if (i == 0) bias[j][e] = bias_of(axis.bias, first + j * 8 + in, axis.size);
        }
        proj[j][i] = pack<T>(v[0], v[1]);
      }
  }
  // 8 outputs of 16 channels, from all of a line's positions
  DEVICE void mix(float (&c)[4], const uint32_t (&a)[COUNT / 2][4], int j) const {
    mma_k16<T>(c, a[0], proj[j][0], proj[j][1], bias[j][0], bias[j][1]);
    for (int i = 1; i < COUNT / 2; ++i) mma_k16_add<T>(c, a[i], proj[j][2 * i], proj[j][2 * i + 1]);
  }
};

// A warp always has the same axis and 16 channels. Per item: a line of that axis (two where one has at most 8
// positions), read and written at the same place of X and of Xh or Xw. Positions that a line does not have are in the
// rows of zeros: zero in X, where nothing ever writes; of no effect in Xh and Xw. Of whole images, three warps share an
// axis and half of the 32 channels. Of STRIPS, warps 8 to 11 mix the strip's lines into Xw, and warps 0 to 7 columns
// into Xh, the strip's part of them only. A warp's columns lie 8 rows apart, as far as any rows of zeros for them.
template <class S, class T>
struct Mixer {
  static constexpr int PIECES = S::STRIPS ? 2 : 1;   // of 16 positions of a line
  static constexpr int APART = S::STRIPS ? 4 : 3, ROUNDS = S::STRIPS ? 2 : S::N == 200 ? 7 : 6;
  static constexpr int WARPS_H = 8, ROUNDS_H = 4;
  Halves<ROUNDS * PIECES> at;   // of columns of strips: both pieces, then where the strip's part goes
  Weights<2 * PIECES, T> weights;
  uint32_t to;
  int left;                     // items from the warp's first
  bool pairs;

  DEVICE Mixer(const Params<T>& p, const Lines& lines, int warp, int lane) {
    const bool along_w = S::STRIPS ? warp >= WARPS_H : warp & 1, columns = S::STRIPS && !along_w;
    const int half = S::STRIPS ? 0 : (warp >> 1) & 1, first = S::STRIPS ? warp & 7 : warp >> 2;
    const Axis<T> axis = along_w ? p.w : p.h;
    const int count = columns ? p.width : along_w ? lines.own_count : lines.own_count / p.height * p.width;
    pairs = !S::STRIPS && axis.size <= 8;
    left = (pairs ? (count + 1) / 2 : count) - first;
    to = along_w ? S::OFF_W : S::OFF_H;
    weights.load(axis, columns ? lines.own : 0, lane);
    for (int i = 0; i < ROUNDS * PIECES; ++i) {
      const bool part = columns && i > 1;
      const int item = first + (columns ? 0 : APART * (i / PIECES)), n = pairs ? 2 * item + (lane >> 4) : item;
      const int position = (lane & 7) + (pairs || part ? 0 : 8 * (lane >> 4) + 16 * (i % PIECES));
      const int line = along_w ? lines.own + n : n / p.width * p.height + (part ? lines.own : 0) + position;
      const int row = row_of<S>(p, lines, line, along_w ? position : n % p.width);
      const bool there = n < count && position < (part ? lines.own_count : axis.size);
      at.set(i, swizzled<S::KC * 2>(there ? row : S::PAD + (row & 7), half * 2 + ((lane >> 3) & 1)));
    }
  }
  DEVICE void operator()(uint32_t x, uint32_t mixed) const {
    uint32_t a[PIECES][4], out[4]; float c[4];
    if (S::STRIPS && thread_index() < WARPS_H * 32) {
      for (int i = 0; i < ROUNDS_H; ++i) {
        if (WARPS_H * i >= left) break;
        const uint32_t column = WARPS_H * i * S::KC * 2;
        for (int k = 0; k < PIECES; ++k) ldmatrix_x4_trans(a[k], x + column + at[k]);
        weights.mix(c, a, 0);
        stmatrix_x2_trans(mixed + S::OFF_H + column + at[2], pack<T>(c[0], c[1]), pack<T>(c[2], c[3]));
      }
      return;
    }
    for (int i = 0; i < ROUNDS; ++i) {
      if (APART * i >= left) break;
      uint32_t here[PIECES];
      for (int k = 0; k < PIECES; ++k) ldmatrix_x4_trans(a[k], x + (here[k] = at[i * PIECES + k]));
      for (int k = 0; k < PIECES; ++k) {
        for (int e = 0; e < 2; ++e) {
          const auto& [proj, bias] = weights;
          if (pairs) mma_k8<T>(c, a[0][2 * e], a[0][2 * e + 1], proj[0][0], bias[0][0], bias[0][1]);
          else weights.mix(c, a, 2 * k + e);
          out[2 * e] = pack<T>(c[0], c[1]);
          out[2 * e + 1] = pack<T>(c[2], c[3]);
        }
        stmatrix_x4_trans(mixed + (S::STRIPS ? S::OFF_W : to) + here[k], out);
      }
    }
  }
};
