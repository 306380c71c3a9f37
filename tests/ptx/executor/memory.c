/* Global and shared memory, asynchronous copies, and what is checked at every access. */
#include <stdlib.h>

#include "machine.h"

/* ---- global memory ---- */

static void check_alignment(Machine *m, u64 address, u32 bytes, int lane) {
    if (address & (bytes - 1)) note(m, V_ALIGNMENT, lane, -1, address, bytes);
}

/* The tensor that an address belongs to: executor.py lays them 2**40 apart. */
static Buffer *buffer_of(Machine *m, u64 address, u32 bytes, int lane, u64 *offset) {
    const Launch *launch = m->launch;
    u64 index = (address >> 40) - 1;
    if (index >= (u64)launch->buffer_count) {
        note(m, V_BOUNDS, lane, -1, address, bytes);
        return NULL;
    }
    Buffer *buffer = &launch->buffers[index];
    *offset = address - buffer->base;
    if (address < buffer->base || *offset + bytes > buffer->size) {
        note(m, V_BOUNDS, lane, (int)index, address, (s64)(address - buffer->base));
        return NULL;
    }
    return buffer;
}

/* align: of the instruction, more than `bytes` where a copy is filled up with zeros */
static void read_global(Machine *m, u64 address, u32 bytes, u32 align, int lane, u8 *into) {
    u64 offset;
    check_alignment(m, address, align, lane);
    Buffer *buffer = buffer_of(m, address, bytes, lane, &offset);
    if (!buffer) {
        memset(into, 0xff, bytes);
        return;
    }
    int index = (int)(buffer - m->launch->buffers);
    if (buffer->written && memchr(buffer->written + offset, 0, bytes))
        note(m, V_UNWRITTEN_GLOBAL, lane, index, address, (s64)offset);
    u64 end = (offset + bytes + GRAIN - 1) / GRAIN;
    for (u64 i = offset / GRAIN; buffer->writer && i < end; i++) {
        u32 by = buffer->writer[i], self = (u32)m->program + 1;
        if (by && by != self) note(m, V_OTHER_PROGRAM, lane, (int)by - 1, address, (s64)offset);
        u32 others = buffer->reader[i];
        buffer->reader[i] = others && others != self ? (u32)SEVERAL : self;
    }
    memcpy(into, buffer->host + offset, bytes);
}

static void write_global(Machine *m, u64 address, u32 bytes, int lane, const u8 *from) {
    u64 offset;
    check_alignment(m, address, bytes, lane);
    Buffer *buffer = buffer_of(m, address, bytes, lane, &offset);
    if (!buffer) return;
    if (!buffer->writer) {
        note(m, V_READ_ONLY, lane, (int)(buffer - m->launch->buffers), address, (s64)offset);
        return;
    }
    if (buffer->written) memset(buffer->written + offset, 1, bytes);
    u64 end = (offset + bytes + GRAIN - 1) / GRAIN;
    for (u64 i = offset / GRAIN; i < end; i++) {
        u32 by = buffer->writer[i], reader = buffer->reader[i], self = (u32)m->program + 1;
        if (by) note(m, V_WRITTEN_TWICE, lane, (int)by - 1, address, (s64)offset);
        if (reader && reader != self)
            note(m, V_OTHER_PROGRAM, lane, (int)reader - 1, address, (s64)offset);
        buffer->writer[i] = self;
    }
    memcpy(buffer->host + offset, from, bytes);
}

/* An element of memory or of a parameter, extended by its sign or by zeros. */
u64 element_of(const Ins *ins, const u8 *from) {
    u64 value = 0;
    int above = 64 - 8 * ins->size;
    memcpy(&value, from, (size_t)ins->size);
    return ins->flags & SIGNED ? (u64)((s64)(value << above) >> above) : value;
}

/* Between the registers of a lane and consecutive elements of memory: operands from the first on
 * for a load, from the second on for a store. */
static void to_registers(Warp *warp, const Ins *ins, const s32 *pool, int lane, const u8 *from) {
    for (int i = 0; i < ins->vector; i++) {
        u64 value = element_of(ins, from + ins->size * i);
        if (ins->flags & WIDE) REG64(i)[lane] = value;
        else REG32(i)[lane] = ins->size == 2 ? (u16)value : (u32)value;
    }
}

static void from_registers(Warp *warp, const Ins *ins, const s32 *pool, int lane, u8 *into) {
    for (int i = 0; i < ins->vector; i++) {
        if (ins->flags & WIDE) memcpy(into + ins->size * i, &REG64(1 + i)[lane], (size_t)ins->size);
        else memcpy(into + ins->size * i, &REG32(1 + i)[lane], (size_t)ins->size);
    }
}

/* operands: data..., address */
void load_global(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask) {
    const u64 *base = REG64(ins->operands - 1);
    u32 bytes = (u32)(ins->size * ins->vector);
    u64 address[LANES]; /* the base may be one of the results */
    u8 data[16];
    for (int l = 0; l < LANES; l++) address[l] = base[l] + (u64)ins->imm;
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        read_global(m, address[l], bytes, bytes, l, data);
        to_registers(warp, ins, pool, l, data);
    }
}

