"""What the Hopper kernels take, and what they are launched with."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from smlp_kernels.hopper import plan as hopper_plan
from smlp_kernels.hopper.plan import call_of, make_plan
from smlp_kernels.launch import Plan
from smlp_kernels.weights import Weights
from tests.smlp_kernels.hopper.stub import BFLOAT16, block

SMS = 132


def plan_of(batch: int, channels: int, height: int, width: int, transposed: bool = False) -> Plan:
    projs, fuse = (height, 1, width, 1), (3 * channels, channels, 1)
    if transposed:
        projs, fuse = (1, height, 1, width), fuse[::-1]
    shape = torch.Size((batch, channels, height, width))
    plan = make_plan(shape, BFLOAT16, projs, fuse, SMS)
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "groups", "blocks", "lines", "passes"),
    [  # batch 128
        (14, 320, "200", 128, 1, 14, 2),
        (14, 384, "200", 128, 1, 14, 2),
        (14, 448, "200", 128, 1, 14, 3),
        (7, 640, "248", 26, 5, 35, 5),
        (7, 768, "200", 32, 4, 28, 4),
        (7, 896, "248", 26, 5, 35, 5),
        (16, 64, "256", 128, 1, 16, 1),
        (28, 160, "strips", 512, 1, 7, 1),
        (28, 192, "strips", 512, 1, 7, 1),
        (32, 64, "strips", 768, 1, 6, 1),
    ],
)
def test_stages(
    size: int, channels: int, kernel: str, groups: int, blocks: int, lines: int, passes: int
) -> None:
    for transposed in (False, True):
        plan = plan_of(128, channels, size, size, transposed)
        assert plan.kernel == f"smlp_bf16_{kernel}{'_t' if transposed else ''}"
        assert plan.programs == groups * blocks
        assert plan.integers[10:13] == (lines, passes, blocks)
        assert plan.integers[:4] == (128, channels, size, size)
        # out and in of H, out and in of W, branch and row of fuse
        strides = (1, size, 1, size) if transposed else (size, 1, size, 1)
        assert plan.integers[4:10] == (*strides, channels, 3 * channels)


@pytest.mark.parametrize(("batch", "channels"), [(128, 640), (128, 512), (84, 512), (83, 512)])
def test_large_forwards_of_small_images_are_cublas_s(batch: int, channels: int) -> None:
    x, weights = block(batch, 7, 7, channels)
    assert (call_of(x, weights, SMS) is None) == (batch * 49 >= 4096)
    assert call_of(x, weights.transposed(), SMS) is not None


def test_every_block_has_work_and_every_pass_has_a_block() -> None:
    for channels in range(8, 2049, 40):
        for batch in (1, 3, 128):
            plan = plan_of(batch, channels, 7, 7, transposed=True)
            lines, passes, blocks, pass_tiles = plan.integers[10:14]
            groups = plan.programs // blocks
            assert 1 <= blocks <= passes and groups * blocks == plan.programs
            assert lines * (groups - 1) < 7 * batch <= lines * groups
            # as first_tile in the kernel: passes of 1 to 3 tiles, all of them in the end
            ends = [i * pass_tiles >> 16 for i in range(passes + 1)]
            assert ends[0] == 0 and ends[-1] == -(-channels // 64)
            assert all(1 <= end - first <= 3 for first, end in pairwise(ends))


def test_pixels_are_found_again_by_the_reciprocal() -> None:
    """Division by the width: of places in a tile, and of all pixels of an image in strips."""
    for width in range(1, 33):
        reciprocal = plan_of(1, 8, 1, width).integers[14]
        for row in range(288 if width <= 16 else 32 * width):
            assert row * reciprocal >> 16 == row // width, (width, row)


def test_strips_fit_the_kernel() -> None:
    """``Strip`` in layout.cuh: 200 pixels and 8 lines a strip, 1024 pixels of other strips."""
    for height in range(1, 33):
        for width in range(1, 33):
            if max(height, width) <= 16:
                continue
            plan = plan_of(3, 64, height, width)
            lines = plan.integers[10]
            assert plan.programs == 3 * -(-height // lines)
            last = height - (-(-height // lines) - 1) * lines
            assert 1 <= last <= lines <= 8 and lines * width <= 200
            assert (height - last + 2) * width <= 1024


def test_tiles_fit_the_kernel() -> None:
    """Of whole images; ``Mixer`` has 18 or 21 items along each axis."""
    for height in range(1, 17):
        for width in range(1, 17):
            for batch in (1, 128, 4096):
                plan = plan_of(batch, 64, height, width)
                pixels, images = int(plan.kernel.rpartition("_")[2]), plan.integers[10] // height
                assert images * height == plan.integers[10]
                padded = height not in (8, 16) or width not in (8, 16)
                assert images * height * width <= (248 if pixels == 256 and padded else pixels)
                for size, lines in ((height, images * width), (width, images * height)):
                    items = -(-lines // 2) if size <= 8 else lines
                    assert items <= (18 if pixels > 200 else 21)


def with_strides(tensor: Tensor, *strides: int) -> Tensor:
    memory = torch.zeros(sum(n * s for n, s in zip(tensor.shape, strides, strict=True)) + 1)
    return memory.to(tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    """A copy with the same strides, 2 bytes beyond a multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 16)
    first = next(i for i in range(8) if memory[i:].data_ptr() % 16 == 2)
    return memory[first:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


DECLINED = {
    "17 channels": lambda: block(2, 7, 7, 17),
    "12 channels": lambda: block(2, 7, 7, 12),
    "float32": lambda: block(2, 7, 7, 16, torch.float32),
    "no images": lambda: block(0, 7, 7, 16),
    "33 lines": lambda: block(1, 33, 7, 16),
    "33 columns": lambda: block(1, 7, 33, 16),
    "two passes of strips": lambda: block(1, 17, 17, 200),
    "channels first": lambda: ((b := block(2, 7, 7, 16))[0].contiguous(), b[1]),
    "some of the channels": lambda: (block(2, 7, 7, 24)[0][:, :16], block(2, 7, 7, 16)[1]),
    "x unaligned": lambda: (unaligned((b := block(2, 7, 7, 16))[0]), b[1]),
    "fuse unaligned": lambda: fused(lambda fuse: unaligned(fuse)),
    "rows of fuse unaligned": lambda: fused(lambda fuse: with_strides(fuse, 49, 1)),
    "neither axis of fuse contiguous": lambda: fused(lambda fuse: with_strides(fuse, 96, 2)),
    "fuse expanded": lambda: fused(lambda fuse: fuse[:1, :1].expand_as(fuse)),
    "map unaligned": lambda: mapped(lambda bias: unaligned(bias)),
}


def fused(change) -> tuple[Tensor, Weights]:
    x, weights = block(2, 7, 7, 16)
    return x, weights._replace(fuse=change(weights.fuse.flatten(1)))


def mapped(change) -> tuple[Tensor, Weights]:
    """With a bias of every place that lies channels last, so that it is not copied."""
    x, weights = block(2, 7, 7, 16)
    return x, weights._replace(bias=change(x[:1].clone()).squeeze(0))


@pytest.mark.parametrize("what", DECLINED)
def test_declined(what: str) -> None:
    x, weights = DECLINED[what]()
    assert call_of(x, weights, SMS) is None


def test_declined_are_only_what_the_kernels_integers_cannot_hold() -> None:
    shape, projs = torch.Size((2**31 - 1, 8, 1, 1)), (1, 1, 1, 1)
    assert make_plan(shape, BFLOAT16, projs, (24, 8, 1), SMS) is None
    shape = torch.Size((1, 2048, 7, 7))
    assert make_plan(shape, BFLOAT16, projs, (2**19, 8, 1), SMS) is None
    assert make_plan(shape, BFLOAT16, projs, (2**19 - 8, 8, 1), SMS) is not None


TAKEN = {
    "C, 3C, 1, 1": lambda: block(2, 7, 7, 16),
    "C, 3C": lambda: fused(lambda fuse: fuse),
    "C, 3, C": lambda: fused(lambda fuse: fuse.unflatten(1, (3, 16))),
    "rows apart": lambda: fused(lambda fuse: with_strides(fuse, 56, 1)),
    "map": lambda: mapped(lambda bias: bias),
    "map, channels first": lambda: mapped(lambda bias: bias.contiguous()),
    "one place": lambda: block(2, 1, 1, 16),
    "no biases": lambda: block(2, 7, 7, 16, bias=False),
}


@pytest.mark.parametrize("what", TAKEN)
def test_parameters(what: str) -> None:
    """What the kernel gets, in its order."""
    x, weights = TAKEN[what]()
    call = call_of(x, weights, SMS)
    assert call is not None and len(call.plan.integers) == 17
    given_x, y, proj_h, bias_h, proj_w, bias_w, fuse, bias, bias_map = call.tensors
    assert given_x is x and y is not None
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    same = (proj_h, bias_h, proj_w, bias_w, fuse)
    assert all(a is b for a, b in zip(same, weights[:5], strict=True))
    if weights.bias is not None and weights.bias.dim() == 3:
        assert bias is None and bias_map is not None and bias_map.is_contiguous()
        assert torch.equal(bias_map.permute(2, 0, 1), weights.bias)
    else:
        assert bias is weights.bias and bias_map is None


def test_weights_are_converted_as_autocast_leaves_them_to_the_kernels() -> None:
    x, _ = block(2, 7, 7, 16)
    _, weights = block(2, 7, 7, 16, torch.float32)
    for given in (weights, weights.transposed()):
        call = call_of(x, given, SMS)
        assert call is not None
        for actual, expected in zip(call.tensors[2:8], given, strict=True):
            if expected is None:
                assert actual is None
            else:
                assert torch.equal(actual, expected.to(BFLOAT16))
                assert actual.stride() == expected.stride()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_plan_is_looked_up_once(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the strides of what is converted, which is dense."""
    x, _ = block(2, 7, 7, 16)
    _, weights = block(2, 7, 7, 16, torch.float32)
    apart = with_strides(weights.fuse.flatten(1), 48 * stride, stride)
    asked = []
    monkeypatch.setattr(hopper_plan, "make_plan", lambda *a: asked.append(a) or make_plan(*a))
    call = call_of(x, weights._replace(fuse=apart), SMS)
    assert call is not None and len(asked) == 1
    assert torch.equal(call.tensors[6], apart.to(BFLOAT16))
    assert call.plan.integers[8:10] == (16, 48)


def test_what_cublas_takes_is_not_converted_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hopper_plan, "in_type_of")
    x, _ = block(128, 7, 7, 512)
    _, weights = block(1, 7, 7, 512, torch.float32)
    assert call_of(x, weights, SMS) is None


def test_the_input_gradient_reads_fuse_as_it_lies() -> None:
    x, weights = block(2, 7, 7, 16)
    call = call_of(x, weights.transposed(), SMS)
    assert call is not None and call.plan.kernel.endswith("_t")
    assert call.tensors[6].data_ptr() == weights.fuse.data_ptr()
    assert [t is None for t in call.tensors] == [i in (3, 5, 7, 8) for i in range(9)]
