"""Matrix products and matrix loads against float64, and the checks of asynchronous ones."""

import pytest
import torch
from torch import Tensor

from tests.ptx import compiled
from tests.ptx.snippets import kinds, run

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f64": torch.float64}


def registers(prefix: str, count: int, first: int) -> str:
    return "{" + ", ".join(f"{prefix}{first + i}" for i in range(count)) + "}"


def fragments(kind: str, values: Tensor, count: int, place) -> Tensor:
    """The registers of a warp [32, count]; ``place(lane, register, element)`` is an index."""
    halves = 2 if kind in ("bf16", "f16") else 1
    flat = [
        values[place(lane, r, e)] for lane in range(32) for r in range(count) for e in range(halves)
    ]
    return torch.stack(flat).view(32, count * halves).contiguous()


def multiplied(op: str, kind: str, m: int, k: int, counts: tuple[int, int, int]) -> None:
    """Run ``op`` on random operands [m, k], [k, 8]; layouts as in the PTX ISA's figures."""
    torch.manual_seed(k)
    dtype = TYPES[kind]
    na, nb, nc = counts
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, 8).to(dtype)
    c = torch.randn(m, 8).to(torch.float64 if kind == "f64" else torch.float32)
    halves = 2 if kind in ("bf16", "f16") else 1
    wide = 8 // (4 // halves) if halves == 2 else 4  # columns of A that registers 2 and 3 are right

    def of_a(lane: int, r: int, e: int) -> tuple[int, int]:
        rows = m // 8  # 1 or 2 blocks of 8 rows
        return lane // 4 + 8 * (r % rows), lane % 4 * halves + e + r // rows * (
            8 if halves == 2 else wide
        )

    def of_b(lane: int, r: int, e: int) -> tuple[int, int]:
        return lane % 4 * halves + e + r * (8 if halves == 2 else 4), lane // 4

    def of_c(lane: int, r: int, e: int) -> tuple[int, int]:
        return lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2

    fa, fb = fragments(kind, a, na, of_a), fragments(kind, b, nb, of_b)
    fc = fragments("f32", c, nc, of_c)
    out = torch.zeros_like(fc)
    prefix, bits = ("%rd", 64) if kind == "f64" else ("%r", 32)
    load = ""
    for index, (count, first) in enumerate(((na, 20), (nb, 30), (nc, 40))):
        load += f"mad.wide.u32 %rd10, %r0, {count * bits // 8}, %rd{index};\n"
        for i in range(count):
            load += f"ld.global.b{bits} {prefix}{first + i}, [%rd10 + {i * bits // 8}];\n"
    body = f"{load}{op} {registers(prefix, nc, 50)}, {registers(prefix, na, 20)}, "
    body += f"{registers(prefix, nb, 30)}, {registers(prefix, nc, 40)};\n"
    body += f"mad.wide.u32 %rd10, %r0, {nc * bits // 8}, %rd3;\n"
    for i in range(nc):
        body += f"st.global.b{bits} [%rd10 + {i * bits // 8}], {prefix}{50 + i};\n"
    assert not run(body, [fa, fb, fc], [out]).violations
    if kind == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    want = a.double() @ b.double() + c.double()
    got = torch.empty_like(want)
    for lane in range(32):
        for r in range(nc):
            got[of_c(lane, r, 0)] = out[lane, r].double()
    tolerance = 1e-14 if kind == "f64" else 2e-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "kind", "m", "k", "counts"),
    [
        ("m16n8k16", "bf16", 16, 16, (4, 2, 4)),
        ("m16n8k16", "f16", 16, 16, (4, 2, 4)),
        ("m16n8k8", "bf16", 16, 8, (2, 1, 4)),
        ("m16n8k8", "f16", 16, 8, (2, 1, 4)),
        ("m16n8k8", "tf32", 16, 8, (4, 2, 4)),
        ("m8n8k4", "f64", 8, 4, (1, 1, 2)),
        ("m16n8k16", "f64", 16, 16, (8, 4, 4)),
    ],
)
def test_mma(shape: str, kind: str, m: int, k: int, counts: tuple[int, int, int]) -> None:
    sums = "f64" if kind == "f64" else "f32"
    op = f"mma.sync.aligned.{shape}.row.col.{sums}.{kind}.{kind}.{sums}"
    multiplied(op, kind, m, k, counts)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Matrices through shared memory: stored by rows, loaded as fragments; and the way back."""
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out, back = torch.zeros(32, count, 2, dtype=torch.int16), torch.zeros_like(matrices)
    trans = ".trans" if transposed else ""
    body = f"""
    mov.b32 %r20, global_smem;
    shl.b32 %r21, %r0, 4;
    add.u32 %r20, %r20, %r21;
    mad.wide.u32 %rd10, %r0, 16, %rd0;
    setp.lt.u32 %p1, %r0, {8 * count};
    @%p1 ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd10];
    @%p1 st.shared.v4.b32 [%r20], {{%r30, %r31, %r32, %r33}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers("%r", count, 40)}, [%r20];
    mad.wide.u32 %rd11, %r0, {4 * count}, %rd1;
    """
    for i in range(count):
        body += f"st.global.b32 [%rd11 + {4 * i}], %r{40 + i};\n"
    stored = registers("%r", count, 40)
    body += f"""
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r20 + 512], {stored};
    bar.sync 0;
    mad.wide.u32 %rd12, %r0, 16, %rd2;
    @%p1 ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r20 + 512];
    @%p1 st.global.v4.b32 [%rd12], {{%r30, %r31, %r32, %r33}};
    """
    assert not run(body, [matrices], [out, back], shared=1024).violations
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for i in range(count):
            want = matrices[i].T if transposed else matrices[i]
            assert out[lane, i].tolist() == want[row, column : column + 2].tolist()
    assert torch.equal(back, matrices)


# ---- wgmma: A [64, 16] and B [16, 8] of bf16 in shared memory, without a swizzle ----

# Blocks of 8 rows by 16 bytes, rows of a block one after another: along k blocks are 128 bytes
# apart, along rows 256.
LEADING, STRIDE = 128 >> 4, 256 >> 4
B_PLACE = 4096
SETUP = """
mov.b32 %r20, global_smem;
mad.lo.u32 %r21, %r0, 16, %r20;
mad.wide.u32 %rd10, %r0, 16, %rd0;
ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd10];
st.shared.v4.b32 [%r21], {%r30, %r31, %r32, %r33};
setp.lt.u32 %p1, %r0, 16;
mad.wide.u32 %rd11, %r0, 16, %rd1;
@%p1 ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd11];
@%p1 st.shared.v4.b32 [%r21 + 4096], {%r30, %r31, %r32, %r33};
mov.b32 %r50, 0;
mov.b32 %r51, 0;
mov.b32 %r52, 0;
mov.b32 %r53, 0;
"""
DESCRIPTORS = f"""
shr.u32 %r22, %r20, 4;
cvt.u64.u32 %rd20, %r22;
add.u64 %rd20, %rd20, {LEADING << 16 | STRIDE << 32};
add.u64 %rd21, %rd20, {B_PLACE >> 4};
"""
FENCES = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
PRODUCT = """
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {%r50, %r51, %r52, %r53}, %rd20, %rd21, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
"""
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
STORE = """
mad.wide.u32 %rd12, %r0, 16, %rd2;
st.global.v4.b32 [%rd12], {%r50, %r51, %r52, %r53};
"""


def warpgroup(body: str) -> tuple[set[str], bool]:
    """Violations, and whether the result is right."""
    torch.manual_seed(3)
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    in_blocks = a.view(8, 8, 2, 8).permute(0, 2, 1, 3).contiguous()  # [row block, k block, row, k]
    b_blocks = b.T.reshape(8, 2, 8).permute(1, 0, 2).contiguous()  # [k block, n, k]
    out = torch.zeros(128, 4)
    record = run(body, [in_blocks, b_blocks], [out], warps=4, shared=8192)
    right = torch.allclose(sums(out), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    return kinds(record), right


def sums(registers_of: Tensor) -> Tensor:
    """The result [64, 8] from the registers [128, 4] of a warp group."""
    found = torch.empty(64, 8, dtype=torch.float64)
    for thread in range(128):
        for r in range(4):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (r // 2)
            found[row, thread % 4 * 2 + r % 2] = registers_of[thread, r].double()
    return found


def test_wgmma() -> None:
    assert warpgroup(SETUP + DESCRIPTORS + FENCES + PRODUCT + WAIT + STORE) == (set(), True)


def swizzled(rows: Tensor, width: int) -> Tensor:
    """Rows of elements in memory: ``width`` bytes a row, its 16-byte chunks exchanged.

    As in the figures of the PTX ISA: chunk c of row r lies at c xor r % 8 for 128 bytes, at c xor
    r / 2 % 4 for 64, at c xor r / 4 % 2 for 32.
    """
    chunks = width // 16
    memory = torch.zeros(len(rows), chunks, 8, dtype=rows.dtype)
    for r, row in enumerate(rows.contiguous().view(len(rows), -1, 8)):
        for c, chunk in enumerate(row):
            memory[r, c ^ r * chunks // 8 % chunks] = chunk
    return memory


@pytest.mark.parametrize(
    ("width", "mode", "transposed"),
    [
        *((width, mode, (0, b)) for width, mode in ((32, 3), (64, 2), (128, 1)) for b in (0, 1)),
        *((128, 1, (1, b)) for b in (0, 1)),  # 64 rows of A take 128 bytes
    ],
)
def test_wgmma_of_swizzled_operands(width: int, mode: int, transposed: tuple[int, int]) -> None:
    """Contiguous along k or transposed: along rows of A, 128 bytes, and along columns of B."""
    torch.manual_seed(width)
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    a_image = swizzled(a.T if transposed[0] else a, width).flatten()
    image = torch.cat([a_image, swizzled(b if transposed[1] else b.T, width).flatten()])
    out = torch.zeros(128, 4)
    copies = "mov.b32 %r20, global_smem;\nmad.lo.u32 %r21, %r0, 16, %r20;\n"
    for start in range(0, image.numel() * 2, 2048):
        copies += f"""
        setp.lt.u32 %p1, %r0, {(image.numel() * 2 - start) // 16};
        mad.wide.u32 %rd10, %r0, 16, %rd0;
        @%p1 ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd10 + {start}];
        @%p1 st.shared.v4.b32 [%r21 + {start}], {{%r30, %r31, %r32, %r33}};
        """
    descriptors = f"""
    shr.u32 %r22, %r20, 4;
    cvt.u64.u32 %rd20, %r22;
    add.u64 %rd20, %rd20, {mode << 62 | (8 * width >> 4) << 32};
    add.u64 %rd21, %rd20, {a_image.numel() * 2 >> 4};
    """
    flags = ", ".join(map(str, transposed))
    product = PRODUCT.replace("1, 1, 1, 0, 0;", f"0, 1, 1, {flags};")
    store = STORE.replace("%rd2;", "%rd1;")
    body = copies + descriptors + FENCES + product + WAIT + store
    assert not run(body, [image], [out], warps=4, shared=16384).violations
    torch.testing.assert_close(sums(out), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_wgmma_with_the_first_operand_in_registers() -> None:
    load = """
    mov.u32 %r23, %tid.x;
    shr.u32 %r24, %r23, 5;
    shl.b32 %r24, %r24, 9;
    and.b32 %r25, %r23, 31;
    and.b32 %r26, %r25, 7;
    shl.b32 %r26, %r26, 4;
    add.u32 %r24, %r24, %r26;
    and.b32 %r26, %r25, 8;
    shl.b32 %r26, %r26, 5;
    add.u32 %r24, %r24, %r26;
    and.b32 %r26, %r25, 16;
    shl.b32 %r26, %r26, 3;
    add.u32 %r24, %r24, %r26;
    add.u32 %r24, %r24, %r20;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r60, %r61, %r62, %r63}, [%r24];
    """
    product = PRODUCT.replace(
        "%rd20, %rd21, 1, 1, 1, 0, 0", "{%r60, %r61, %r62, %r63}, %rd21, 1, 1, 1, 0"
    )
    body = SETUP + DESCRIPTORS + FENCES + load + product + WAIT + STORE
    assert warpgroup(body) == (set(), True)
    # sums and operands are left alone until the wait
    for change, violation in (("mov.b32 %r60, 0;\n", True), ("mov.b32 %r9, %r60;\n", False)):
        kinds_, right = warpgroup(body.replace(WAIT, change + WAIT))
        assert kinds_ == ({"register of a wgmma in flight"} if violation else set())
        assert right is not violation


def test_scale_by_a_predicate_starts_a_sum() -> None:
    product = PRODUCT.replace("%rd21, 1, 1, 1", "%rd21, %p3, 1, 1")
    for value, expected in ((0, True), (1, False)):
        start = f"mov.b32 %r50, 0f3F800000;\nsetp.ne.b32 %p3, {value}, 0;\n"
        _, right = warpgroup(SETUP + start + DESCRIPTORS + FENCES + product + WAIT + STORE)
        assert right is expected


def test_result_read_before_the_wait() -> None:
    kinds_, right = warpgroup(SETUP + DESCRIPTORS + FENCES + PRODUCT + STORE + WAIT)
    assert kinds_ == {"register of a wgmma in flight"} and not right


def test_product_never_waited_for() -> None:
    kinds_, _ = warpgroup(SETUP + DESCRIPTORS + FENCES + PRODUCT)
    assert kinds_ == {"register of a wgmma in flight"}


def test_operand_overwritten_while_it_is_read() -> None:
    write = "bar.sync 0;\nst.shared.v4.b32 [%r21], {%r0, %r0, %r0, %r0};\n"
    kinds_, right = warpgroup(SETUP + DESCRIPTORS + FENCES + PRODUCT + write + WAIT + STORE)
    assert kinds_ == {"write over an operand of a wgmma in flight"} and not right
    assert warpgroup(SETUP + DESCRIPTORS + FENCES + PRODUCT + WAIT + write + STORE) == (set(), True)
    own_rows = write.removeprefix("bar.sync 0;\n")  # which no other warp reads, and no lane alone
    after = SETUP + DESCRIPTORS + FENCES + PRODUCT + WAIT + own_rows + STORE
    assert warpgroup(after) == (set(), True)


def test_proxy_fence_missing() -> None:
    expected = {"wgmma reads what was written without fence.proxy.async"}
    kinds_, _ = warpgroup(SETUP + DESCRIPTORS + "bar.sync 0;\n" + PRODUCT + WAIT + STORE)
    assert kinds_ == expected
    # the reader's own fence after the barrier serves as well
    late = "bar.sync 0;\nfence.proxy.async.shared::cta;\n"
    assert warpgroup(SETUP + DESCRIPTORS + late + PRODUCT + WAIT + STORE) == (set(), True)


def test_proxy_fence_of_a_copy_missing() -> None:
    load = "ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd10];\n"
    store = "st.shared.v4.b32 [%r21], {%r30, %r31, %r32, %r33};\n"
    copied = SETUP.replace(load, "").replace(
        store, "cp.async.cg.shared.global [%r21], [%rd10], 16;\n", 1
    )
    fenced = "cp.async.wait_all;\n" + FENCES
    assert warpgroup(copied + DESCRIPTORS + fenced + PRODUCT + WAIT + STORE) == (set(), True)
    early = FENCES + "cp.async.wait_all;\nbar.sync 0;\n"
    kinds_, _ = warpgroup(copied + DESCRIPTORS + early + PRODUCT + WAIT + STORE)
    assert kinds_ == {"wgmma reads an asynchronous copy without fence.proxy.async"}


def test_registers_changed_without_wgmma_fence() -> None:
    product = PRODUCT.replace("wgmma.fence.sync.aligned;\n", "")
    kinds_, _ = warpgroup(SETUP + DESCRIPTORS + FENCES + product + WAIT + STORE)
    assert kinds_ == {"register changed without wgmma.fence"}


def test_descriptors_that_differ_between_lanes() -> None:
    differ = "cvt.u64.u32 %rd22, %r1;\nadd.u64 %rd21, %rd21, %rd22;\n"
    kinds_, _ = warpgroup(SETUP + DESCRIPTORS + differ + FENCES + PRODUCT + WAIT + STORE)
    assert "divergent lanes or operand" in kinds_
