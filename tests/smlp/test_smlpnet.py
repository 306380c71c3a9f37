"""SMLPNet's published figures, drop path and the features; its values are held against an
independent implementation of the paper's network in test_checkpoint.py."""

import copy
import math
import re
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.flop_counter import FlopCounterMode

from smlp import (
    FeaturePyramid,
    SMLPBlock,
    SMLPNet,
    SparseMLP,
    resize,
    smlpnet_base,
    smlpnet_small,
    smlpnet_tiny,
)
from smlp.smlpnet import DropPath

SMALL = dict(image_size=16, patch_size=2, in_channels=2, num_classes=5, d_model=4, depth=(1, 2))


@pytest.mark.parametrize(
    ("build", "parameters", "gmac", "drop_path_rate"),
    [
        (smlpnet_tiny, 24_123_584, 4.989, 0.0),
        (smlpnet_small, 48_558_136, 10.312, 0.2),
        (smlpnet_base, 65_880_408, 13.987, 0.3),
    ],
)
def test_published_figures(
    build: Callable[..., SMLPNet], parameters: int, gmac: float, drop_path_rate: float
) -> None:
    with torch.device("meta"):
        model = build()
        images = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        features = model.forward_features(images)
        model.mlp_head(features[-1])
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=5e-4)
    assert [tuple(f.shape[2:]) for f in features] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    rates = [module.drop_rate for module in model.modules() if isinstance(module, DropPath)]
    total = sum(model.depth)
    want = [drop_path_rate * i / (total - 1) for i in range(total)]
    assert rates == pytest.approx(want)


