"""SMLPBlock against the formula written out in fp64, in every published layout."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import Tensor

from smlp import SMLPBlock

# Agreement of two evaluation orders of the same sums in fp64 (values of order 1, up to ~100 terms).
EXACT = dict(rtol=1e-12, atol=1e-12)


def by_the_formula(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """The block as sums over one index at a time; nothing is concatenated or permuted."""
    weight_h, weight_w = params["proj_h.weight"], params["proj_w.weight"]
    channels = x.shape[1]
    fuse = params["fuse.weight"].reshape(channels, 3, channels)
    mixed_h = torch.einsum("hk,bckw->bchw", weight_h, x) + params["proj_h.bias"].view(1, 1, -1, 1)
    mixed_w = torch.einsum("wk,bchk->bchw", weight_w, x) + params["proj_w.bias"].view(1, 1, 1, -1)
    out = torch.zeros_like(x)
    for branch, features in enumerate((mixed_h, mixed_w, x)):
        out += torch.einsum("oc,bchw->bohw", fuse[:, branch], features)
    if "fuse.bias" in params:
        out += params["fuse.bias"].view(1, -1, 1, 1)
    return out


def random_block(height: int, width: int, channels: int, **kwargs: bool) -> SMLPBlock:
    torch.manual_seed(height * 10007 + width * 101 + channels)
    return SMLPBlock(height, width, channels, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("fuse_bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"),
    [(2, 14, 14, 24), (1, 7, 5, 3), (3, 1, 6, 4), (2, 6, 1, 4), (2, 1, 1, 1), (1, 4, 16, 13)],
)
def test_forward(batch: int, height: int, width: int, channels: int, fuse_bias: bool) -> None:
    block = random_block(height, width, channels, fuse_bias=fuse_bias)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64) + 1.5
    torch.testing.assert_close(block(x), by_the_formula(x, block.state_dict()), **EXACT)


def test_gradients() -> None:
    block = random_block(4, 3, 5)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    names = [name for name, _ in block.named_parameters()]
    got = torch.autograd.grad(block(x), [x, *block.parameters()], g)

    leaves = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    x_ref = x.detach().clone().requires_grad_()
    want = torch.autograd.grad(by_the_formula(x_ref, leaves), [x_ref, *leaves.values()], g)
    for name, left, right in zip(["x", *names], got, want, strict=True):
        torch.testing.assert_close(left, right, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_memory_formats_give_the_same_values() -> None:
    block = random_block(6, 4, 8)
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    want = by_the_formula(x, block.state_dict())
    padded = torch.full((2, 8, 12, 8), torch.nan, dtype=torch.float64)
    padded[:, :, ::2, 1::2] = x
    for given in (x.to(memory_format=torch.channels_last), padded[:, :, ::2, 1::2]):
        torch.testing.assert_close(block(given), want, **EXACT)
    one = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(block(one), want[:1].expand(3, -1, -1, -1), **EXACT)


def test_empty_batch() -> None:
    block = random_block(4, 3, 5)
    x = torch.empty(0, 5, 4, 3, dtype=torch.float64)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


# --- published layouts -------------------------------------------------------------------------


def paper_block(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The block as the paper's code arranges it: 1x1 convolutions, identity first, no fuse bias.

    Its ``proj_h`` takes the columns as channels (so it mixes W), its ``proh_w`` the rows.
    """
    along_w = torch.einsum("wk,bchk->bchw", state["proj_h.weight"][:, :, 0, 0], x)
    along_w = along_w + state["proj_h.bias"].view(1, 1, 1, -1)
    along_h = torch.einsum("hk,bckw->bchw", state["proh_w.weight"][:, :, 0, 0], x)
    along_h = along_h + state["proh_w.bias"].view(1, 1, -1, 1)
    features = torch.cat([x, along_w, along_h], dim=1)
    return torch.einsum("oc,bchw->bohw", state["fuse.weight"][:, :, 0, 0], features)


