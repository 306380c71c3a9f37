/* Matrix products: mma.sync by one warp, wgmma by four warps on operands in shared memory.
 *
 * Operands are exact in float32 (of TF32, the low 13 bits are cut off, as the hardware does). Sums
 * are float32, one fused multiply-add a product, k ascending. The hardware adds several products at
 * once, with truncation, so that the last bits differ, as they do from chip to chip. float64
 * likewise, in float64.
 */
#include <stdlib.h>

#include "machine.h"

/* C[16][N] += A[16][K] B[K][N] */
static void multiply(const f32 *restrict A, const f32 *restrict B, f32 *restrict C, int N, int K) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < N; j += 8) {
            f32 sums[8];
            for (int q = 0; q < 8; q++) sums[q] = C[i * N + j + q];
            for (int k = 0; k < K; k++) {
                f32 a = A[i * K + k];
                for (int q = 0; q < 8; q++)
                    sums[q] = __builtin_fmaf(a, B[k * N + j + q], sums[q]);
            }
            for (int q = 0; q < 8; q++) C[i * N + j + q] = sums[q];
        }
}

static inline f32 half_of(u32 pair, int high, int flags) {
    u32 x = high ? pair >> 16 : pair & 0xffff;
    return flags & F16 ? from_f16(x) : from_bf16(x);
}

/* Operand A [16][K] of mma and wgmma from registers: K is 16, or 8 (TF32, and 16-bit mma) */
static void operand_a(const Warp *warp, const s32 *pool, int K, int flags, f32 *A) {
    int registers = flags & TF32 || K == 16 ? 4 : 2;
    for (int r = 0; r < registers; r++) {
        const u32 *reg = REG32(r);
        for (int l = 0; l < LANES; l++) {
            int row = l / 4 + (r & 1) * 8;
            if (flags & TF32) A[row * K + l % 4 + (r >> 1) * 4] = tf32(reg[l]);
            else
                for (int e = 0; e < 2; e++)
                    A[row * K + l % 4 * 2 + e + (r >> 1) * 8] = half_of(reg[l], e, flags);
        }
    }
}

/* Sums [16][N], two consecutive columns to a pair of registers */
static int sum_index(int r, int l, int N) {
    return (l / 4 + (r & 2) * 4) * N + r / 4 * 8 + l % 4 * 2 + (r & 1);
}

static void load_sums(const Warp *warp, const s32 *pool, f32 *C, int N) {
    for (int r = 0; r < N / 2; r++)
        for (int l = 0; l < LANES; l++) C[sum_index(r, l, N)] = bits_f32(REG32(r)[l]);
}

static void store_sums(const Warp *warp, const s32 *pool, const f32 *C, int N) {
    for (int r = 0; r < N / 2; r++)
        for (int l = 0; l < LANES; l++) REG32(r)[l] = f32_bits(C[sum_index(r, l, N)]);
}

/* ---- mma.sync: operands d, a, b, c ---- */

/* m16n8k16 (d4 a4 b2 c4) and m16n8k8 (d4 a2 b1 c4) of 16-bit types */
void mma_half(const Warp *warp, const s32 *pool, int K, int flags) {
    f32 A[16 * 16], B[16 * 8], C[16 * 8];
    int a = K / 4, b = K / 8;
    operand_a(warp, pool + 4, K, flags, A);
    for (int r = 0; r < b; r++)
        for (int l = 0; l < LANES; l++)
            for (int e = 0; e < 2; e++)
                B[(l % 4 * 2 + 8 * r + e) * 8 + l / 4] = half_of(REG32(4 + a + r)[l], e, flags);
    load_sums(warp, pool + 4 + a + b, C, 8);
    multiply(A, B, C, 8, K);
    store_sums(warp, pool, C, 8);
}

/* m16n8k8 (d4 a4 b2 c4) of TF32 */
void mma_tf32(const Warp *warp, const s32 *pool) {
    f32 A[16 * 8], B[8 * 8], C[16 * 8];
    operand_a(warp, pool + 4, 8, TF32, A);
    for (int r = 0; r < 2; r++)
        for (int l = 0; l < LANES; l++) B[(l % 4 + 4 * r) * 8 + l / 4] = tf32(REG32(8 + r)[l]);
    load_sums(warp, pool + 10, C, 8);
    multiply(A, B, C, 8, 8);
    store_sums(warp, pool, C, 8);
}

