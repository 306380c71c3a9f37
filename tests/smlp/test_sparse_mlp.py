"""SparseMLP against the published network, rewritten here as functions of its state dict."""

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smlp import SparseMLP

State = dict[str, Tensor]
# Agreement of two implementations in fp64 after a dozen normalised layers.
CLOSE = dict(rtol=1e-10, atol=1e-10)
SMALL = dict(image_size=16, patch_size=2, in_channels=2, num_classes=5, d_model=6, depth=[2, 1])


# --- the oracle: channels last, one function per formula ---------------------------------------


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def batch_norm(x: Tensor, state: State, name: str) -> Tensor:
    scale = (state[f"{name}.running_var"] + 1e-5).rsqrt() * state[f"{name}.weight"]
    return (x - state[f"{name}.running_mean"]) * scale + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def affine(x: Tensor, state: State, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 with one pixel of zeros around; x [B, H, W, C], weight [C, 1, 3, 3]."""
    _, height, width, _ = x.shape
    padded = torch.zeros_like(x[:, :1, :1]).repeat(1, height + 2, width + 2, 1)
    padded[:, 1:-1, 1:-1] = x
    out = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + height, j : j + width] * weight[:, 0, i, j]
    return out


def mix(x: Tensor, state: State, name: str) -> Tensor:
    along_h = torch.einsum("hk,bkwc->bhwc", state[f"{name}.proj_h.weight"], x)
    along_h = along_h + state[f"{name}.proj_h.bias"][:, None, None]
    along_w = torch.einsum("wk,bhkc->bhwc", state[f"{name}.proj_w.weight"], x)
    along_w = along_w + state[f"{name}.proj_w.bias"][:, None]
    fuse = state[f"{name}.fuse.weight"].flatten(1)
    return torch.cat([along_h, along_w, x], -1) @ fuse.T + state[f"{name}.fuse.bias"]


def merge(x: Tensor, state: State, name: str) -> Tensor:
    corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    x = layer_norm(torch.cat(corners, -1), state, f"{name}.norm")
    return x @ state[f"{name}.reduction.weight"].T


def published(images: Tensor, state: State, depth: list[int], patch: tuple[int, int]) -> Tensor:
    """Logits of the port of sMLPNet in eval mode."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cells = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    x = torch.einsum("bchiwj,ocij->bhwo", cells, state["patcher.0.weight"])
    x = x + state["patcher.0.bias"]
    if "patcher.1.1.weight" in state:
        x = layer_norm(x, state, "patcher.1.1")
    for i, layers in enumerate(depth):
        for j in range(layers):
            name = f"layers.{i}.model.{j}"
            local = depthwise(
                batch_norm(x, state, f"{name}.0.norm"), state[f"{name}.0.fn.0.weight"]
            )
            x = x + local + state[f"{name}.0.fn.0.bias"]
            x = x + mix(batch_norm(x, state, f"{name}.1.norm"), state, f"{name}.1.fn.0")
            hidden = gelu(affine(layer_norm(x, state, f"{name}.3.norm"), state, f"{name}.3.fn.0"))
            x = x + affine(hidden, state, f"{name}.3.fn.3")
        if i + 1 < len(depth):
            x = merge(x, state, f"layers.{i}.patch_merge.1")
    x = layer_norm(x, state, "mlp_head.1").mean((1, 2))
    return affine(x, state, "mlp_head.3")


def randomise(model: nn.Module) -> None:
    """Give every parameter and every running statistic a value of its own."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(std=0.3)
            if value.dim() == 1 and name.endswith("weight"):
                value += 1


# --- the state dict of the port ----------------------------------------------------------------


def port_state(
    height: int, width: int, patch: tuple[int, int], inputs: int, classes: int, model: int,
    depth: list[int], expansion: int, *, linear_fuse: bool = False,
) -> State:  # fmt: skip
    """Random weights under the names and shapes that the port saves."""
    torch.manual_seed(1)
    state: State = {}

    def put(name: str, *shape: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, dtype=torch.float64) / 3 + (len(shape) == 1)
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], dtype=torch.float64) / 3

    def put_batch_norm(name: str, channels: int) -> None:
        put(name, channels)
        state[f"{name}.running_mean"] = torch.randn(channels, dtype=torch.float64)
        state[f"{name}.running_var"] = torch.rand(channels, dtype=torch.float64) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    put("patcher.0", model, inputs, *patch)
    for i, layers in enumerate(depth):
        c, h, w = model << i, (height // patch[0]) >> i, (width // patch[1]) >> i
        put(f"layers.{i}.patch_merge.1.reduction", 2 * c, 4 * c, bias=False)
        put(f"layers.{i}.patch_merge.1.norm", 4 * c)
        for j in range(layers):
            name = f"layers.{i}.model.{j}"
            put(f"{name}.0.fn.0", c, 1, 3, 3)
            put_batch_norm(f"{name}.0.norm", c)
            put(f"{name}.1.fn.0.proj_h", h, h)
            put(f"{name}.1.fn.0.proj_w", w, w)
            put(f"{name}.1.fn.0.fuse", *((c, 3 * c) if linear_fuse else (c, 3 * c, 1, 1)))
            put_batch_norm(f"{name}.1.norm", c)
            put(f"{name}.3.fn.0", expansion * c, c)
            put(f"{name}.3.fn.3", c, expansion * c)
            put(f"{name}.3.norm", c)
    put("mlp_head.1", model << (len(depth) - 1))
    put("mlp_head.3", classes, model << (len(depth) - 1))
    return state


@pytest.mark.parametrize("linear_fuse", [False, True])
@pytest.mark.parametrize(("size", "patch"), [((16, 16), (2, 2)), ((24, 8), (3, 1))])
def test_state_dict_of_the_port(
    size: tuple[int, int],
    patch: tuple[int, int],
    linear_fuse: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    depth = [2, 1, 2]
    state = port_state(*size, patch, 2, 5, 4, depth, 2, linear_fuse=linear_fuse)
    model = SparseMLP(size, list(patch), 2, 5, 4, depth).double().eval()
    with caplog.at_level(logging.WARNING, logger="smlp"):
        model.load_state_dict(state)
    (record,) = caplog.records
    assert "layers.2.patch_merge.1.norm.weight" in record.getMessage()
    assert "layers.1.patch_merge" not in record.getMessage()

    images = torch.randn(3, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(model(images), published(images, state, depth, patch), **CLOSE)

    used = {name for name in state if not name.startswith("layers.2.patch_merge")}
    assert set(model.state_dict()) == used


@pytest.mark.parametrize("patcher_norm", [False, True])
def test_forward(patcher_norm: bool) -> None:
    model = SparseMLP(**SMALL, expansion_factor=3, patcher_norm=patcher_norm).double().eval()
    randomise(model)
    images = torch.randn(3, 2, 16, 16, dtype=torch.float64) + 1
    want = published(images, model.state_dict(), [2, 1], (2, 2))
    torch.testing.assert_close(model(images), want, **CLOSE)


def test_parameter_count_and_gradients() -> None:
    with torch.device("meta"):
        model = SparseMLP()
    # The port has 43,089,880, of which 4,724,736 in a patch merging after the last stage.
    assert sum(p.numel() for p in model.parameters()) == 43_089_880 - 4_724_736

    small = SparseMLP(**SMALL)
    small(torch.randn(2, 2, 16, 16)).square().sum().backward()
    without = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_features_are_those_the_head_sees() -> None:
    model = SparseMLP(image_size=(16, 32), d_model=4, depth=(1, 2, 1), num_classes=3).eval()
    images = torch.randn(2, 3, 16, 32)
    features = model.forward_features(images)
    assert [tuple(f.shape) for f in features] == [(2, 4, 4, 8), (2, 8, 2, 4), (2, 16, 1, 2)]
    pooled = layer_norm(features[-1].movedim(1, -1), model.state_dict(), "mlp_head.1").mean((1, 2))
    torch.testing.assert_close(affine(pooled, model.state_dict(), "mlp_head.3"), model(images))
    # A finer stage is what its own truncation of the network computes.
    shorter = SparseMLP(image_size=(16, 32), d_model=4, depth=(1, 2), num_classes=3).eval()
    theirs = {k: v for k, v in model.state_dict().items() if not k.startswith(("layers.2", "mlp"))}
    shorter.load_state_dict(theirs, strict=False)
    torch.testing.assert_close(shorter.forward_features(images)[-1], features[1])


def test_dropout_only_in_training() -> None:
    model = SparseMLP(**SMALL, dropout=0.5)
    images = torch.randn(2, 2, 16, 16)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def build(**kwargs: object) -> Callable[[], SparseMLP]:
    return lambda: SparseMLP(**{**SMALL, **kwargs})


def feed(x: object) -> Callable[[], Tensor]:
    return lambda: SparseMLP(**SMALL)(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            build(image_size=(16, 18), patch_size=4),
            ValueError,
            "image_size: expected a width divisible by 8 (patch 4, halved 1 times between 2 "
            "stages), got 18",
        ),
        (
            build(image_size=20, depth=(1, 1, 1)),
            ValueError,
            "image_size: expected a height divisible by 8 (patch 2, halved 2 times between 3 "
            "stages), got 20",
        ),
        (build(image_size=0), ValueError, "image_size: expected at least 1, got 0"),
        (
            build(image_size=(16, 16, 3)),
            ValueError,
            "image_size: expected one integer or (height, width), got (16, 16, 3)",
        ),
        (build(patch_size="2"), TypeError, "patch_size: expected an integer, got '2'"),
        (build(in_channels=0), ValueError, "in_channels: expected at least 1, got 0"),
        (build(num_classes=0), ValueError, "num_classes: expected at least 1, got 0"),
        (build(d_model=6.0), TypeError, "d_model: expected an integer, got 6.0"),
        (build(expansion_factor=0), ValueError, "expansion_factor: expected at least 1, got 0"),
        (build(depth=2), TypeError, "depth: expected a tuple or list of integers, got 2"),
        (build(depth=[]), ValueError, "depth: expected at least one entry, got []"),
        (build(depth=[2, 0]), ValueError, "depth[1]: expected at least 1, got 0"),
        (build(dropout=1.0), ValueError, "dropout: expected a number in [0, 1), got 1.0"),
        (
            feed(torch.zeros(2, 2, 16, 18)),
            ValueError,
            "x: expected shape [B, 2, 16, 16], got [2, 2, 16, 18]; "
            "smlp.resize adapts a model to another image size",
        ),
        (feed(torch.zeros(2, 16, 16)), ValueError, "x: expected shape [B, 2, 16, 16], got [2, 16"),
        (
            feed(torch.zeros(2, 2, 16, 16, dtype=torch.uint8)),
            TypeError,
            "x: expected a floating-point tensor, got torch.uint8",
        ),
        (feed(None), TypeError, "x: expected a tensor, got NoneType"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
