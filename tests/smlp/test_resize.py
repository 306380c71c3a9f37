"""resize and resize_block: what has to survive another grid, checked on the values."""

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smlp import SMLPBlock, SMLPNet, SparseMLP, resize, resize_block
from smlp.ablations import ABLATIONS, ablate
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


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_block_commutes_with_interpolation(old: tuple[int, int], new: tuple[int, int]) -> None:
    block = random_block(*old)
    x = torch.randn(2, 3, *old, dtype=torch.float64) + 1
    resized = resize_block(block, *new)
    got = resized(interpolate(x, *new))
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


@pytest.mark.parametrize("network", [SparseMLP, SMLPNet])
@pytest.mark.parametrize("size", [32, [24, 40], (16, 8)])
def test_networks(network: type[SparseMLP] | type[SMLPNet], size: int | list[int]) -> None:
    torch.manual_seed(0)
    shape = dict(in_channels=2, num_classes=3, d_model=4, depth=(1, 2), patch_size=2)
    model = network(image_size=(16, 24), **shape).double().eval()
    before = copy.deepcopy(model.state_dict())
    resized = resize(model, size)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 2, height, width, dtype=torch.float64)

    # The same network built at that size, its blocks resized one by one.
    built = network(image_size=size, **shape).double().eval()
    state = dict(before)
    for name, block in model.named_modules():
        if isinstance(block, SMLPBlock):
            target = built.get_submodule(name)
            one = resize_block(block, target.height, target.width)
            state |= {f"{name}.{key}": value for key, value in one.state_dict().items()}
    built.load_state_dict(state)
    torch.testing.assert_close(resized(x), built(x), **CLOSE)

    assert resized.image_size == (height, width)
    assert model.image_size == (16, 24)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    same = resize(model, (16, 24))
    assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations(name: str) -> None:
    torch.manual_seed(0)
    shape = dict(in_channels=2, num_classes=3, d_model=4, depth=(1, 2), patch_size=2)
    model = ablate(name, SMLPNet, image_size=(16, 24), **shape).double().eval()
    built = ablate(name, SMLPNet, image_size=(32, 24), **shape).double().eval()
    state = dict(model.state_dict())
    for path, block in model.named_modules():
        if isinstance(block, AxisMixing):
            target = built.get_submodule(path)
            one = resize_block(block, target.height, target.width)
            state |= {f"{path}.{key}": value for key, value in one.state_dict().items()}
    built.load_state_dict(state)
    x = torch.randn(2, 2, 32, 24, dtype=torch.float64)
    torch.testing.assert_close(resize(model, (32, 24))(x), built(x), **CLOSE)


@pytest.mark.parametrize("name", ["height_only", "width_only", "no_identity", "sum", "sequential"])
def test_ablated_blocks_commute_with_interpolation(name: str) -> None:
    net = ablate(name, SMLPNet, image_size=(12, 10), patch_size=2, d_model=3, depth=(1,)).double()
    block = net.stages[0][1].mix.block
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    got = resize_block(block, 9, 11)(interpolate(x, 9, 11))
    torch.testing.assert_close(got, interpolate(block(x), 9, 11), **CLOSE)


