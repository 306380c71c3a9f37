"""Lanes of a warp that branch apart: what they compute, and where they must be together."""

import pytest
import torch

from tests.ptx import compiled
from tests.ptx.snippets import kinds, lanes, run

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))

LANE = torch.arange(32)


def test_both_sides_of_a_branch() -> None:
    """Registers of every width and a predicate, each side with its own value."""
    body = """
    setp.lt.u32 %p1, %r1, 20;
    mov.b32 %r9, 5;
    @%p1 bra $low;
    add.u32 %r9, %r9, %r1;
    mov.b64 %rd5, 4294967296;
    setp.gt.u32 %p2, %r1, 25;
    mov.b32 {%rs1, %rs2}, 65538;
    bra.uni $end;
    $low:
    mov.b64 %rd5, 8589934592;
    setp.gt.u32 %p2, %r1, 3;
    mov.b32 {%rs2, %rs1}, 65538;
    $end:
    cvt.u64.u32 %rd9, %r9;
    add.u64 %rd9, %rd9, %rd5;
    selp.b64 %rd6, 1000, 0, %p2;
    add.u64 %rd9, %rd9, %rd6;
    cvt.u64.u16 %rd6, %rs1;
    mul.lo.u64 %rd6, %rd6, 10000;
    add.u64 %rd9, %rd9, %rd6;
    """
    low = LANE < 20
    want = torch.where(low, 5 + 2 * 2**32, 5 + LANE + 2**32)
    want += 1000 * torch.where(low, LANE > 3, LANE > 25)
    want += 10000 * torch.where(low, 1, 2)
    assert torch.equal(lanes(body, bits=64), want)


def test_guards_inside_a_branch() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 20;
    setp.gt.u32 %p2, %r1, 9;
    setp.lt.u32 %p3, %r1, 0;
    mov.b32 %r9, 0;
    @!%p1 bra $end;
    @%p2 add.u32 %r9, %r9, 1;
    @!%p2 add.u32 %r9, %r9, 10;
    @%p2 setp.lt.u32 %p3, %r1, 99;
    $end:
    @%p3 add.u32 %r9, %r9, 100;
    """
    want = torch.where(LANE < 20, torch.where(LANE > 9, 101, 10), 0)
    assert torch.equal(lanes(body), want)


@pytest.mark.parametrize("lane", [0, 13, 31])
def test_a_branch_of_one_lane(lane: int) -> None:
    body = f"""
    mov.b32 %r9, 5;
    setp.ne.u32 %p1, %r1, {lane};
    @%p1 bra $end;
    mov.b32 %r9, 6;
    $end:
    bar.warp.sync -1;
    """
    assert torch.equal(lanes(body), torch.where(lane == LANE, 6, 5))


@pytest.mark.parametrize("flip", [0, 31])
def test_a_loop_that_lanes_leave_one_by_one(flip: int) -> None:
    """The first or the last lane first; with a branch inside that some of those left take."""
    body = f"""
    mov.b32 %r9, 0;
    mov.b32 %r2, 0;
    xor.b32 %r1, %r1, {flip};
    $loop:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra $end;
    add.u32 %r2, %r2, 1;
    and.b32 %r3, %r2, 1;
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra $even;
    add.u32 %r9, %r9, 100;
    bra.uni $loop;
    $even:
    setp.gt.u32 %p3, %r1, 16;
    @%p3 bra $loop;
    add.u32 %r9, %r9, %r2;
    bra.uni $loop;
    $end:
    bar.warp.sync -1;
    """

    def of(steps: int) -> int:
        return sum(100 if n % 2 else 0 if steps > 16 else n for n in range(1, steps + 1))

    assert lanes(body).tolist() == [of(lane ^ flip) for lane in range(32)]


def test_only_lanes_of_the_branch_use_memory() -> None:
    """Loads, stores and copies; the others' addresses are out of bounds."""
    source, out = torch.arange(100, 120), torch.full((20,), -1)
    body = """
    mad.wide.u32 %rd10, %r0, 8, %rd0;
    mad.wide.u32 %rd11, %r0, 8, %rd1;
    mov.b32 %r20, global_smem;
    mad.lo.u32 %r20, %r0, 8, %r20;
    mov.b64 %rd12, 7;
    setp.ge.u32 %p1, %r0, 20;
    @%p1 bra $end;
    cp.async.ca.shared.global [%r20], [%rd10], 8;
    ld.global.b64 %rd12, [%rd10];
    st.shared.b64 [%r20 + 256], %rd12;
    ld.shared.b64 %rd13, [%r20 + 256];
    add.u64 %rd13, %rd13, 1000;
    st.global.b64 [%rd11], %rd13;
    $end:
    cp.async.wait_all;
    bar.sync 0;
    """
    assert not run(body, [source], [out], shared=416).violations
    assert torch.equal(out, source + 1000)
    without = run(body.replace("@%p1 bra $end;", ""), [source], [out], shared=416)
    assert kinds(without) == {"global access out of bounds", "shared access out of bounds"}