/* operands: address, data... */
void store_global(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask) {
    u8 data[16];
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        from_registers(warp, ins, pool, l, data);
        write_global(m, REG64(0)[l] + (u64)ins->imm, (u32)(ins->size * ins->vector), l, data);
    }
}

/* ---- shared memory ---- */

/* Offset of an address, or -1 where it is none. */
int shared_at(Machine *m, u32 address, u32 bytes, int lane) {
    if (address & (bytes - 1)) {
        note(m, V_SHARED_ALIGNMENT, lane, -1, address, bytes);
        return -1;
    }
    if (address < SHARED_BASE || address + bytes > SHARED_BASE + (u32)m->launch->shared_bytes) {
        note(m, V_SHARED_BOUNDS, lane, -1, address, bytes);
        return -1;
    }
    return (int)(address - SHARED_BASE);
}

/* Before the current warp reads; lane ALL_LANES where the lanes read together, as for matrices, or
 * NO_LANE. */
void check_read(Machine *m, u32 at, u32 bytes, int lane) {
    int w = m->current;
    for (u32 i = 0; i < bytes; i += GRAIN) {
        Cell *c = &m->cells[(at + i) / GRAIN];
        u32 address = at + i + SHARED_BASE;
        int fresh = c->write_epoch == m->epoch;
        if (c->pending) note(m, V_READ_OF_COPY, lane, c->writer, address, 0);
        else if (!c->written) note(m, V_UNWRITTEN_SHARED, lane, -1, address, 0);
        else if (fresh && c->writer != w) note(m, V_READ_AFTER_WRITE, lane, c->writer, address, 0);
        else if (fresh && c->write_warp_epoch == m->warp[w].warp_epoch && c->lane != (u8)lane)
            note(m, V_LANES, lane, c->lane, address, 0);
        if (c->raced) {
            note(m, V_WRITE_AFTER_WRITE, lane, (int)c->raced - 1, address, 1);
            c->raced = 0;
        }
        if (c->read_epoch != m->epoch) {
            c->read_epoch = m->epoch;
            c->readers = 0;
        }
        c->readers |= 1u << w;
        if (lane == NO_LANE) continue;
        int again = c->reader == w && c->read_warp_epoch == m->warp[w].warp_epoch;
        c->read_lane = again && c->read_lane != (u8)lane ? (u8)ALL_LANES : (u8)lane;
        c->reader = (u8)w;
        c->read_warp_epoch = m->warp[w].warp_epoch;
    }
}

/* Whether all copies in flight to a place bring these GRAIN bytes, too. */
static int same_copy(Machine *m, u32 at, const u8 *data) {
    for (int w = 0; w < m->launch->warps; w++)
        for (u32 i = 0; i < m->warp[w].copy_count; i++) {
            const Copy *c = &m->warp[w].copies[i];
            if (c->address <= at && at < c->address + c->size &&
                memcmp(c->data + (at - c->address), data, GRAIN))
                return 0;
        }
    return 1;
}

/* Before the current warp writes. Warps that hold the same values may write them to the same place
 * at the same time, and Triton makes them do so: no race where the bytes do not change. */
static void check_write(Machine *m, u32 at, u32 bytes, int lane, int is_copy, const u8 *data) {
    int w = m->current;
    for (u32 i = 0; i < bytes; i += GRAIN) {
        Cell *c = &m->cells[(at + i) / GRAIN];
        u32 address = at + i + SHARED_BASE;
        int same = c->written && !memcmp(m->shared + at + i, data + i, GRAIN);
        if (c->pending && !(is_copy && same_copy(m, at + i, data + i)))
            note(m, V_WRITE_OVER_COPY, lane, c->writer, address, is_copy);
        if (c->async_readers && !same) note(m, V_WRITE_OVER_OPERAND, lane, -1, address, is_copy);
        if (c->written && c->write_epoch == m->epoch && c->writer != w && !same)
            c->raced = (u32)m->line + 1;
        else if (c->write_epoch != m->epoch) c->raced = 0;
        if (c->read_epoch == m->epoch && (c->readers & ~(1u << w)) && !same)
            note(m, V_WRITE_AFTER_READ, lane, (int)c->readers, address, is_copy);
        if (c->reader == w && c->read_warp_epoch == m->warp[w].warp_epoch &&
            c->read_lane != (u8)lane && !same)
            note(m, V_LANES, lane, c->read_lane, address, 1);
        c->writer = (u8)w;
        c->lane = (u8)lane;
        c->write_warp_epoch = m->warp[w].warp_epoch;
        if (is_copy) c->pending = 1;
        else {
            c->write_epoch = m->epoch;
            c->write_time = m->time;
            c->written = 1;
            c->copied = 0;
        }
    }
}

/* operands: data..., address */
void load_shared(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask) {
    const u32 *base = REG32(ins->operands - 1);
    u32 bytes = (u32)(ins->size * ins->vector), address[LANES];
    for (int l = 0; l < LANES; l++) address[l] = base[l] + (u32)ins->imm;
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        int at = shared_at(m, address[l], bytes, l);
        if (at < 0) continue;
        check_read(m, (u32)at, bytes, l);
        to_registers(warp, ins, pool, l, m->shared + at);
    }
}

