/* Runs a launch: program after program, in each of them warp after warp from barrier to barrier, in
 * a new random order every time. */
#include <math.h>
#include <stdlib.h>

#include "machine.h"

static const char *const NAMES[] = {
#define X(name, text, ...) text,
    BINARY(X) UNARY(X) TERNARY(X) COMPARE(X) OTHERS(X) TOGETHER(X)
#undef X
};

const char *op_name(int op) { return op < OP_COUNT ? NAMES[op] : NULL; }

void note(Machine *m, int kind, int lane, int other, u64 address, s64 extra) {
    enum { OF_A_KIND = 4 };
    Violations *v = m->launch->violations;
    v->counts[kind]++;
    if (v->counts[kind] <= OF_A_KIND && v->notes < MAX_NOTES)
        v->note[v->notes++] =
            (Note){kind, m->line, m->program, m->current, lane, other, address, extra};
}

/* ---- instructions that are more than an expression of a lane's operands ---- */

/* operands: result, perhaps a register with the address in place of the parameter's own */
static void load_parameter(Machine *m, Warp *warp, const Ins *ins, const s32 *pool) {
    const Launch *launch = m->launch;
    for (int l = 0; l < LANES; l++) {
        u64 at = (u64)ins->imm + (ins->flags & PARAM_IN_REGISTER ? REG64(1)[l] : 0);
        if (at + (u64)ins->size > (u64)launch->param_bytes) {
            note(m, V_BOUNDS, l, -2, at, 0);
            continue;
        }
        u64 value = element_of(ins, launch->params + at);
        if (ins->flags & WIDE) REG64(0)[l] = value;
        else REG32(0)[l] = (u32)value;
    }
}

/* operands: result, value, lane or mask, clamp, members */
static void shuffle(Warp *warp, const Ins *ins, const s32 *pool) {
    const u32 *a = REG32(1), *b = REG32(2), *c = REG32(3);
    u32 out[LANES];
    for (u32 l = 0; l < LANES; l++) {
        u32 segment = c[l] >> 8 & 31, clamp = c[l] & 31;
        u32 top = (l & segment) | (clamp & ~segment);
        u32 other = b[l] & 31;
        u32 from = ins->op == OP_shfl_idx ? (l & segment) | (other & ~segment) : l ^ other;
        out[l] = a[from <= top ? from : l];
    }
    memcpy(REG32(0), out, sizeof out);
}

static u32 insert_bits(u32 a, u32 b, u32 position, u32 length) {
    position &= 255, length &= 255;
    u32 field = length > 31 ? ~0u : (1u << length) - 1;
    return position > 31 ? b : (b & ~(field << position)) | (a & field) << position;
}

static u32 place_in_grid(const Machine *m, s64 axis) {
    const s32 *grid = m->launch->grid;
    s32 place = m->program;
    for (s64 before = 0; before < axis; before++) place /= grid[before];
    return (u32)(place % grid[axis]);
}

/* ---- a warp up to its next barrier ---- */

/* What a wgmma in flight reads or writes must be left alone until it was waited for. */
static void check_registers(Machine *m, Warp *warp, const Ins *ins, const s32 *pool) {
    for (int i = 0; i < ins->operands; i++)
        if (warp->flight[pool[i] / 64] & (i < ins->results ? 3 : 1))
            note(m, V_REGISTER_IN_FLIGHT, ALL_LANES, i, 0, pool[i]);
}

#define EACH_LANE _Pragma("GCC ivdep") for (int l = 0; l < LANES; l++)

