"""load_checkpoint against independent implementations of the networks the weights come from."""

import argparse
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from smlp import (
    CheckpointError,
    SMLPBlock,
    SMLPNet,
    SparseMLP,
    load_checkpoint,
    paper_state_dict,
)
from tests.smlp.paper import State, paper_network, paper_state

CLOSE = dict(rtol=1e-10, atol=1e-10)
DEPTH = (1, 2, 1)
SMALL = dict(image_size=16, patch_size=2, in_channels=2, num_classes=5, d_model=4, depth=DEPTH)


def small_paper_state() -> State:
    return paper_state(16, 16, 2, 2, 5, 4, DEPTH, 3)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def copy_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_bias_that_the_paper_s_code_does_not_have_is_zero() -> None:
    state, images = small_paper_state(), torch.randn(2, 2, 16, 16, dtype=torch.float64)
    model = SMLPNet(**SMALL, block=SMLPBlock).double().eval()
    report = load_checkpoint(model, state)
    assert len(report.kept) == sum(DEPTH)
    torch.testing.assert_close(model(images), paper_network(images, state, DEPTH), **CLOSE)


def with_neck(model: nn.Module) -> None:
    model.neck = SMLPBlock(2, 2, 16)


def parametrized(model: nn.Module) -> None:
    weight_norm(model.get_submodule("stages.0.1.mix.block.fuse"))


