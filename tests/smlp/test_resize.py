"""resize: a network at another image size, and networks that it refuses."""

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smlp import SMLPBlock, SMLPNet, SparseMLP, resize, resize_block
from smlp.ablations import ABLATIONS, ablate
from smlp.block import AxisMixing
from smlp.network import PyramidNetwork

CLOSE = dict(rtol=1e-10, atol=1e-10)
BUILDERS: dict[str, Callable[..., PyramidNetwork]] = {
    "SparseMLP": SparseMLP,
    "SMLPNet": SMLPNet,
    **{name: partial(ablate, name, SMLPNet) for name in ABLATIONS if name != "none"},
}


def small() -> SparseMLP:
    return SparseMLP(16, 2, 1, 2, 4, (1, 1))


def first_block(network: SparseMLP) -> SMLPBlock:
    return network.layers[1].model[0][1].fn[0]


@pytest.mark.parametrize("size", [32, [24, 40], (16, 8)])
@pytest.mark.parametrize("name", BUILDERS)
def test_networks(name: str, size: int | list[int]) -> None:
    torch.manual_seed(0)
    shape = dict(in_channels=2, num_classes=3, d_model=4, depth=(1, 2), patch_size=2)
    model = BUILDERS[name](image_size=(16, 24), **shape).double().eval()
    before = copy.deepcopy(model.state_dict())
    resized = resize(model, size)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 2, height, width, dtype=torch.float64)

    # The same network built at that size, its blocks resized one by one.
    built = BUILDERS[name](image_size=size, **shape).double().eval()
    state = dict(before)
    for path, block in model.named_modules():
        if isinstance(block, AxisMixing):
            target = built.get_submodule(path)
            one = resize_block(block, target.height, target.width)
            state |= {f"{path}.{key}": value for key, value in one.state_dict().items()}
    built.load_state_dict(state)
    torch.testing.assert_close(resized(x), built(x), **CLOSE)

    assert resized.image_size == (height, width)
    assert model.image_size == (16, 24)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    same = resize(model, (16, 24))
    assert all(torch.equal(value, before[key]) for key, value in same.state_dict().items())


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
    model = small()
    block = first_block(model)
    block.proj_w = block.proj_h
    assert first_block(resize(model, 32)).proj_w.in_features == 8
    message = r"share weights to keep one size, got 8 for .*fn\.0\.proj_h and 4 for .*fn\.0\.proj_w"
    with pytest.raises(ValueError, match=message):
        resize(model, (32, 16))
    with pytest.raises(ValueError, match="got 8 for proj_h and 4 for proj_w"):
        resize_block(block, 8, 4)
    other = small()
    other.more = nn.Linear(4, 4)
    other.more.weight = first_block(other).proj_h.weight
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


BLOCK = SMLPBlock(2, 2, 2)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (resize, (small(), 18), ValueError, "image_size: expected a height divisible by 4 "
         "(patch 2, halved 1 times between 2 stages), got 18"),
        (resize, (small(), (16, 16, 1)), ValueError,
         "image_size: expected one integer or (height, width), got (16, 16, 1)"),
        (resize, (BLOCK, 4), TypeError,
         "network: expected a SparseMLP or an SMLPNet, got SMLPBlock; smlp.resize_block"),
        (resize_block, (nn.Linear(2, 2), 4, 4), TypeError,
         "block: expected an SMLPBlock, got Linear"),
        (resize_block, (BLOCK, 0, 4), ValueError, "height: expected at least 1, got 0"),
        (resize_block, (BLOCK, 4, 4.5), TypeError, "width: expected an integer, got 4.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments)


def test_block_of_no_stage() -> None:
    model = small()
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
    model = small()
    block = first_block(model)
    setattr(block, name, change(getattr(block, name)))
    message = "expected projections without adapters, hooks and parametrizations"
    with pytest.raises(TypeError, match=f"block: {message}.*got some on {name}, a "):
        resize_block(block, 8, 8)
    where = rf"layers\.1\.model\.0\.1\.fn\.0\.{name}, a "
    with pytest.raises(TypeError, match=f"network: {message}.*got some on {where}"):
        resize(model, 32)
