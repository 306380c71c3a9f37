// What decides how fast smlp_kernels/hopper can be: measure_hopper.py runs these, one block on each SM.
#include "../smlp_kernels/hopper/block.cuh"

struct Probe {
  long long* cycles;       // [blocks]: of all rounds
  const uint8_t* data;     // what COPY reads: `bytes` of each block, or the same of all blocks (apart 0)
  int rounds, bytes, apart;
};
enum Beside { NOTHING, MMA, MATRICES };   // of a step of Tile<200>: its mma.sync, or its loads and stores of matrices

// Steps like those of a block of 14x14 pixels: six wgmma in flight, something else meanwhile.
// tests/tools/test_hopper_ptx.py checks what ptxas makes of the loops.
template <bool PRODUCTS, Beside BESIDE>
DEVICE void step(const Probe& p) {
  constexpr int N = 200, ROUNDS = 7, X_BYTES = (N + 8) * 64, F_BYTES = ROWS_F * 64;
  extern __shared__ uint8_t raw[];
  const uint32_t smem = (uint32_t(__cvta_generic_to_shared(raw)) + 1023) & ~1023u, f = smem + 4 * X_BYTES;
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(0xffffffffu, tid >> 5, 0);
  for (int i = tid * 4; i < 4 * X_BYTES + 3 * F_BYTES; i += THREADS * 4)   // small numbers of bfloat16
    asm volatile("st.shared.b32 [%0], %1;"
                 ::"r"(smem + i), "r"((i * 2654435761u & 0x007F007F) | 0x3C003C00) : "memory");
  fence_async();
  __syncthreads();
  float acc[N / 2], c[8][4];               // sums of positive numbers
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = c[i % 8][i / 8 % 4] = 0.f;
  uint32_t a[4] = {0x3C003C00u + lane, 0x3C003C01u + lane, 0x3C003C02u, 0x3C003C03u};
  // rows of 64 bytes: 16 of them in 8 different places of the banks, as the kernel's own are
  const uint32_t from = smem + 3 * X_BYTES + swizzled<32>(warp * 16 + (lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1);
  const uint32_t to = from + X_BYTES + 3 * F_BYTES;
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < p.rounds; ++round) {
    if (PRODUCTS) {
      wgmma_arrive();
#pragma unroll
      for (int i = 0; i < 6; ++i)
        wgmma<bf16, 0>(acc, descriptor<32>(f + (i >> 1) * F_BYTES + (warp >> 2) * 4096 + (i & 1) * 32),
                       descriptor<32>(smem + (i >> 1) * X_BYTES + (i & 1) * 32));
      wgmma_commit();
      wgmma_wait_but_last();
    }
    __syncthreads();
    if (BESIDE == MMA) ldmatrix_x4_trans(a, from);   // or ptxas would move mma.sync ahead of the products
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      if (BESIDE == MATRICES) ldmatrix_x4_trans(a, from);
      if (BESIDE == MMA) {
        mma_k16_add<bf16>(c[2 * i % 8], a, a[0], a[1]);
        mma_k16_add<bf16>(c[(2 * i + 1) % 8], a, a[2], a[3]);
      }
      if (BESIDE == MATRICES) stmatrix_x4_trans(to, a);
    }
    __syncthreads();
  }
  if (PRODUCTS) wgmma_wait(acc);
  __syncthreads();
  if (tid == 0) p.cycles[blockIdx.x] = clock64() - start;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum += (PRODUCTS ? acc[i] : 0.f) + (BESIDE == MMA ? c[i % 8][i / 8 % 4] : 0.f);
  if (sum < 0.f) p.cycles[blockIdx.x] = 0;   // never; but of what nobody uses, ptxas would compute nothing
}

// Reads by cp.async, 48 KB in flight: what comes from the L2 cache where all of it fits there.
DEVICE void copy(const Probe& p) {
  constexpr int PIECE = THREADS * 16, STAGES = 8;
  extern __shared__ uint8_t raw[];
  const uint32_t smem = (uint32_t(__cvta_generic_to_shared(raw)) + 1023) & ~1023u;
  const uint8_t* const from = p.data + long(blockIdx.x) * p.apart + threadIdx.x * 16;
  long long start = 0;
  for (int round = 0; round <= p.rounds; ++round) {   // the first one fills the cache
    if (round == 1) start = clock64();
    for (int at = 0, stage = 0; at < p.bytes; at += PIECE, stage = (stage + 1) % STAGES) {
      cp_async(smem + stage * PIECE + threadIdx.x * 16, from + at, 16);
      cp_async_commit();
      cp_async_wait<STAGES - 1>();
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) p.cycles[blockIdx.x] = clock64() - start;
}

#define PROBE(NAME, BODY) \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Probe p) { BODY(p); }
PROBE(probe_products, (step<true, NOTHING>))
PROBE(probe_mma, (step<false, MMA>))
PROBE(probe_products_mma, (step<true, MMA>))
PROBE(probe_matrices, (step<false, MATRICES>))
PROBE(probe_products_matrices, (step<true, MATRICES>))
PROBE(probe_copy, copy)
