// The instructions of Hopper that the kernels use, as inline PTX.
#pragma once
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
template <class T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)); return r; }
template <class T> __device__ __forceinline__ float low(uint32_t v) { return to_float(T{(unsigned short)v}); }
template <class T> __device__ __forceinline__ float high(uint32_t v) { return to_float(T{(unsigned short)(v >> 16)}); }
template <class T> __device__ __forceinline__ uint32_t pack(float a, float b) {
  uint32_t r;
  if constexpr (IS_BF16<T>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, int bytes) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory"); }
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ int broadcast_first(int v) { return __shfl_sync(0xffffffffu, v, 0); }
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait_but_last() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
template <int R> __device__ __forceinline__ void wgmma_wait(float (&d)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t at) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory"); }
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t at, const uint32_t (&r)[4]) { asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"); }
// d = a b + (b0, b1 in every row)
#define MMA_K16(TYPE) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%10,%11};" : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(p0), "r"(p1), "f"(b0), "f"(b1))
#define MMA_K8(TYPE) asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%7,%8};" : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a0), "r"(a1), "r"(p0), "f"(b0), "f"(b1))
template <class T> __device__ __forceinline__ void mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t p0, uint32_t p1, float b0, float b1) {
  if constexpr (IS_BF16<T>) MMA_K16("bf16"); else MMA_K16("f16");
}
template <class T> __device__ __forceinline__ void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t p0, float b0, float b1) {
  if constexpr (IS_BF16<T>) MMA_K8("bf16"); else MMA_K8("f16");
}
// d += a b
#define MMA_K16_ADD(TYPE) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(p0), "r"(p1))
template <class T> __device__ __forceinline__ void mma_k16_add(float (&d)[4], const uint32_t (&a)[4], uint32_t p0, uint32_t p1) {
  if constexpr (IS_BF16<T>) MMA_K16_ADD("bf16"); else MMA_K16_ADD("f16");
}
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t at, uint32_t r0, uint32_t r1) { asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(at), "r"(r0), "r"(r1) : "memory"); }
// threadIdx.x, asked for anew: volatile, or the compiler would keep what follows from it in registers
__device__ __forceinline__ int thread_index() { int r; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r)); return r; }
__device__ __forceinline__ int block_index() { int r; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(r)); return r; }
// 16 of 32 bits, where they are needed: volatile, or the compiler would keep both halves in registers of their own
__device__ __forceinline__ uint32_t half_of(uint32_t v, int upper) {
  uint32_t r;
  if (upper) asm volatile("shr.u32 %0, %1, 16;" : "=r"(r) : "r"(v)); else asm volatile("and.b32 %0, %1, 0xFFFF;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ void store_16(void* to, uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  *reinterpret_cast<uint4*>(to) = v;
}
__device__ __forceinline__ void load_16(uint32_t to, const void* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void zero_fill(uint32_t smem, int bytes, int tid) {
  for (int i = tid * 16; i < bytes; i += 384 * 16) asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(smem + i), "r"(0) : "memory");
}
#include "wgmma.cuh"