/* m8n8k4 (d2 a1 b1 c2) and m16n8k16 (d4 a8 b4 c4) of float64 */
void mma_f64(const Warp *warp, const s32 *pool, int rows, int K) {
    f64 A[16][16], B[16][8], C[16][8];
    int d = rows / 4, a = rows * K / 32, b = K / 4;
    for (int r = 0; r < a; r++)
        for (int l = 0; l < LANES; l++)
            A[l / 4 + (rows == 16 ? (r & 1) * 8 : 0)][l % 4 + r / 2 * 4] = REG_F64(d + r)[l];
    for (int r = 0; r < b; r++)
        for (int l = 0; l < LANES; l++) B[l % 4 + 4 * r][l / 4] = REG_F64(d + a + r)[l];
    for (int r = 0; r < d; r++)
        for (int l = 0; l < LANES; l++)
            C[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2] = REG_F64(d + a + b + r)[l];
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < K; k++)
            for (int j = 0; j < 8; j++) C[i][j] = __builtin_fma(A[i][k], B[k][j], C[i][j]);
    for (int r = 0; r < d; r++)
        for (int l = 0; l < LANES; l++)
            REG_F64(r)[l] = C[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
}

/* ---- wgmma ---- */

/* Address of a 16-byte chunk of an operand in shared memory, as its descriptor says (PTX ISA,
 * "Matrix descriptor" and "Strides" of asynchronous warpgroup level matrix instructions).
 *
 * transposed: 0 the summed axis is contiguous: index is the row of M or N, chunk counts along k;
 *             1 M or N is contiguous: index is k, chunk counts along M or N.
 */
static u32 chunk_address(u64 descriptor, int transposed, int index, int chunk) {
    u32 start = (u32)(descriptor & 0x3fff) << 4;
    u32 leading = (u32)(descriptor >> 16 & 0x3fff) << 4;
    u32 stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    int swizzle = (int)(descriptor >> 62);
    int row = index % 8, rows = index / 8;
    if (swizzle == 0)
        return start + row * 16 +
               (transposed ? rows * leading + chunk * stride : rows * stride + chunk * leading);
    int width = swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32; /* bytes of a swizzled row */
    u32 address = start + row * width + rows * stride;
    if (transposed) address += chunk / (width / 16) * leading + chunk % (width / 16) * 16;
    else address += chunk * 16;
    return address ^ ((address >> 7 & (width / 16 - 1)) << 4);
}

/* What to do with the chunks of an operand in shared memory: when a product is issued they are
 * checked and marked as read, when it ends the marks are taken off and the values are read. */
enum { ISSUE, FINISH };

/* An operand, A [16][K] of this warp or B [K][N], in shared memory. */
typedef struct {
    u64 descriptor;
    int transposed, first, rows, K, flags, is_a;
} Operand;

static void check_chunk(Machine *m, u32 at) {
    const Warp *warp = &m->warp[m->current];
    check_read(m, at, 16, NO_LANE);
    for (int i = 0; i < 16; i += GRAIN) {
        Cell *c = &m->cells[(at + i) / GRAIN];
        c->async_readers++;
        /* the writer's fence after its write, or the reader's after the barrier between */
        if (!c->pending && c->written && m->warp[c->writer].fence_time < c->write_time &&
            warp->fence_epoch <= c->write_epoch)
            note(m, c->copied ? V_PROXY_FENCE_OF_COPY : V_PROXY_FENCE, ALL_LANES, c->writer,
                 at + i + SHARED_BASE, 0);
    }
}

static void operand_in_memory(Machine *m, const Operand *o, int what, f32 *into) {
    int elements = o->flags & TF32 ? 4 : 8; /* of a chunk */
    int outer = o->transposed ? o->K : o->rows, inner = o->transposed ? o->rows : o->K;
    for (int index = 0; index < outer; index++)
        for (int chunk = 0; chunk < inner / elements; chunk++) {
            u32 address =
                o->transposed
                    ? chunk_address(o->descriptor, 1, index, o->first / elements + chunk)
                    : chunk_address(o->descriptor, 0, o->first + index, chunk);
            int at = shared_at(m, address, 16, ALL_LANES);
            if (at < 0) continue;
            if (what == ISSUE) {
                check_chunk(m, (u32)at);
                continue;
            }
            for (int i = 0; i < 16; i += GRAIN) m->cells[(at + i) / GRAIN].async_readers--;
            for (int e = 0; e < elements; e++) {
                u32 bits = 0;
                memcpy(&bits, m->shared + at + 16 / elements * e, (size_t)(16 / elements));
                f32 value = o->flags & TF32 ? tf32(bits) : half_of(bits, 0, o->flags);
                int row = o->transposed ? chunk * elements + e : index;
                int k = o->transposed ? index : chunk * elements + e;
                into[o->is_a ? row * o->K + k : k * o->rows + row] = value;
            }
        }
}

