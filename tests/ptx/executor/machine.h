/* The machine: decoded instructions, warps, memory, what was done wrong. */
#ifndef MACHINE_H
#define MACHINE_H

#include "instructions.h"
#include "numbers.h"

enum {
    LANES = 32,
    MAX_WARPS = 32,
    SHARED_BASE = 1024, /* address of the first byte of shared memory; decoder.py knows it too */
    GRAIN = 2,          /* bytes that are watched as one: the smallest element stored alone */
    MAX_NOTES = 64,
    ALL_LANES = -1,
    NO_LANE = -2, /* an asynchronous product, which has ended when it was waited for */
    SEVERAL = -1
};

enum {
#define X(name, ...) OP_##name,
    BINARY(X) UNARY(X) TERNARY(X) COMPARE(X) OTHERS(X) TOGETHER(X)
#undef X
    OP_COUNT
};

/* Fields as in executor.py. */
typedef struct {
    s32 op;
    s32 guard;    /* offset of the guarding predicate in the registers of a warp, or -1 */
    s32 negate;   /* the guard */
    s32 results;  /* operands that are written, first in the list */
    s32 operands; /* results included */
    s32 first;    /* operand in the pool of register offsets */
    s32 size;     /* bytes of an element of memory; K of wgmma */
    s32 vector;   /* elements of a lane; N of wgmma */
    s64 imm;      /* offset of an address, target of a branch, number of groups */
    s32 flags;
    s32 line;     /* of the PTX text */
    s32 width;    /* bytes of a result; 0: a predicate */
} Ins;

/* Bits of flags, as in encoder.py. For cp.async, flags is the offset of the global address. */
enum {
    TRANSPOSED = 1,
    A_IN_MEMORY = 2,
    A_TRANSPOSED = 4,
    B_TRANSPOSED = 8,
    TF32 = 16,
    F16 = 32,
    SIGNED = 64,
    SCALE_IN_PREDICATE = 128,
    PARAM_IN_REGISTER = 256,
    WIDE = 512 /* a register has 64 bits, whatever the size of what is loaded or stored */
};

/* In the order of VIOLATIONS in executor.py. */
enum {
    V_BOUNDS, V_ALIGNMENT, V_UNWRITTEN_GLOBAL, V_UNWRITTEN_SHARED,
    V_READ_AFTER_WRITE, V_WRITE_AFTER_READ, V_WRITE_AFTER_WRITE,
    V_READ_OF_COPY, V_WRITE_OVER_COPY, V_WRITE_OVER_OPERAND, V_REGISTER_IN_FLIGHT, V_WGMMA_FENCE,
    V_PROXY_FENCE, V_PROXY_FENCE_OF_COPY, V_WRITTEN_TWICE, V_OTHER_PROGRAM, V_SHARED_BOUNDS, V_SHARED_ALIGNMENT,
    V_DIVERGENCE, V_BARRIER, V_LANES, V_READ_ONLY, V_KINDS
};

/* Where a violation happened; `other` and `extra` depend on its kind. */
typedef struct {
    s32 kind, line, program, warp, lane, other;
    u64 address;
    s64 extra;
} Note;

typedef struct {
    u64 counts[V_KINDS];
    s32 notes;
    Note note[MAX_NOTES];
} Violations;

/* A tensor, at virtual addresses that no other tensor is near. */
typedef struct {
    u8 *host; /* what lies at `base` */
    u64 base;
    u64 size;
    u8 *written; /* a byte for each byte, 0: never written; NULL: all of it is */
    u32 *writer; /* for each GRAIN: program + 1 that wrote it in this launch; NULL: an input */
    u32 *reader; /* likewise, of those that read it; SEVERAL if they are */
} Buffer;

