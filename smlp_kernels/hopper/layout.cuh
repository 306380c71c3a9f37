// What a block is given, which pixels it has, and where they lie in shared memory.
#pragma once
#include "instructions.cuh"

constexpr int THREADS = 384, WARPS = 12;
constexpr int ROWS_F = 192;                // output channels a pass
constexpr int STAGES_F = 3, STAGES_MIXED = 2;
constexpr int MAX_SHARED = 232448;         // bytes of a block

template <class T> struct Axis { int size; const T* proj; int stride_out, stride_in; const T* bias; };
template <class T>
struct Params {                            // of a kernel: KERNEL in kernels.cu
  const T* x; T* y;
  int batch, channels, height, width;
  Axis<T> h, w;
  const T* fuse; int fuse_stride_branch, fuse_stride;   // the other axis of F is contiguous
  const T* bias;                           // [C], or nothing
  const T* bias_map;                       // [H, W, C], or nothing
  int held;                                // lines that a block stores: of whole images, or a strip of one
  int passes, passes_step;                 // a block's passes: blockIdx.x % passes_step, + passes_step, ...
  int pass_tiles;                          // tiles of 64 output channels a pass, times 65536, rounded up: first_tile
  int reciprocal;                          // 65536 / width + 1
  int flip_shift, flip_mask;               // 3 - z and 2^z - 1 where 2^z, at most 8, divides width: flipped
};

// Of a pass, or of its end: the last pass ends with all tiles, since the rounding is less than 1 / 65536 a pass.
template <class T> DEVICE int first_tile(const Params<T>& p, int pass) { return pass * p.pass_tiles >> 16; }

// Shared memory: X of some steps, Xh and Xw of two, F of three, then 16 pixels x 32 bytes a warp. A tile of X, Xh or Xw
// has at most PAD pixels that are stored, then rows that stay zero in X, for the positions that a line does not have,
// and, of X, the other lines of an image in STRIPS.
template <int N_, int KC_, int STAGES_X_, int PAD_, int ZEROS, int LOADED_>
struct Layout {
  static constexpr int N = N_, KC = KC_, STAGES_X = STAGES_X_, PAD = PAD_, OTHERS = PAD + ZEROS;
  static constexpr int LOADED = LOADED_;   // pixels of x, at most
  static constexpr bool STRIPS = LOADED > N;
  static constexpr int M_BYTES = OTHERS * KC * 2, X_BYTES = M_BYTES + (STRIPS ? LOADED : 0) * KC * 2;
  static constexpr int F_BYTES = ROWS_F * KC * 2;   // of one branch
  static constexpr int OFF_H = STAGES_X * X_BYTES, OFF_W = OFF_H + STAGES_MIXED * M_BYTES;
  static constexpr int OFF_F = (OFF_W + STAGES_MIXED * M_BYTES + 1023) / 1024 * 1024;
  static constexpr int OFF_OUT = OFF_F + STAGES_F * 3 * F_BYTES;
  static_assert(OFF_OUT + WARPS * 512 + 1024 <= MAX_SHARED, "with alignment");
};
// Whole images, H and W up to 16. A tile of 256 has no room for more rows: there, at most 248 pixels are allowed, or
// 256 with lines of 8 or 16.
template <int N> using Images = Layout<N, 32, N == 200 ? 4 : 3, N < 256 ? N : 248, 8, N>;
// Images of up to 32x32 in strips: a block owns at most 8 whole lines of one image, at most 200 pixels, and reads all
// of the image's x, 16 channels at a time: Xh needs every line, and 7 outputs of 28 lines cost as many matrix
// instructions as a quarter of the columns would that other blocks had to send back.
using Strip = Layout<200, 16, 3, 200, 32, 1024>;

// Lines of the batch: a block reads `count` from `first` on, and stores `own_count` of these from `own` on.
struct Lines { long first; int count, own, own_count; };
template <class S, class T> DEVICE Lines lines_of(const Params<T>& p, int block) {
  const int group = block / p.passes_step, strips = (p.height + p.held - 1) / p.held, own = group % strips * p.held;
  if (S::STRIPS) return {long(group / strips) * p.height, p.height, own, min(p.held, p.height - own)};
  const long first = long(group) * p.held;
  const int count = int(min(long(p.held), long(p.batch) * p.height - first));
  return {first, count, 0, count};
}

// Pixels lie in order, but with w flipped within aligned groups of 2, 4 or 8 in some of the lines, so that both 8
// neighbours in a line and 8 in a column lie in different banks.
template <class T> DEVICE int flipped(const Params<T>& p, int line, int w) {
  return w ^ ((line >> p.flip_shift) & p.flip_mask);
}
template <class S, class T> DEVICE int row_of(const Params<T>& p, const Lines& at, int line, int w) {
  const int own = line - at.own;
  int row = own * p.width;
  if (S::STRIPS && (own < 0 || own >= at.own_count)) {
    // The other lines keep the order of banks that the strip's lines have: by their distance to them, and (width 4 n)
    // an even one.
    const int odd = p.flip_shift ? 1 : 0, before = -at.own & odd;
    row = S::OTHERS + (line + before - (own < 0 ? 0 : at.own_count - (at.own_count & odd))) * p.width;
  }
  return row + flipped(p, own, w);
}
template <class T> DEVICE int pixel_of(const Params<T>& p, int row) {   // and the way back, of those that are stored
  const int line = row * p.reciprocal >> 16;
  return line * p.width + flipped(p, line, row - line * p.width);
}

// A tile has rows of BYTES, 128, 64 or 32, whose chunks of 16 bytes are swizzled as wgmma reads them.
template <int BYTES> DEVICE uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * BYTES + ((chunk ^ (row / (128 / BYTES) % (BYTES / 16))) << 4);
}
template <int BYTES> DEVICE uint64_t descriptor(uint32_t address) {
  constexpr uint64_t SWIZZLE = BYTES == 128 ? 1 : BYTES == 64 ? 2 : 3;
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(BYTES / 2) << 32 | SWIZZLE << 62;
}
