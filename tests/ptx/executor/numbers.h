/* Numbers as instructions take them: bits and floats, 16-bit floats, TF32, bit fields. */
#ifndef NUMBERS_H
#define NUMBERS_H

#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;
typedef float f32;
typedef double f64;

static inline f32 bits_f32(u32 x) { f32 f; memcpy(&f, &x, 4); return f; }
static inline u32 f32_bits(f32 f) { u32 x; memcpy(&x, &f, 4); return x; }
static inline f32 low(u64 x) { return bits_f32((u32)x); } /* of f32x2 */
static inline f32 high(u64 x) { return bits_f32((u32)(x >> 32)); }
static inline u64 pair(f32 a, f32 b) { return f32_bits(a) | (u64)f32_bits(b) << 32; }
static inline f32 from_bf16(u32 x) { return bits_f32(x << 16); }
static inline u32 to_bf16(f32 f) {
    u32 x = f32_bits(f);
    if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (x + 0x7fff + ((x >> 16) & 1)) >> 16;
}
static inline f32 from_f16(u32 x) { u16 h = (u16)x; _Float16 f; memcpy(&f, &h, 2); return (f32)f; }
static inline u32 to_f16(f32 f) {
    if (f != f) return 0x7fff;
    _Float16 h = (_Float16)f; u16 x; memcpy(&x, &h, 2); return x;
}
static inline u32 to_tf32(u32 x) {
    if ((x & 0x7fffffffu) >= 0x7f800000u) return x;
    return (x + 0x1000) & 0xffffe000u;
}
static inline f32 tf32(u32 x) { return bits_f32(x & 0xffffe000u); } /* the unit ignores low bits */
static inline u32 bfe_u(u32 a, u32 pos, u32 len) {
    pos &= 255; len &= 255;
    if (!len || pos > 31) return 0;
    a >>= pos;
    return len > 31 ? a : a & ((1u << len) - 1);
}
static inline u32 bfe_s(u32 a, u32 pos, u32 len) {
    pos &= 255; len &= 255;
    if (!len) return 0;
    u32 top = pos + len - 1 > 31 ? 31 : pos + len - 1;
    s64 wide = (s64)(s32)a;
    if (pos > 31) return (u32)(wide >> 31);
    u32 width = top - pos + 1;
    return (u32)(((s64)((u64)(wide >> pos) << (64 - width))) >> (64 - width));
}
static inline u64 bfe_u64(u64 a, u32 pos, u32 len) {
    pos &= 255; len &= 255;
    if (!len || pos > 63) return 0;
    a >>= pos;
    return len > 63 ? a : a & ((1ull << len) - 1);
}
static inline u64 bfe_s64(u64 a, u32 pos, u32 len) {
    pos &= 255; len &= 255;
    if (!len) return 0;
    if (pos > 63) return (u64)((s64)a >> 63);
    u32 width = len > 64 - pos ? 64 - pos : len;
    return (u64)((s64)((u64)((s64)a >> pos) << (64 - width)) >> (64 - width));
}
static inline u32 prmt(u32 a, u32 b, u32 c) {
    u64 both = ((u64)b << 32) | a;
    u32 d = 0;
    for (int i = 0; i < 4; i++) {
        u32 s = c >> (4 * i) & 15, byte = (u32)(both >> (8 * (s & 7))) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        d |= byte << (8 * i);
    }
    return d;
}

#endif