/* Returns 1 where execution cannot go on. */
static int run_warp(Machine *m, int index) {
    const Launch *launch = m->launch;
    Warp *warp = &m->warp[index];
    m->current = index;
    Kept kept;
    for (;;) {
        if (warp->pc >= warp->next_pc) part_lanes(warp, 0, 0);
        const Ins *ins = &launch->code[warp->pc++];
        const s32 *pool = launch->pool + ins->first;
        u32 mask = warp->lanes;
        int some = mask != 0xffffffffu;
        m->time++;
        m->line = ins->line;
        if (ins->guard >= 0) {
            u32 guard = *(u32 *)(warp->regs + ins->guard);
            mask &= ins->negate ? ~guard : guard;
        }
        if (some && needs_all_lanes(ins->op)) {
            note(m, V_DIVERGENCE, ALL_LANES, -1, warp->lanes, 0);
            return 1;
        }
        if (some) keep_results(warp, ins, pool, kept);
        if (ins->op != OP_wgmma) {
            if (warp->product_count) check_registers(m, warp, ins, pool);
            for (int i = 0; i < ins->results; i++) warp->stamp[pool[i] / 64] = m->time;
        }

        switch (ins->op) {
#define X(name, text, td, ta, tb, expression) case OP_##name: { \
            td *d_ = (td *)(warp->regs + pool[0]); \
            const ta *a_ = (const ta *)(warp->regs + pool[1]); \
            const tb *b_ = (const tb *)(warp->regs + pool[2]); \
            EACH_LANE { ta a = a_[l]; tb b = b_[l]; d_[l] = (expression); } break; }
        BINARY(X)
#undef X
#define X(name, text, td, ta, expression) case OP_##name: { \
            td *d_ = (td *)(warp->regs + pool[0]); \
            const ta *a_ = (const ta *)(warp->regs + pool[1]); \
            EACH_LANE { ta a = a_[l]; d_[l] = (expression); } break; }
        UNARY(X)
#undef X
#define X(name, text, td, ta, tb, tc, expression) case OP_##name: { \
            td *d_ = (td *)(warp->regs + pool[0]); \
            const ta *a_ = (const ta *)(warp->regs + pool[1]); \
            const tb *b_ = (const tb *)(warp->regs + pool[2]); \
            const tc *c_ = (const tc *)(warp->regs + pool[3]); \
            EACH_LANE { ta a = a_[l]; tb b = b_[l]; tc c = c_[l]; d_[l] = (expression); } break; }
        TERNARY(X)
#undef X
#define X(name, text, t, operator) case OP_##name: { \
            const t *a_ = (const t *)(warp->regs + pool[1]); \
            const t *b_ = (const t *)(warp->regs + pool[2]); \
            u32 bits = 0; \
            for (int l = 0; l < LANES; l++) bits |= (u32)(a_[l] operator b_[l]) << l; \
            *REG32(0) = bits; break; }
        COMPARE(X)
