// Hopper's instructions that the kernels use, as inline PTX.
#pragma once
#include <cstdint>

#define DEVICE __device__ __forceinline__

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

DEVICE float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
DEVICE float to_float(fp16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)); return r; }
template <class T> DEVICE float low(uint32_t v) { return to_float(T{(unsigned short)v}); }
template <class T> DEVICE float high(uint32_t v) { return to_float(T{(unsigned short)(v >> 16)}); }
template <class T> DEVICE float bias_of(const T* biases, int i, int count) {
  return biases && i < count ? to_float(biases[i]) : 0.f;
}
template <class T> DEVICE uint32_t pack(float a, float b) {
  uint32_t r;
  if constexpr (__is_same(T, bf16)) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
// Numbers of 16 bits, two a register, unpacked where they are needed: volatile, or the compiler would keep both.
template <int COUNT> struct Halves {
  uint32_t words[(COUNT + 1) / 2];
  DEVICE void set(int i, uint32_t v) { words[i / 2] = i & 1 ? words[i / 2] | v << 16 : v; }   // in order
  DEVICE uint32_t operator[](int i) const {
    uint32_t r;
    if (i & 1) asm volatile("shr.u32 %0, %1, 16;" : "=r"(r) : "r"(words[i / 2]));
    else asm volatile("and.b32 %0, %1, 0xFFFF;" : "=r"(r) : "r"(words[i / 2]));
    return r;
  }
};
// threadIdx.x and blockIdx.x, asked for again: volatile, or what follows from them would stay in registers
DEVICE uint32_t thread_index() { uint32_t r; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r)); return r; }
DEVICE int again(int v) { int r; asm volatile("mov.u32 %0, %1;" : "=r"(r) : "r"(v)); return r; }
DEVICE int block_index() { int r; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(r)); return r; }

DEVICE void cp_async(uint32_t to, const void* from, int bytes) {   // the rest of 16 bytes becomes zero
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void wgmma_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_wait_but_last() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
template <int R> DEVICE void wgmma_wait(float (&d)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void stmatrix_x4_trans(uint32_t at, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
DEVICE void stmatrix_x2_trans(uint32_t at, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(at), "r"(r0), "r"(r1) : "memory");
}
// Shared memory as C++ has it
DEVICE uint4& chunk_at(uint32_t at) { return *static_cast<uint4*>(__cvta_shared_to_generic(at)); }