def layout(name: str, height: int, width: int, channels: int) -> dict[str, Tensor]:
    torch.manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    if name == "paper":
        return {
            "proj_h.weight": random(width, width, 1, 1),
            "proj_h.bias": random(width),
            "proh_w.weight": random(height, height, 1, 1),
            "proh_w.bias": random(height),
            "fuse.weight": random(channels, 3 * channels, 1, 1),
        }
    fuse = (channels, 3 * channels) if name == "linear fuse" else (channels, 3 * channels, 1, 1)
    return {
        "proj_h.weight": random(height, height),
        "proj_h.bias": random(height),
        "proj_w.weight": random(width, width),
        "proj_w.bias": random(width),
        "fuse.weight": random(*fuse),
        "fuse.bias": random(channels),
    }


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 7)])
@pytest.mark.parametrize("prefix", ["", "stage.0.mix."])
@pytest.mark.parametrize("name", ["linear fuse", "conv fuse", "paper", "paper without fuse bias"])
def test_loads_published_layout(name: str, prefix: str, height: int, width: int) -> None:
    channels = 4
    state = layout(name.removesuffix(" without fuse bias"), height, width, channels)
    block = SMLPBlock(height, width, channels, fuse_bias="without" not in name, dtype=torch.float64)
    holder = torch.nn.Module()
    holder.add_module("stage", torch.nn.ModuleList([torch.nn.ModuleDict({"mix": block})]))
    given = {prefix + key: value.clone() for key, value in state.items()}
    (holder if prefix else block).load_state_dict(given)

    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    want = paper_block(x, state) if "paper" in name else by_the_formula(x, state)
    torch.testing.assert_close(block(x), want, **EXACT)
    assert set(given) == {prefix + key for key in state}, "the caller's state dict was changed"
    assert all(torch.equal(given[prefix + key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("paper", "proh_w.weight", (5, 5, 1, 1)),
        ("paper", "fuse.weight", (4, 13, 1, 1)),
        ("paper", "fuse.weight", (12,)),
        ("linear fuse", "fuse.weight", (4, 11)),
    ],
)
def test_wrong_shapes_are_reported(name: str, key: str, shape: tuple[int, ...]) -> None:
    state = layout(name, 6, 6, 4)
    state[key] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SMLPBlock(6, 6, 4).load_state_dict(state)


def test_missing_and_unexpected_keys_are_reported() -> None:
    state = layout("conv fuse", 6, 6, 4)
    del state["proj_h.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*proj_h\.bias"):
        SMLPBlock(6, 6, 4).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fuse\.bias"):
        SMLPBlock(6, 6, 4, fuse_bias=False).load_state_dict(layout("conv fuse", 6, 6, 4))


# --- copies, autocast, dtypes ------------------------------------------------------------------


def test_copies_are_equal_and_independent() -> None:
    block = random_block(4, 3, 5)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    want = by_the_formula(x, block.state_dict())
    saved = io.BytesIO()
    torch.save(block.state_dict(), saved)
    saved.seek(0)
    restored = SMLPBlock(4, 3, 5, dtype=torch.float64)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), restored]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    for other in copies:
        torch.testing.assert_close(other(x), want, **EXACT)
        other.load_state_dict(layout("linear fuse", 4, 3, 5))  # the hook survived the copy


def test_autocast() -> None:
    block = random_block(8, 6, 16).float()
    x = torch.randn(2, 16, 8, 6) + 0.5
    want = by_the_formula(x.double(), {k: v.double() for k, v in block.state_dict().items()})
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
        half_in = block(x.bfloat16())
    assert out.dtype == half_in.dtype == torch.bfloat16
    # Inputs, weights and the branches are rounded to 8 bits before sums of a few dozen terms.
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(half_in.double(), want, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_factory_arguments() -> None:
    block = SMLPBlock(4, 3, 5, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 3, 5), ValueError, "height: expected at least 1, got 0"),
        ((4, -1, 5), ValueError, "width: expected at least 1, got -1"),
        ((4, 3, 0), ValueError, "channels: expected at least 1, got 0"),
        ((4.0, 3, 5), TypeError, "height: expected an integer, got 4.0"),
        ((4, "3", 5), TypeError, "width: expected an integer, got '3'"),
        ((4, 3, True), TypeError, "channels: expected an integer, got True"),
    ],
)
def test_wrong_sizes(sizes: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SMLPBlock(*sizes)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(2, 5, 3, 4),
            ValueError,
            "x: expected shape [B, 5, 4, 3], got [2, 5, 3, 4]",
        ),
        (torch.zeros(5, 4, 3), ValueError, "x: expected shape [B, 5, 4, 3], got [5, 4, 3]"),
        (
            torch.zeros(2, 5, 4, 3, device="meta"),
            ValueError,
            "x: expected the parameters' device cpu, got meta; move one of them with .to()",
        ),
        (
            torch.zeros(2, 5, 4, 3, dtype=torch.int64),
            TypeError,
            "x: expected a floating-point tensor, got torch.int64",
        ),
        (
            torch.zeros(2, 5, 4, 3, dtype=torch.float64),
            TypeError,
            "x: expected the parameters' dtype torch.float32, got torch.float64; "
            "convert one of them with .to() or run under torch.autocast",
        ),
        ([1.0], TypeError, "x: expected a tensor, got list"),
        (
            torch.zeros(2, 5, 4, 3).to_sparse(),
            TypeError,
            "x: expected a dense tensor, got one of layout torch.sparse_coo",
        ),
        (
            torch.nested.nested_tensor([torch.zeros(5, 4, 3)]),
            TypeError,
            "x: expected a dense tensor, got one of layout nested",
        ),
    ],
)
def test_wrong_input(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SMLPBlock(4, 3, 5)(x)


def test_other_type_on_meta() -> None:
    """Where autocast does not exist, and asking about it is an error of torch's own."""
    block = SMLPBlock(2, 3, 4, device="meta")
    with pytest.raises(TypeError, match=r"x: expected the parameters' dtype torch.float32"):
        block(torch.empty(1, 4, 2, 3, device="meta", dtype=torch.float64))


@pytest.mark.parametrize("weights", [torch.float64, torch.float32], ids=str)
def test_float64_is_exempt_from_autocast(weights: torch.dtype) -> None:
    block = SMLPBlock(2, 3, 4, dtype=weights)
    other = torch.float32 if weights == torch.float64 else torch.float64
    message = f"x: expected the parameters' dtype {weights}, got {other}; convert one .*is exempt"
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.zeros(1, 4, 2, 3, dtype=weights)).shape == (1, 4, 2, 3)
        with pytest.raises(TypeError, match=message):
            block(torch.zeros(1, 4, 2, 3, dtype=other))