static Operand operand_b(const Ins *ins, u64 descriptor) {
    int transposed = !!(ins->flags & B_TRANSPOSED);
    return (Operand){descriptor, transposed, 0, ins->vector, ins->size, ins->flags, 0};
}

/* The 16 rows of A that this warp of four multiplies. */
static Operand rows_of_a(const Machine *m, const Ins *ins, u64 descriptor) {
    int transposed = !!(ins->flags & A_TRANSPOSED), first = m->current % 4 * 16;
    return (Operand){descriptor, transposed, first, 16, ins->size, ins->flags, 1};
}

/* operands: N/2 sums, then A (4 registers or a descriptor), the descriptor of B, perhaps a
 * predicate that says whether to add to the sums */
void issue_wgmma(Machine *m, Warp *warp, const Ins *ins, const s32 *pool) {
    int sums = ins->vector / 2, registers = ins->flags & A_IN_MEMORY ? 0 : 4;
    int a = sums, b = a + (registers ? registers : 1);
    for (int i = 0; i < sums + registers; i++) {
        u32 slot = (u32)pool[i] / 64;
        if (warp->stamp[slot] > warp->wgmma_fence_time)
            note(m, V_WGMMA_FENCE, ALL_LANES, i, 0, pool[i]);
        if (i >= sums && (warp->flight[slot] & 1))
            note(m, V_REGISTER_IN_FLIGHT, ALL_LANES, i, 0, pool[i]);
        warp->flight[slot] |= i < sums ? 1 : 2;
    }
    for (int k = registers ? b : a; k <= b; k++)
        for (int l = 1; l < LANES; l++)
            if (REG64(k)[l] != REG64(k)[0]) {
                note(m, V_DIVERGENCE, l, k, REG64(k)[l], 1);
                break;
            }
    u64 in_a = registers ? 0 : REG64(a)[0], in_b = REG64(b)[0];
    Operand B = operand_b(ins, in_b), A = rows_of_a(m, ins, in_a);
    operand_in_memory(m, &B, ISSUE, NULL);
    if (!registers) operand_in_memory(m, &A, ISSUE, NULL);
    if (warp->product_count == warp->product_room) {
        warp->product_room = 2 * warp->product_room + 16;
        warp->products = realloc(warp->products, sizeof(Product) * warp->product_room);
    }
    int accumulate = ins->flags & SCALE_IN_PREDICATE ? *REG32(b + 1) != 0 : (int)ins->imm;
    warp->products[warp->product_count++] =
        (Product){ins, warp->product_group, accumulate, in_a, in_b};
}

static void finish_wgmma(Machine *m, Warp *warp, const Product *product) {
    static f32 A[16 * 16], B[16 * 256], C[16 * 256];
    const Ins *ins = product->ins;
    const s32 *pool = m->launch->pool + ins->first;
    int N = ins->vector, K = ins->size;
    Operand in_b = operand_b(ins, product->b), in_a = rows_of_a(m, ins, product->a);
    operand_in_memory(m, &in_b, FINISH, B);
    if (ins->flags & A_IN_MEMORY) operand_in_memory(m, &in_a, FINISH, A);
    else operand_a(warp, pool + N / 2, K, ins->flags, A);
    if (product->accumulate) load_sums(warp, pool, C, N);
    else memset(C, 0, sizeof(f32) * 16 * (size_t)N);
    multiply(A, B, C, N, K);
    store_sums(warp, pool, C, N);
}

/* Products read operands and write sums only here: as late as allowed. */
void wait_for_wgmma(Machine *m, Warp *warp, u32 groups_left) {
    u32 done = 0;
    while (done < warp->product_count &&
           warp->products[done].group + groups_left < warp->product_group)
        finish_wgmma(m, warp, &warp->products[done++]);
    if (!done) return;
    warp->product_count -= done;
    memmove(warp->products, warp->products + done, sizeof(Product) * warp->product_count);
    memset(warp->flight, 0, (size_t)(m->launch->reg_bytes + m->launch->const_bytes) / 64);
    for (u32 p = 0; p < warp->product_count; p++) {
        const Ins *ins = warp->products[p].ins;
        const s32 *pool = m->launch->pool + ins->first;
        int sums = ins->vector / 2, registers = ins->flags & A_IN_MEMORY ? 0 : 4;
        for (int i = 0; i < sums + registers; i++) warp->flight[pool[i] / 64] |= i < sums ? 1 : 2;
    }
}