TOGETHER = [
    "bar.sync 0;",
    "bar.warp.sync -1;",
    "shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;",
    "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r20];",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%r1};",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
    "{%r4, %r5, %r6, %r7}, {%r1, %r1}, {%r1}, {%r1, %r1, %r1, %r1};",
    "cp.async.commit_group;",
    "cp.async.wait_group 0;",
    "cp.async.wait_all;",
    "fence.proxy.async.shared::cta;",
    "wgmma.fence.sync.aligned;",
    "wgmma.commit_group.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
    "ret;",
]


@pytest.mark.parametrize("instruction", TOGETHER, ids=lambda text: text.split()[0].strip(";"))
def test_instructions_of_a_whole_warp(instruction: str) -> None:
    """Behind a branch all lanes have come together; on one side of it some are missing."""
    start = """
    mov.b32 %r20, global_smem;
    shl.b32 %r21, %r0, 4;
    add.u32 %r20, %r20, %r21;
    st.shared.v4.b32 [%r20], {%r0, %r0, %r0, %r0};
    bar.warp.sync -1;
    setp.lt.u32 %p1, %r0, LIMIT;
    @%p1 bra $end;
    """
    between = f"{start}{instruction}\n$end:\nmov.b32 %r8, 1;"
    behind = f"{start}mov.b32 %r8, 1;\n$end:\n{instruction}"

    def found(body: str, limit: int) -> set[str]:
        return kinds(run(body.replace("LIMIT", str(limit)), [], [torch.zeros(1)], shared=512))

    assert found(between, 32) == found(between, 0) == found(behind, 20) == set()
    assert found(between, 20) == {"divergent lanes or operand"}


def test_barriers_of_two_sides() -> None:
    """They are none of the whole warp; and the next program begins with all lanes together."""
    body = """
    mov.u32 %r2, %ctaid.x;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra $end;
    setp.lt.u32 %p1, %r0, 20;
    @%p1 bra $other;
    bar.sync 0;
    bra.uni $end;
    $other:
    bar.sync 0;
    $end:
    """
    (violation,) = run(body, [], [torch.zeros(1)], programs=3).violations
    assert violation.startswith("divergent lanes or operand: 1 times, first: program 0")


@pytest.mark.parametrize("synchronised", [True, False])
def test_sides_that_exchange_data(synchronised: bool) -> None:
    """What one side of a branch writes, the other may read after a barrier of the warp alone."""
    body = """
    mov.b32 %r20, global_smem;
    shl.b32 %r21, %r0, 2;
    add.u32 %r20, %r20, %r21;
    setp.ge.u32 %p1, %r0, 16;
    @%p1 bra $written;
    st.shared.b32 [%r20], %r0;
    $written:
    BARRIER
    @!%p1 bra $end;
    ld.shared.b32 %r9, [%r20 + -64];
    $end:
    """.replace("BARRIER", "bar.warp.sync -1;" * synchronised)
    found = kinds(run(body, [], [torch.zeros(1)], shared=128))
    assert found == (
        set() if synchronised else {"lanes of a warp exchange data without bar.warp.sync"}
    )


def test_warps_part_each_on_its_own() -> None:
    body = """
    mad.wide.u32 %rd10, %r0, 4, %rd0;
    mov.b32 %r9, 1;
    setp.lt.u32 %p1, %r0, 72;
    @%p1 bra $low;
    mov.b32 %r9, 2;
    bra.uni $end;
    $low:
    mov.b32 %r9, 3;
    $end:
    bar.sync 0;
    st.global.b32 [%rd10], %r9;
    """
    thread = torch.arange(128)
    for seed in range(4):
        out = torch.zeros(128, dtype=torch.int32)
        assert not run(body, [], [out], warps=4, seed=seed).violations
        assert torch.equal(out.long(), torch.where(thread < 72, 3, 2))