/* operands: address, data... */
void store_shared(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask) {
    u32 bytes = (u32)(ins->size * ins->vector);
    u8 data[16];
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        int at = shared_at(m, REG32(0)[l] + (u32)ins->imm, bytes, l);
        if (at < 0) continue;
        from_registers(warp, ins, pool, l, data);
        check_write(m, (u32)at, bytes, l, 0, data);
        memcpy(m->shared + at, data, bytes);
    }
}

/* operands: data..., address. Lanes 8i to 8i + 7 hold the addresses of the rows of matrix i. */
void load_matrix(Machine *m, Warp *warp, const Ins *ins, const s32 *pool) {
    const u32 *base = REG32(ins->operands - 1);
    u16 tile[4][8][8];
    memset(tile, 0xff, sizeof tile);
    for (int l = 0; l < 8 * ins->vector; l++) {
        int at = shared_at(m, base[l] + (u32)ins->imm, 16, l);
        if (at < 0) continue;
        check_read(m, (u32)at, 16, ALL_LANES);
        memcpy(tile[l / 8][l % 8], m->shared + at, 16);
    }
    for (int i = 0; i < ins->vector; i++)
        for (int l = 0; l < LANES; l++) {
            int r = l / 4, c = l % 4 * 2;
            REG32(i)[l] = ins->flags & TRANSPOSED
                              ? tile[i][c][r] | (u32)tile[i][c + 1][r] << 16
                              : tile[i][r][c] | (u32)tile[i][r][c + 1] << 16;
        }
}

/* operands: address, data... */
void store_matrix(Machine *m, Warp *warp, const Ins *ins, const s32 *pool) {
    enum { WRITTEN_TOGETHER = 254 }; /* by no lane alone, so that any lane's read is an exchange */
    for (int l = 0; l < 8 * ins->vector; l++) {
        u16 row[8];
        int at = shared_at(m, REG32(0)[l] + (u32)ins->imm, 16, l), r = l % 8;
        const u32 *data = REG32(1 + l / 8);
        if (at < 0) continue;
        for (int c = 0; c < 8; c++)
            row[c] = (u16)(ins->flags & TRANSPOSED ? data[c * 4 + r / 2] >> (r & 1) * 16
                                                   : data[r * 4 + c / 2] >> (c & 1) * 16);
        check_write(m, (u32)at, 16, WRITTEN_TOGETHER, 0, (const u8 *)row);
        memcpy(m->shared + at, row, 16);
    }
}

/* ---- asynchronous copies ---- */

/* operands: shared address, global address, perhaps how many bytes to read; the rest are zeros.
 * Global memory is read when the copy is issued, shared memory written when it is waited for: as
 * late as allowed, so that whoever reads or writes there before is found. */
void copy_async(Machine *m, Warp *warp, const Ins *ins, const s32 *pool, u32 mask) {
    u32 bytes = (u32)ins->size;
    for (int l = 0; l < LANES; l++) {
        if (!(mask >> l & 1)) continue;
        u64 from = REG64(1)[l] + (u64)(s64)ins->flags;
        u32 take = ins->operands > 2 ? REG32(2)[l] : bytes;
        int at = shared_at(m, REG32(0)[l] + (u32)ins->imm, bytes, l);
        if (at < 0) continue;
        if (take > bytes) {
            note(m, V_BOUNDS, l, -3, from, take);
            take = bytes;
        }
        Copy copy = {(u32)at, warp->copy_group, (u8)bytes, (u8)l, {0}};
        if (take) read_global(m, from, take, bytes, l, copy.data);
        check_write(m, (u32)at, bytes, l, 1, copy.data);
        if (warp->copy_count == warp->copy_room) {
            warp->copy_room = 2 * warp->copy_room + 64;
            warp->copies = realloc(warp->copies, sizeof(Copy) * warp->copy_room);
        }
        warp->copies[warp->copy_count++] = copy;
        if (m->launch->early_copies) memcpy(m->shared + at, copy.data, bytes);
    }
}

void wait_for_copies(Machine *m, Warp *warp, u32 groups_left) {
    u32 kept = 0;
    for (u32 i = 0; i < warp->copy_count; i++) {
        const Copy *c = &warp->copies[i];
        if (c->group + groups_left >= warp->copy_group) {
            warp->copies[kept++] = *c;
            continue;
        }
        memcpy(m->shared + c->address, c->data, c->size);
        for (u32 j = 0; j < c->size; j += GRAIN) {
            Cell *cell = &m->cells[(c->address + j) / GRAIN];
            cell->pending = 0;
            cell->written = cell->copied = 1;
            cell->writer = (u8)m->current;
            cell->lane = c->lane;
            cell->write_epoch = m->epoch;
            cell->write_time = m->time;
            cell->write_warp_epoch = warp->warp_epoch;
        }
    }
    warp->copy_count = kept;
}