@pytest.mark.parametrize("change", [with_neck, parametrized])
@pytest.mark.parametrize("layout", ["paper", "linear"])
def test_weights_that_a_layout_lacks_are_missing(
    change: Callable[[nn.Module], None], layout: str
) -> None:
    model = SMLPNet(**SMALL)
    state = small_paper_state()
    if layout == "linear":
        state = {k: v[..., 0, 0] if "fuse" in k else v for k, v in copy_of(model).items()}
    change(model)
    before = copy_of(model)
    with pytest.raises(CheckpointError, match=r"  missing: (neck|.*parametrizations)\."):
        load_checkpoint(model, state)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_paper_layout(size: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    """The paper's network, and what it would be with H != W, which its code does not allow."""
    state = paper_state(*size, 2, 2, 5, 4, DEPTH, 3)
    model = SMLPNet(**{**SMALL, "image_size": size}).double().eval()
    with caplog.at_level(logging.INFO, logger="smlp"):
        report = load_checkpoint(model, state)
    images = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(model(images), paper_network(images, state, DEPTH), **CLOSE)

    assert report.layout == "spach"
    assert sorted(entry.theirs for entry in report.mapped) == sorted(state)
    assert sorted(entry.ours for entry in report.mapped) == sorted(model.state_dict())
    assert not report.kept and not report.left_out
    names = {entry.theirs: (entry.ours, entry.how) for entry in report.mapped}
    assert names["token_mix.2.1.proh_w.bias"] == (
        "stages.1.2.mix.block.proj_h.bias",
        "axis named the other way round",
    )
    assert f"{len(state)} tensors loaded from a checkpoint in the spach layout" in caplog.text


def test_back_to_the_paper_layout() -> None:
    state = small_paper_state()
    model = SMLPNet(**SMALL).double()
    load_checkpoint(model, state)
    back = paper_state_dict(model)
    assert same(back, state)
    back["mlp_head.0.bias"].zero_()
    assert model.mlp_head[2].bias.any(), "the exported tensors share memory with the model"


def test_own_layout_and_wrapped_names(tmp_path: Path) -> None:
    source = SMLPNet(**SMALL)
    wrapped = {f"module._orig_mod.{k}": v for k, v in source.state_dict().items()}
    saved = {"model": wrapped, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "last.pt")
    model = SMLPNet(**SMALL)
    report = load_checkpoint(model, tmp_path / "last.pt")
    assert report.layout == "smlp"
    assert all(entry.how == "" for entry in report.mapped)
    assert same(model.state_dict(), source.state_dict())


def port_of(model: SparseMLP, *, linear_fuse: bool) -> State:
    """What the port would have saved for the same network."""
    state = copy_of(model)
    if linear_fuse:
        for name in state:
            if name.endswith("fuse.weight"):
                state[name] = state[name][:, :, 0, 0]
    last, channels = len(model.depth) - 1, model.channels[-1]
    state[f"layers.{last}.patch_merge.1.norm.weight"] = torch.ones(4 * channels)
    return state


@pytest.mark.parametrize(("linear_fuse", "layout"), [(False, "port"), (True, "external-attention")])
def test_port_layout(linear_fuse: bool, layout: str) -> None:
    source, model = SparseMLP(**SMALL), SparseMLP(**SMALL)
    report = load_checkpoint(model, port_of(source, linear_fuse=linear_fuse))
    assert same(model.state_dict(), source.state_dict())
    assert report.layout == layout
    assert report.left_out == ("layers.2.patch_merge.1.norm.weight",)


def test_arrays_without_batch_counters() -> None:
    """As a framework without torch tensors and without num_batches_tracked saves them."""
    source, model = SparseMLP(**SMALL), SparseMLP(**SMALL)
    arrays = {
        name: np.asarray(value)
        for name, value in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    report = load_checkpoint(model, arrays)
    assert same(model.state_dict(), source.state_dict())
    assert len(report.kept) == 2 * sum(DEPTH)
    assert all(name.endswith("num_batches_tracked") for name in report.kept)


def test_single_blocks_in_a_users_model() -> None:
    """A module of the user's own around blocks in different layouts."""
    torch.manual_seed(0)
    model = nn.ModuleList([SMLPBlock(3, 3, 2), SMLPBlock(3, 3, 2)]).double()
    state = {
        "0.proj_h.weight": torch.randn(3, 3, 1, 1).double(),
        "0.proj_h.bias": torch.randn(3).double(),
        "0.proh_w.weight": torch.randn(3, 3, 1, 1).double(),
        "0.proh_w.bias": torch.randn(3).double(),
        "0.fuse.weight": torch.randn(2, 6, 1, 1).double(),
        "1.proj_h.weight": torch.randn(3, 3).double(),
        "1.proj_h.bias": torch.randn(3).double(),
        "1.proj_w.weight": torch.randn(3, 3).double(),
        "1.proj_w.bias": torch.randn(3).double(),
        "1.fuse.weight": torch.randn(2, 6).double(),
        "1.fuse.bias": torch.randn(2).double(),
    }
    report = load_checkpoint(model, state)
    assert report.kept == ("0.fuse.bias",)

    x = torch.randn(2, 2, 3, 3).double()
    w = torch.einsum("wk,bchk->bchw", state["0.proj_h.weight"][:, :, 0, 0], x)
    w = w + state["0.proj_h.bias"]
    h = torch.einsum("hk,bckw->bchw", state["0.proh_w.weight"][:, :, 0, 0], x)
    h = h + state["0.proh_w.bias"][:, None]
    fuse = state["0.fuse.weight"][:, :, 0, 0]
    want = torch.einsum("oc,bchw->bohw", fuse, torch.cat([x, w, h], 1))
    torch.testing.assert_close(model[0](x), want, **CLOSE)

    h = torch.einsum("hk,bckw->bchw", state["1.proj_h.weight"], x)
    h = h + state["1.proj_h.bias"][:, None]
    w = torch.einsum("wk,bchk->bchw", state["1.proj_w.weight"], x) + state["1.proj_w.bias"]
    want = torch.einsum("oc,bchw->bohw", state["1.fuse.weight"], torch.cat([h, w, x], 1))
    want = want + state["1.fuse.bias"][:, None, None]
    torch.testing.assert_close(model[1](x), want, **CLOSE)


def test_other_classes() -> None:
    state = small_paper_state()
    model = SMLPNet(**{**SMALL, "num_classes": 7}).double().eval()
    before = copy_of(model)
    report = load_checkpoint(model, state, classifier=False)
    assert report.classifier == ("mlp_head.2.bias", "mlp_head.2.weight") and not report.kept
    assert "kept by classifier=False: mlp_head.2.bias, mlp_head.2.weight" in str(report)
    assert "not in the checkpoint" not in str(report)  # it is there
    assert report.left_out == ("mlp_head.0.weight", "mlp_head.0.bias")
    own = {"mlp_head.0.weight": before["mlp_head.2.weight"]}
    own["mlp_head.0.bias"] = before["mlp_head.2.bias"]
    images = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    want = paper_network(images, {**state, **own}, DEPTH)
    torch.testing.assert_close(model(images), want, **CLOSE)


def test_dtype_of_the_model_is_kept() -> None:
    source = SMLPNet(**SMALL).bfloat16()
    model = SMLPNet(**SMALL)
    load_checkpoint(model, source.state_dict())
    assert same(model.state_dict(), source.float().state_dict())


@pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)
def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = small_paper_state()
    save_file(state, tmp_path / "model.safetensors")
    model = SMLPNet(**SMALL).double()
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert same(paper_state_dict(model), state)