def test_what_is_shared_stays_shared() -> None:
    """A block in two layers, a projection in two blocks, and one weight in two projections."""
    torch.manual_seed(0)
    model = SparseMLP(16, 2, 1, 2, 4, (1, 4)).double().eval()
    steps = [layer[1] for layer in model.layers[1].model]
    steps[1].fn = steps[0].fn
    steps[2].fn[0].proj_w = steps[0].fn[0].proj_h
    steps[3].fn[0].proj_h.weight = steps[0].fn[0].proj_w.weight
    alone = resize_block(steps[3].fn[0], 8, 8)
    resized = resize(model, 32)
    blocks = [layer[1].fn[0] for layer in resized.layers[1].model]
    assert blocks[1] is blocks[0] and blocks[2].proj_w is blocks[0].proj_h
    assert blocks[3].proj_h.weight is blocks[0].proj_w.weight
    assert len(list(resized.parameters())) == len(list(model.parameters()))
    for one, other in zip(blocks[3].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert resized(torch.zeros(1, 1, 32, 32).double()).shape == (1, 2)


def test_shared_weights_cannot_have_two_sizes() -> None:
    model = SparseMLP(16, 2, 1, 2, 4, (1, 1))
    block = model.layers[1].model[0][1].fn[0]
    block.proj_w = block.proj_h
    assert resize(model, 32).layers[1].model[0][1].fn[0].proj_w.in_features == 8
    message = r"share weights to keep one size, got 8 for .*fn\.0\.proj_h and 4 for .*fn\.0\.proj_w"
    with pytest.raises(ValueError, match=message):
        resize(model, (32, 16))
    with pytest.raises(ValueError, match="got 8 for proj_h and 4 for proj_w"):
        resize_block(block, 8, 4)
    other = SparseMLP(16, 2, 1, 2, 4, (1, 1))
    other.more = nn.Linear(4, 4)
    other.more.weight = other.layers[1].model[0][1].fn[0].proj_h.weight
    with pytest.raises(
        ValueError, match=r"only projections share, got one that is more\.weight too"
    ):
        resize(other, 32)


class Positions(nn.Module):
    """A block of a user's own, whose size lies elsewhere."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, height, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def test_parts_of_a_size_in_something_else_are_refused() -> None:
    model = SMLPNet(16, 2, 1, 3, 4, (1, 1), block=Positions)
    before = copy.deepcopy(model.state_dict())
    message = r"does not run at \(32, 32\): stages\.0\.1\.mix\.block, a Positions: "
    with pytest.raises(ValueError, match=f"network: expected one whose size .* {message}"):
        resize(model, 32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    resize(model, 16)


@pytest.mark.parametrize("build", [SparseMLP, SMLPNet])
def test_folded_networks(build: type[SparseMLP] | type[SMLPNet]) -> None:
    kernels = pytest.importorskip("smlp_kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(image_size=16, patch_size=2, num_classes=3, d_model=4, depth=(1, 1)).to(device)
    kernels.fuse_model(model.eval(), fold=True)
    if build is SMLPNet:  # what is folded there has no size
        x = torch.randn(1, 3, 32, 32, device=device)
        assert resize(model, 32)(x).shape == (1, 3)
    else:
        with pytest.raises(ValueError, match=r"layers\.0\.model\.0\.0, a FoldedDepthwise: "):
            resize(model, 32)


def test_networks_that_need_autocast_are_resized() -> None:
    model = SMLPNet(16, 2, 1, 3, 4, (1, 1)).bfloat16()
    model.mlp_head.float()  # does not run without autocast, which says nothing of its size
    with torch.autocast("cpu", torch.bfloat16):
        assert resize(model, 32)(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_on_real_images() -> None:
    """Trained at 8x8 and enlarged to 12x12, a model beats one with new axes before and after an
    epoch of fine-tuning."""
    pytest.importorskip("sklearn", reason="scikit-learn, which brings the images, is missing")
    from smlp.data import digits

    data = digits()
    torch.manual_seed(0)
    model = SparseMLP(8, 1, 1, 10, d_model=16, depth=(1, 1))

    def scale(images: Tensor) -> Tensor:
        return F.interpolate(images, size=(12, 12), mode="bilinear")

    def train(model: nn.Module, images: Tensor, epochs: int) -> None:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=4e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(model(images[batch]), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def accuracy(model: nn.Module, images: Tensor) -> float:
        with torch.no_grad():
            predicted = model.eval()(images).argmax(1)
        return (predicted == data.test_labels).float().mean().item()

    train(model, data.train_images, epochs=5)
    assert accuracy(model, data.test_images) > 0.9
    resized = resize(model, 12)
    fresh = resize(model, 12)
    for block in fresh.modules():
        if isinstance(block, SMLPBlock):
            block.proj_h.reset_parameters()
            block.proj_w.reset_parameters()
    test_images = scale(data.test_images)
    before = accuracy(resized, test_images), accuracy(fresh, test_images)
    for candidate in (resized, fresh):
        torch.manual_seed(1)
        train(candidate, scale(data.train_images), epochs=1)
    after = accuracy(resized, test_images), accuracy(fresh, test_images)
    assert before[0] > before[1] + 0.3, f"resized, new axes: {before}"
    assert after[0] > after[1], f"resized, new axes, after an epoch: {after}"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: resize(SparseMLP(16, 2, 1, 2, 4, (1, 1)), 18),
            ValueError,
            "image_size: expected a height divisible by 4 (patch 2, halved 1 times between 2 "
            "stages), got 18",
        ),
        (
            lambda: resize(SparseMLP(16, 2, 1, 2, 4, (1, 1)), (16, 16, 1)),
            ValueError,
            "image_size: expected one integer or (height, width), got (16, 16, 1)",
        ),
        (
            lambda: resize(SMLPBlock(2, 2, 2), 4),
            TypeError,
            "network: expected a SparseMLP or an SMLPNet, got SMLPBlock; smlp.resize_block",
        ),
        (
            lambda: resize_block(nn.Linear(2, 2), 4, 4),
            TypeError,
            "block: expected an SMLPBlock, got Linear",
        ),
        (
            lambda: resize_block(SMLPBlock(2, 2, 2), 0, 4),
            ValueError,
            "height: expected at least 1, got 0",
        ),
        (
            lambda: resize_block(SMLPBlock(2, 2, 2), 4, 4.5),
            TypeError,
            "width: expected an integer, got 4.5",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_block_of_no_stage() -> None:
    model = SparseMLP(16, 2, 1, 2, 4, (1, 1))
    model.layers[1].model[0][1].fn[0] = SMLPBlock(3, 4, 8)
    message = "expected blocks of the stages' sizes [(8, 8), (4, 4)], got 3 x 4 in layers.1.model.0"
    with pytest.raises(ValueError, match=re.escape(message)):
        resize(model, 32)


def hooked(module: nn.Linear) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    "change", [hooked, nn.utils.parametrizations.weight_norm, lambda m: nn.Sequential(m)]
)
@pytest.mark.parametrize("name", ["proj_h", "proj_w"])
def test_changed_projections_are_not_lost(
    change: Callable[[nn.Linear], nn.Module], name: str
) -> None:
    model = SparseMLP(16, 2, 1, 2, 4, (1, 1))
    block = model.layers[1].model[0][1].fn[0]
    setattr(block, name, change(getattr(block, name)))
    message = "expected projections without adapters, hooks and parametrizations"
    with pytest.raises(TypeError, match=f"block: {message}.*got some on {name}, a "):
        resize_block(block, 8, 8)
    where = rf"layers\.1\.model\.0\.1\.fn\.0\.{name}, a "
    with pytest.raises(TypeError, match=f"network: {message}.*got some on {where}"):
        resize(model, 32)


def test_projections_without_bias() -> None:
    block = random_block(6, 5)
    block.proj_h = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    resized = resize_block(block, 9, 5)
    torch.testing.assert_close(resized(interpolate(x, 9, 5)), interpolate(block(x), 9, 5), **CLOSE)