def test_named_sizes_take_other_arguments() -> None:
    model = smlpnet_small(image_size=(64, 32), num_classes=7, drop_path_rate=0.5, depth=(1, 1))
    assert model.channels == (96, 192)
    assert model.sizes == [(16, 8), (8, 4)]
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, 7)
    with pytest.raises(TypeError, match="classes"):
        smlpnet_tiny(classes=3)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.rand(4000, 3, 2, 1, dtype=torch.float64) + 0.5
    ratio = drop(x) / x
    per_sample = ratio.flatten(1)
    dropped = (per_sample == 0).all(1)
    kept = torch.isclose(per_sample, torch.tensor(4 / 3, dtype=torch.float64)).all(1)
    assert (dropped | kept).all()
    # 5 standard deviations of a binomial share.
    assert abs(dropped.double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    drop.eval()
    assert torch.equal(drop(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_a_dropped_layer_is_the_identity() -> None:
    torch.manual_seed(0)
    model = SMLPNet(**SMALL, drop_path_rate=1 - 1e-9)
    layer = model.stages[1][2]  # the last layer, the one with the full rate
    x = torch.randn(4, 8, 4, 4)
    assert torch.equal(layer(x), x)
    layer.eval()
    assert not torch.allclose(layer(x), x)


def test_every_parameter_has_a_gradient() -> None:
    torch.manual_seed(0)
    model = SMLPNet(**SMALL)
    model(torch.randn(3, 2, 16, 16)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


# --- as a backbone -----------------------------------------------------------------------------


@pytest.mark.parametrize("network", [SMLPNet, SparseMLP])
def test_pyramid(network: type[SMLPNet] | type[SparseMLP]) -> None:
    torch.manual_seed(0)
    model = network(image_size=(64, 96), d_model=4, depth=(1, 1, 2, 1), num_classes=3).eval()
    images = torch.randn(2, 3, 64, 96)
    features = model.forward_features(images)
    logits = model(images)
    torch.testing.assert_close(model.mlp_head(features[-1]), logits)

    pyramid = FeaturePyramid(model)
    assert pyramid.strides == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert pyramid.channels == [4, 8, 16, 32]
    maps = pyramid(images)
    for got, want, stride, channels in zip(
        maps, features, pyramid.strides, pyramid.channels, strict=True
    ):
        assert torch.equal(got, want)
        assert got.shape == (2, channels, 64 // stride[0], 96 // stride[1])

    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in pyramid.parameters())

    two = FeaturePyramid(model, stages=[3, 1])
    assert two.strides == [(32, 32), (8, 8)]
    assert all(map(torch.equal, two(images), [features[3], features[1]]))

    def refuse(*_: object) -> None:
        raise RuntimeError("a stage ran whose map nobody asked for")

    fine = FeaturePyramid(model, stages=np.array([1, 0]))
    (model.stages if isinstance(model, SMLPNet) else model.layers)[2].register_forward_hook(refuse)
    assert all(map(torch.equal, fine(images), [features[1], features[0]]))


@pytest.mark.parametrize("network", [SMLPNet, SparseMLP])
def test_sizes_of_numpy_are_pythons(network: type[SMLPNet] | type[SparseMLP]) -> None:
    """In their own types, of 8 bits say, the channels of further stages would overflow."""
    sizes = dict(in_channels=np.uint8(2), d_model=np.uint8(40), expansion_factor=np.uint8(3))
    model = network(16, 2, depth=(1, 1, 1, 1), num_classes=np.uint8(7), **sizes)
    expected = network(16, 2, 2, 7, d_model=40, depth=(1, 1, 1, 1), expansion_factor=3)
    assert model.channels == (40, 80, 160, 320)
    assert str(model) == str(expected)


def build(**kwargs: object) -> Callable[[], SMLPNet]:
    return lambda: SMLPNet(**{**SMALL, **kwargs})


def feed(x: object) -> Callable[[], Tensor]:
    return lambda: SMLPNet(**SMALL)(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            build(image_size=(18, 16)),
            ValueError,
            "image_size: expected a height divisible by 4 (patch 2, halved 1 times between 2 "
            "stages), got 18",
        ),
        (build(depth=()), ValueError, "depth: expected at least one entry, got ()"),
        (build(expansion_factor=0), ValueError, "expansion_factor: expected at least 1, got 0"),
        (
            build(drop_path_rate=1.0),
            ValueError,
            "drop_path_rate: expected a number in [0, 1), got 1.0",
        ),
        (
            build(drop_path_rate="0.1"),
            TypeError,
            "drop_path_rate: expected a number, got '0.1'",
        ),
        (
            feed(torch.zeros(1, 3, 16, 16)),
            ValueError,
            "x: expected shape [B, 2, 16, 16], got [1, 3, 16, 16]",
        ),
        (feed(torch.zeros(1, 2, 16, 16).int()), TypeError, "got torch.int32"),
        (
            lambda: FeaturePyramid(nn.Identity()),
            TypeError,
            "network: expected a SparseMLP or an SMLPNet, got Identity",
        ),
        (
            lambda: FeaturePyramid(SMLPNet(**SMALL), stages=[2]),
            ValueError,
            "stages: expected some of 0 to 1, got [2]",
        ),
        (
            lambda: FeaturePyramid(SMLPNet(**SMALL), stages=[]),
            ValueError,
            "stages: expected some of 0 to 1, got []",
        ),
        (
            lambda: FeaturePyramid(SMLPNet(**SMALL), stages=[1.0]),
            ValueError,
            "stages: expected some of 0 to 1, got [1.0]",
        ),
        (
            lambda: FeaturePyramid(SMLPNet(**SMALL), stages=1),
            TypeError,
            "stages: expected a tuple or list of integers, got 1",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def built(build: type[SMLPNet] | type[SparseMLP]) -> SMLPNet | SparseMLP:
    return build(image_size=(8, 16), patch_size=2, num_classes=3, d_model=4, depth=(1, 1))


@pytest.mark.parametrize("build", [SMLPNet, SparseMLP])
@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((3, 8, 16), r"; x\.unsqueeze\(0\) makes a batch of one image"),
        (
            (8, 16, 3),
            r"; x\.permute\(2, 0, 1\)\.unsqueeze\(0\) makes a batch of one image with channels.*",
        ),
        ((2, 8, 16, 3), r"; x\.permute\(0, 3, 1, 2\) puts the channels first"),
        ((2, 3, 16, 16), r"; smlp\.resize adapts a model to another image size"),
        ((2, 1, 8, 16), ""),
        ((2, 16, 16, 1), ""),
        ((8, 16), ""),
    ],
)
def test_images_of_another_shape(
    build: type[SMLPNet] | type[SparseMLP], shape: tuple[int, ...], hint: str
) -> None:
    got = re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"x: expected shape \[B, 3, 8, 16\], got {got}{hint}$"):
        built(build)(torch.zeros(shape))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("build", [SMLPNet, SparseMLP])
def test_shards_are_kept_in_another_dtype_than_images(
    build: type[SMLPNet] | type[SparseMLP],
) -> None:
    torch.manual_seed(0)
    model, x = built(build).eval(), torch.randn(2, 3, 8, 16)
    expected = copy.deepcopy(model).bfloat16()(x.bfloat16())
    for buffer in model.buffers():  # which the policy leaves alone
        buffer.data = buffer.bfloat16()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    lists = [part for part in model.children() if isinstance(part, nn.ModuleList)]
    for part in (*model.children(), *chain(*lists), model):  # the first weight among them
        if part not in lists:
            fully_shard(part, mesh=mesh, mp_policy=policy)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("build", [SMLPNet, SparseMLP])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_images_of_another_type(
    build: type[SMLPNet] | type[SparseMLP], weights: torch.dtype, dtype: torch.dtype
) -> None:
    model = built(build).to(weights)
    x = torch.zeros(2, 3, 8, 16, dtype=dtype)
    if dtype != weights:
        message = f"x: expected the parameters' dtype {weights}, got {dtype}; convert one"
        with pytest.raises(TypeError, match=f"{message} of them with .to.. or run under"):
            model(x)
    with torch.autocast("cpu", torch.bfloat16):
        if (dtype == torch.float64) == (weights == torch.float64):
            assert model(x).shape == (2, 3)
        else:
            with pytest.raises(TypeError, match=r"with \.to\(\), since float64 is exempt"):
                model(x)


@pytest.mark.parametrize("build", [SMLPNet, SparseMLP])
def test_sizes_of_numpy(build: type[SMLPNet] | type[SparseMLP]) -> None:
    np = pytest.importorskip("numpy")
    sizes = dict(patch_size=np.int32(2), num_classes=np.uint8(3), d_model=np.int64(4))
    model = build(image_size=np.array([8, 16]), depth=list(np.array([1, 1])), **sizes)
    assert model.image_size == (8, 16) and all(type(side) is int for side in model.image_size)
    assert model(torch.zeros(1, 3, 8, 16)).shape == (1, 3)
    assert resize(model, np.int64(16)).image_size == (16, 16)
    block = SMLPBlock(np.int64(2), np.int16(3), np.uint8(4))
    assert all(type(size) is int for size in (block.height, block.width, block.channels))
    for bad in (np.float64(2.0), np.bool_(True), "8", torch.tensor(8), np.array([8.0, 8.0])):
        with pytest.raises(TypeError, match="image_size"):
            build(image_size=bad)
