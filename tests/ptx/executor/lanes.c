/* Lanes of a warp that part at a branch.
 *
 * Of lanes at different places those run that are furthest behind, and the others wait. Compilers
 * lay out code so that what follows a condition comes after both of its sides: there all lanes
 * have come together again. Code in another order would leave them apart, which an instruction of
 * the whole warp then says.
 */
#include "machine.h"

#define NOWHERE (~0u)

int needs_all_lanes(int op) {
    static const u8 needed[OP_COUNT] = {
#define X(name, ...) [OP_##name] = 1,
        TOGETHER(X)
#undef X
    };
    return needed[op];
}

void start_lanes(Warp *warp) {
    warp->lanes = ~0u;
    warp->next_pc = NOWHERE;
}

/* Of the lanes that run, those that branch are at `target` and the rest at pc: which run now? */
void part_lanes(Warp *warp, u32 branching, u32 target) {
    u32 first = NOWHERE;
    for (int l = 0; l < LANES; l++) {
        if (warp->lanes >> l & 1) warp->lane_pc[l] = branching >> l & 1 ? target : warp->pc;
        if (warp->lane_pc[l] < first) first = warp->lane_pc[l];
    }
    warp->pc = first;
    warp->lanes = 0;
    warp->next_pc = NOWHERE;
    for (int l = 0; l < LANES; l++) {
        if (warp->lane_pc[l] == first) warp->lanes |= 1u << l;
        else if (warp->lane_pc[l] < warp->next_pc) warp->next_pc = warp->lane_pc[l];
    }
}

/* Instructions compute all lanes: the results of those that wait are kept and given back. */
void keep_results(const Warp *warp, const Ins *ins, const s32 *pool, Kept kept) {
    size_t bytes = ins->width == 8 ? 8 * LANES : ins->width ? 4 * LANES : sizeof(u32);
    for (int i = 0; i < ins->results; i++) memcpy(kept[i], warp->regs + pool[i], bytes);
}

void give_back_results(Warp *warp, const Ins *ins, const s32 *pool, Kept kept) {
    size_t bytes = ins->width == 8 ? 8 : 4; /* of a lane */
    for (int i = 0; i < ins->results; i++) {
        u8 *result = warp->regs + pool[i];
        if (!ins->width) { /* a predicate: a bit for each lane */
            u32 before;
            memcpy(&before, kept[i], sizeof before);
            *(u32 *)result = (*(u32 *)result & warp->lanes) | (before & ~warp->lanes);
            continue;
        }
        for (size_t l = 0; l < LANES; l++)
            if (!(warp->lanes >> l & 1)) memcpy(result + bytes * l, kept[i] + bytes * l, bytes);
    }
}