#undef X
        case OP_selp32: {
            u32 *d = REG32(0), *a = REG32(1), *b = REG32(2), p = *REG32(3);
            EACH_LANE d[l] = p >> l & 1 ? a[l] : b[l];
            break;
        }
        case OP_selp64: {
            u64 *d = REG64(0), *a = REG64(1), *b = REG64(2);
            u32 p = *REG32(3);
            EACH_LANE d[l] = p >> l & 1 ? a[l] : b[l];
            break;
        }
        case OP_blend: /* d = guard ? a : d, after a guarded instruction into a scratch register */
            for (int l = 0; l < LANES; l++) {
                if (!(mask >> l & 1)) continue;
                if (ins->size == 8) REG64(0)[l] = REG64(1)[l];
                else if (ins->size == 4) REG32(0)[l] = REG32(1)[l];
                else *REG32(0) = (*REG32(0) & ~(1u << l)) | (*REG32(1) & 1u << l);
            }
            break;
        case OP_and_pred: *REG32(0) = *REG32(1) & *REG32(2); break;
        case OP_or_pred: *REG32(0) = *REG32(1) | *REG32(2); break;
        case OP_xor_pred: *REG32(0) = *REG32(1) ^ *REG32(2); break;
        case OP_not_pred: *REG32(0) = ~*REG32(1); break;
        case OP_mov_pred: *REG32(0) = *REG32(1); break;
        case OP_bfi_b32: {
            u32 *d = REG32(0), *a = REG32(1), *b = REG32(2), *c = REG32(3), *e = REG32(4);
            EACH_LANE d[l] = insert_bits(a[l], b[l], c[l], e[l]);
            break;
        }
        case OP_cvt_bf16x2: {
            u32 *d = REG32(0);
            const f32 *a = (f32 *)REG32(1), *b = (f32 *)REG32(2);
            EACH_LANE d[l] = to_bf16(a[l]) << 16 | to_bf16(b[l]);
            break;
        }
        case OP_cvt_f16x2: {
            u32 *d = REG32(0);
            const f32 *a = (f32 *)REG32(1), *b = (f32 *)REG32(2);
            EACH_LANE d[l] = to_f16(a[l]) << 16 | to_f16(b[l]);
            break;
        }
        case OP_pack16: {
            u32 *d = REG32(0), *a = REG32(1), *b = REG32(2);
            EACH_LANE d[l] = (a[l] & 0xffff) | b[l] << 16;
            break;
        }
        case OP_unpack16: {
            u32 *d = REG32(0), *e = REG32(1), *a = REG32(2);
            EACH_LANE { u32 x = a[l]; d[l] = x & 0xffff; e[l] = x >> 16; }
            break;
        }
        case OP_pack32: {
            u64 *d = REG64(0);
            u32 *a = REG32(1), *b = REG32(2);
            EACH_LANE d[l] = a[l] | (u64)b[l] << 32;
            break;
        }
        case OP_unpack32: {
            u32 *d = REG32(0), *e = REG32(1);
            u64 *a = REG64(2);
            EACH_LANE { u64 x = a[l]; d[l] = (u32)x; e[l] = (u32)(x >> 32); }
            break;
        }
        case OP_ld_param: load_parameter(m, warp, ins, pool); break;
        case OP_ctaid: {
            u32 *d = REG32(0), place = place_in_grid(m, ins->imm);
            EACH_LANE d[l] = place;
            break;
        }
        case OP_nctaid: {
            u32 *d = REG32(0);
            EACH_LANE d[l] = (u32)launch->grid[ins->imm];
            break;
        }
        case OP_tid: { /* programs have one axis of threads */
            u32 *d = REG32(0);
            EACH_LANE d[l] = ins->imm ? 0 : (u32)(index * LANES + l);
            break;
        }
        case OP_bra:
            if (mask == warp->lanes) warp->pc = (u32)ins->imm;
            else if (mask) part_lanes(warp, mask, (u32)ins->imm);
            break;
        case OP_ret: warp->done = 1; return 0;
        case OP_bar_sync: warp->waiting = 1; return 0;
        case OP_warp_sync: warp->warp_epoch++; break;
        case OP_ld_global: load_global(m, warp, ins, pool, mask); break;
        case OP_st_global: store_global(m, warp, ins, pool, mask); break;
        case OP_ld_shared: load_shared(m, warp, ins, pool, mask); break;
        case OP_st_shared: store_shared(m, warp, ins, pool, mask); break;
        case OP_ldmatrix: load_matrix(m, warp, ins, pool); break;
        case OP_stmatrix: store_matrix(m, warp, ins, pool); break;
        case OP_cp_async: copy_async(m, warp, ins, pool, mask); break;
        case OP_cp_commit: warp->copy_group++; break;
        case OP_cp_wait: wait_for_copies(m, warp, (u32)ins->imm); break;
        case OP_shfl_idx: case OP_shfl_bfly: shuffle(warp, ins, pool); break;
        case OP_mma_bf16: mma_half(warp, pool, 16, 0); break;
        case OP_mma_f16: mma_half(warp, pool, 16, F16); break;
        case OP_mma_bf16_k8: mma_half(warp, pool, 8, 0); break;
        case OP_mma_f16_k8: mma_half(warp, pool, 8, F16); break;
        case OP_mma_tf32: mma_tf32(warp, pool); break;
        case OP_mma_f64_884: mma_f64(warp, pool, 8, 4); break;
        case OP_mma_f64_16816: mma_f64(warp, pool, 16, 16); break;
        case OP_wgmma: issue_wgmma(m, warp, ins, pool); break;
        case OP_wgmma_fence: warp->wgmma_fence_time = m->time; break;
        case OP_wgmma_commit: warp->product_group++; break;
        case OP_wgmma_wait: wait_for_wgmma(m, warp, (u32)ins->imm); break;
        case OP_fence_async: warp->fence_time = m->time; warp->fence_epoch = m->epoch; break;
        }
        if (some) give_back_results(warp, ins, pool, kept);
    }
}

