"""resize_block: what has to survive another grid, checked on the values."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPBlock, resize_block
from smlp.ablations import NoIdentityBlock, OneAxisBlock, SequentialBlock, SumBlock
from smlp.block import AxisMixing

CLOSE = dict(rtol=1e-10, atol=1e-10)
SIZES = [((6, 5), (9, 11)), ((7, 7), (8, 8)), ((6, 8), (12, 8)), ((1, 3), (2, 4))]


def cosine_interpolation(x: Tensor, size: int, axis: int) -> Tensor:
    """Fit a cosine series through the pixel centres of an axis, evaluate it at those of another."""

    def series(count: int, terms: int) -> Tensor:
        centres = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return torch.stack([torch.cos(math.pi * k * centres) for k in range(terms)], dim=1)

    old = x.shape[axis]
    moved = x.movedim(axis, -1)
    coefficients = torch.linalg.solve(series(old, old), moved.unsqueeze(-1)).squeeze(-1)
    return (coefficients @ series(size, old).T).movedim(-1, axis)


def interpolate(x: Tensor, height: int, width: int) -> Tensor:
    return cosine_interpolation(cosine_interpolation(x, height, 2), width, 3)


def random_block(height: int, width: int, channels: int = 3) -> SMLPBlock:
    torch.manual_seed(height * 100 + width)
    return SMLPBlock(height, width, channels, dtype=torch.float64)


def without_bias(height: int, width: int, channels: int) -> SMLPBlock:
    block = SMLPBlock(height, width, channels)
    block.proj_h = nn.Linear(height, height, bias=False)
    return block


KINDS: dict[str, Callable[[int, int, int], AxisMixing]] = {
    "SMLPBlock": SMLPBlock,
    "without bias": without_bias,
    "height_only": partial(OneAxisBlock, axis="height"),
    "width_only": partial(OneAxisBlock, axis="width"),
    "no_identity": NoIdentityBlock,
    "sum": SumBlock,
    "sequential": SequentialBlock,
}


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_commute_with_interpolation(
    kind: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    block = KINDS[kind](*old, 3).double()
    x = torch.randn(2, 3, *old, dtype=torch.float64) + 1
    got = resize_block(block, *new)(interpolate(x, *new))
    torch.testing.assert_close(got, interpolate(block(x), *new), **CLOSE)


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_shrinking_keeps_what_the_coarse_grid_can_hold(
    small: tuple[int, int], large: tuple[int, int]
) -> None:
    """For an image without fine modes, the coarse part of the answer is the same."""
    block = random_block(*large)
    x = torch.randn(2, 3, *small, dtype=torch.float64)
    resized = resize_block(block, *small)
    again = interpolate(resized(x), *large)
    answer = block(interpolate(x, *large))
    # The two differ by fine modes only: orthogonal to everything interpolated from the small grid.
    probe = interpolate(torch.randn(1, 1, *small, dtype=torch.float64), *large)
    torch.testing.assert_close((probe * again).sum((2, 3)), (probe * answer).sum((2, 3)), **CLOSE)


@pytest.mark.parametrize(("old", "new"), [*SIZES, ((9, 11), (6, 5)), ((14, 14), (7, 9))])
def test_constant_images(old: tuple[int, int], new: tuple[int, int]) -> None:
    block = random_block(*old)
    with torch.no_grad():  # rows of one sum: the answer to a constant image is constant
        block.proj_h.weight += (0.7 - block.proj_h.weight.sum(1, keepdim=True)) / old[0]
        block.proj_w.weight += (-1.3 - block.proj_w.weight.sum(1, keepdim=True)) / old[1]
        block.proj_h.bias.fill_(0.4)
        block.proj_w.bias.fill_(0.2)
    resized = resize_block(block, *new)
    rows = [p.weight.sum(1) for p in (resized.proj_h, resized.proj_w)]
    torch.testing.assert_close(rows[0], rows[0].new_full((new[0],), 0.7), **CLOSE)
    torch.testing.assert_close(rows[1], rows[1].new_full((new[1],), -1.3), **CLOSE)
    constant = torch.tensor([0.5, -2.0, 3.0]).double().view(1, 3, 1, 1)
    want = block(constant.expand(1, 3, *old))[:, :, :1, :1]
    got = resized(constant.expand(1, 3, *new))
    torch.testing.assert_close(got, want.expand_as(got), **CLOSE)


def test_row_sums_are_interpolated_and_their_mean_is_kept() -> None:
    block = random_block(8, 5)
    resized = resize_block(block, 11, 5)
    old, new = block.proj_h.weight.sum(1), resized.proj_h.weight.sum(1)
    torch.testing.assert_close(new, cosine_interpolation(old, 11, 0), **CLOSE)
    torch.testing.assert_close(new.mean(), old.mean(), **CLOSE)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 28), (28, 20)])
def test_filter_that_acts_alike_everywhere_still_does(old: int, new: int) -> None:
    """A Gaussian of a twelfth of the image, mirrored at the border, sampled on either grid."""

    def gaussian_filter(size: int) -> Tensor:
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        weight = torch.zeros(size, size, dtype=torch.float64)
        for shift in range(-4, 5):
            for mirrored in (centres, -centres):
                distance = centres[:, None] - mirrored - 2 * shift
                weight += torch.exp(-0.5 * (12 * distance) ** 2)
        return weight / weight.sum(1, keepdim=True)

    block = random_block(old, 3)
    with torch.no_grad():
        block.proj_h.weight.copy_(gaussian_filter(old))
    got = resize_block(block, new, 3).proj_h.weight
    torch.testing.assert_close(got, gaussian_filter(new), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_there_and_back(old: tuple[int, int], new: tuple[int, int]) -> None:
    block = random_block(*old)
    there = resize_block(block, *new)
    back = resize_block(there, *old)
    for name, value in block.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, **CLOSE)
    for one, other in ((block.proj_h, there.proj_h), (block.proj_w, there.proj_w)):
        torch.testing.assert_close(one.weight.norm(), other.weight.norm(), **CLOSE)
        norms = [torch.linalg.matrix_norm(p.weight, 2) for p in (one, other)]
        torch.testing.assert_close(*norms, **CLOSE)


class Named(SMLPBlock):
    """A block of a user's own."""


def test_the_copy_is_like_the_block() -> None:
    block = Named(4, 5, 3, fuse_bias=False, dtype=torch.bfloat16).eval()
    block.proj_h.weight.requires_grad_(False)
    before = copy.deepcopy(block.state_dict())
    resized = resize_block(block, 6, 5)
    assert type(resized) is Named
    assert (resized.height, resized.width, resized.channels) == (6, 5, 3)
    assert {p.dtype for p in resized.parameters()} == {torch.bfloat16}
    wanted = {name: p.requires_grad for name, p in block.named_parameters()}
    assert {name: p.requires_grad for name, p in resized.named_parameters()} == wanted
    assert not any(module.training for module in resized.modules())
    for name in ("proj_w.weight", "proj_w.bias", "fuse.weight"):
        assert torch.equal(resized.state_dict()[name], before[name])
    with torch.no_grad():
        for p in resized.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