/* What is known of a GRAIN of shared memory. An epoch lies between two barriers of the program. */
typedef struct {
    u32 write_epoch, read_epoch, write_time, write_warp_epoch, read_warp_epoch;
    u32 readers;       /* bit mask of warps, in read_epoch */
    u32 async_readers; /* wgmma products in flight that read it */
    u32 raced;         /* two warps wrote other bytes here: a violation once somebody reads them */
    u8 writer, lane, written;
    u8 reader, read_lane; /* of read_warp_epoch: the last warp that read, and its lane or several */
    u8 pending; /* a copy into it is in flight */
    u8 copied;  /* the last write was one */
} Cell;

/* A cp.async in flight. */
typedef struct {
    u32 address, group;
    u8 size, lane;
    u8 data[16];
} Copy;

/* A wgmma in flight: descriptors and scale are taken when it is issued, registers when it ends. */
typedef struct {
    const Ins *ins;
    u32 group;
    s32 accumulate;
    u64 a, b;
} Product;

/* Registers are vectors of LANES values, at offsets that are multiples of 64 bytes. */
typedef struct {
    u8 *regs;
    u32 *stamp; /* of each 64 bytes: time of the last write by anything but a wgmma */
    u8 *flight; /* of each 64 bytes: 1 sums, 2 operands of products in flight */
    u32 pc, done, waiting, warp_epoch;
    u32 lanes;          /* those that run, at pc */
    u32 next_pc;        /* where the next of the others wait, further on in the code */
    u32 lane_pc[LANES]; /* of those that wait */
    u32 fence_time, fence_epoch, wgmma_fence_time;
    Copy *copies;
    u32 copy_count, copy_room, copy_group;
    Product *products;
    u32 product_count, product_room, product_group;
} Warp;

/* Fields as in executor.py. */
typedef struct {
    const Ins *code;
    const s32 *pool;
    s32 warps, reg_bytes, const_bytes; /* registers first, then constants */
    const u8 *constants;
    const u8 *params;
    s32 param_bytes, shared_bytes;
    s32 grid[3];
    s32 buffer_count;
    s32 early_copies; /* cp.async writes when it is issued, too */
    u64 seed;
    Buffer *buffers;
    Violations *violations;
} Launch;

typedef struct {
    const Launch *launch;
    u8 *shared;
    Cell *cells;
    Warp warp[MAX_WARPS];
    s32 program, current; /* that runs, and its warp */
    s32 line;             /* of the PTX text */
    u32 epoch, time;
} Machine;

/* The register of an operand: `warp` and `pool` are those of the instruction. */
#define REG32(k) ((u32 *)(warp->regs + pool[k]))
#define REG64(k) ((u64 *)(warp->regs + pool[k]))
#define REG_F64(k) ((f64 *)(warp->regs + pool[k]))

void note(Machine *m, int kind, int lane, int other, u64 address, s64 extra);

/* lanes.c */
typedef u8 Kept[8][256];
int needs_all_lanes(int op);
void start_lanes(Warp *warp);
void part_lanes(Warp *warp, u32 branching, u32 target);
void keep_results(const Warp *warp, const Ins *ins, const s32 *pool, Kept kept);
void give_back_results(Warp *warp, const Ins *ins, const s32 *pool, Kept kept);

/* memory.c; mask: the lanes that take part */
void load_global(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask);
void store_global(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask);
void load_shared(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask);
void store_shared(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask);
void load_matrix(Machine *m, Warp *warp, const Ins *ins, const s32 *pool);
void store_matrix(Machine *m, Warp *warp, const Ins *ins, const s32 *pool);
void copy_async(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask);
void wait_for_copies(Machine *m, Warp *warp, u32 groups_left);
u64 element_of(const Ins *ins, const u8 *from);
int shared_at(Machine *m, u32 address, u32 bytes, int lane);
void check_read(Machine *m, u32 at, u32 bytes, int lane);

/* products.c */
void mma_half(const Warp *warp, const s32 *pool, int K, int flags);
void mma_tf32(const Warp *warp, const s32 *pool);
void mma_f64(const Warp *warp, const s32 *pool, int rows, int K);
void issue_wgmma(Machine *m, Warp *warp, const Ins *ins, const s32 *pool);
void wait_for_wgmma(Machine *m, Warp *warp, u32 groups_left);

#endif