/* ---- a program, a launch ---- */

static u64 next_random(u64 *state) {
    u64 x = *state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return *state = x;
}

static void reset(Machine *m) {
    const Launch *launch = m->launch;
    size_t slots = (size_t)(launch->reg_bytes + launch->const_bytes) / 64;
    memset(m->cells, 0, ((size_t)launch->shared_bytes / GRAIN + 1) * sizeof(Cell));
    memset(m->shared, 0xc5, (size_t)launch->shared_bytes);
    m->epoch = m->time = 1;
    for (int w = 0; w < launch->warps; w++) {
        Warp *warp = &m->warp[w];
        memset(warp->regs, 0xc5, (size_t)launch->reg_bytes);
        memset(warp->stamp, 0, slots * sizeof(u32));
        memset(warp->flight, 0, slots);
        warp->pc = warp->done = warp->waiting = warp->copy_count = warp->copy_group = 0;
        warp->product_count = warp->product_group = 0;
        warp->fence_time = warp->fence_epoch = warp->wgmma_fence_time = 0;
        warp->warp_epoch = 1;
        start_lanes(warp);
    }
}

/* All warps have stopped: at one barrier, or at the end. Returns how many have not ended. */
static int meet(Machine *m) {
    int running = 0, waiting = 0;
    u32 pc = 0;
    for (int w = 0; w < m->launch->warps; w++) {
        Warp *warp = &m->warp[w];
        running += !warp->done;
        waiting += warp->waiting;
        if (warp->waiting) {
            if (pc && warp->pc != pc) note(m, V_BARRIER, ALL_LANES, w, pc, warp->pc);
            pc = warp->pc;
        }
        warp->waiting = 0;
        warp->warp_epoch++;
    }
    if (running && waiting != m->launch->warps) note(m, V_BARRIER, ALL_LANES, waiting, 0, running);
    m->epoch++;
    return running;
}

static void run_program(Machine *m, u64 *random) {
    int warps = m->launch->warps, order[MAX_WARPS];
    reset(m);
    for (int w = 0; w < warps; w++) order[w] = w;
    do {
        for (int i = warps - 1; i > 0; i--) {
            int j = (int)(next_random(random) % (u64)(i + 1)), t = order[i];
            order[i] = order[j];
            order[j] = t;
        }
        for (int i = 0; i < warps; i++)
            if (!m->warp[order[i]].done && run_warp(m, order[i])) return;
    } while (meet(m));
    for (int w = 0; w < warps; w++)
        if (m->warp[w].product_count) {
            m->current = w;
            note(m, V_REGISTER_IN_FLIGHT, ALL_LANES, -2, 0, 0);
        }
}

void run(const Launch *launch) {
    Machine *m = calloc(1, sizeof(Machine));
    size_t bytes = (size_t)(launch->reg_bytes + launch->const_bytes);
    u64 random = launch->seed * 2654435769u + 88172645463325252ull;
    m->launch = launch;
    m->shared = aligned_alloc(64, ((size_t)launch->shared_bytes + 64) / 64 * 64);
    m->cells = malloc(sizeof(Cell) * ((size_t)launch->shared_bytes / GRAIN + 1));
    for (int w = 0; w < launch->warps; w++) {
        m->warp[w].regs = aligned_alloc(64, bytes);
        m->warp[w].stamp = malloc(bytes / 64 * sizeof(u32));
        m->warp[w].flight = malloc(bytes / 64);
        memcpy(m->warp[w].regs + launch->reg_bytes, launch->constants, (size_t)launch->const_bytes);
    }
    s32 programs = launch->grid[0] * launch->grid[1] * launch->grid[2];
    for (m->program = 0; m->program < programs; m->program++) run_program(m, &random);
    for (int w = 0; w < launch->warps; w++) {
        Warp *warp = &m->warp[w];
        free(warp->regs), free(warp->stamp), free(warp->flight), free(warp->copies);
        free(warp->products);
    }
    free(m->shared), free(m->cells), free(m);
}
