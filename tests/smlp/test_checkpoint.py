"""load_checkpoint against independent implementations of the networks the weights come from."""

import argparse
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

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
from smlp.ablations import ablate
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


# --- loading -----------------------------------------------------------------------------------


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


# --- refusing ----------------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)


def put(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            drop("token_mix.3.1.proh_w.weight"),
            "missing: token_mix.3.1.proh_w.weight (for stages.2.1.mix.block.proj_h.weight) [2, 2]",
        ),
        (drop("batch_norm.running_var"), "missing: batch_norm.running_var (for mlp_head.0.runn"),
        (
            put("token_mix.9.1.BN.bias", torch.zeros(4)),
            "not in the model: token_mix.9.1.BN.bias [4",
        ),
        (
            put("token_mix.0.1.proj_h.weight", torch.zeros(7, 7, 1, 1)),
            "shape: token_mix.0.1.proj_h.weight (for stages.0.1.mix.block.proj_w.weight) "
            "[7, 7, 1, 1], where the model has [8, 8]",
        ),
        (
            put("token_mix.0.1.fuse.weight", torch.zeros(4, 11, 1, 1)),
            "shape: token_mix.0.1.fuse.weight (for stages.0.1.mix.block.fuse.weight) "
            "[4, 11, 1, 1], where the model has [4, 12, 1, 1]",
        ),
        (put("mlp_head.0.bias", "text"), "no tensor: mlp_head.0.bias (for mlp_head.2.bias), a str"),
        (
            put("mlp_head.0.bias", torch.zeros(5).to_sparse()),
            "no dense values: mlp_head.0.bias (for mlp_head.2.bias), torch.sparse_coo on cpu",
        ),
        (
            put("mlp_head.0.bias", torch.zeros(5, device="meta")),
            "no dense values: mlp_head.0.bias (for mlp_head.2.bias), torch.strided on meta",
        ),
        (
            put("mlp_head.0.bias", torch.zeros(5).long()),
            "dtype: mlp_head.0.bias (for mlp_head.2.bias) torch.int64, where the model has torch.f",
        ),
    ],
)
def test_refuses_and_leaves_the_model(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    state = small_paper_state()
    change(state)
    model = SMLPNet(**SMALL)
    before = copy_of(model)
    with pytest.raises(CheckpointError, match=re.escape(problem)) as caught:
        load_checkpoint(model, state)
    assert len(caught.value.problems) == 1
    assert same(model.state_dict(), before)


def test_every_problem_is_listed_and_hints_help() -> None:
    model = SMLPNet(**SMALL)
    before = copy_of(model)
    required = [name for name in small_paper_state() if not name.endswith("batches_tracked")]
    with pytest.raises(CheckpointError, match=f"and {len(required) + 5 - 20} more") as caught:
        load_checkpoint(model, {f"token_mix.{i}": torch.zeros(1) for i in range(5)})
    names = {problem.split(": ")[1].split()[0] for problem in caught.value.problems}
    assert len(caught.value.problems) == len(required) + 5
    assert names >= {"mlp_head.0.weight", "token_mix.3.1.fuse.weight", "token_mix.4"}
    with pytest.raises(CheckpointError, match=r"another image size.*smlp\.resize"):
        load_checkpoint(model, paper_state(32, 32, 2, 2, 5, 4, DEPTH, 3))
    with pytest.raises(CheckpointError, match="classifier=False"):
        load_checkpoint(model, paper_state(16, 16, 2, 2, 9, 4, DEPTH, 3))
    with pytest.raises(CheckpointError, match=r"not in the model: BN\.weight"):
        state = {
            k[14:]: v for k, v in small_paper_state().items() if k.startswith("token_mix.0.1.")
        }
        load_checkpoint(SMLPBlock(8, 8, 4), state)
    assert same(model.state_dict(), before)


class Malicious:
    """Unpickling this creates the file named by ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    model = SMLPNet(**SMALL)
    before = copy_of(model)
    state = {**model.state_dict(), "extra": Malicious(tmp_path / "executed")}
    torch.save(state, tmp_path / "bad.pt")
    expected = r"source: expected a file of tensors, got .*bad\.pt"
    with pytest.raises(ValueError, match=expected) as error:
        load_checkpoint(model, tmp_path / "bad.pt")
    assert "weights_only" not in str(error.value)  # torch's text says how to read it carelessly
    assert f"{os.mkdir.__module__}.mkdir, which could run code" in str(error.value)
    assert "save only tensors: torch.save(state_dict, path)" in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert same(model.state_dict(), before)
    # The file does what it says when it is read carelessly; otherwise this test shows nothing.
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    model = SMLPBlock(2, 2, 2)
    (tmp_path / "noise.pt").write_bytes(bytes(range(200)))
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("noise.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"source: expected a file of tensors, got .*{name}"):
            load_checkpoint(model, tmp_path / name)
    with pytest.raises(TypeError, match=r"a file or a state dict, got list in .*list\.pt"):
        load_checkpoint(model, str(tmp_path / "list.pt"))
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path / "none.pt")
    with pytest.raises(TypeError, match="source: expected a path, a file or a state dict, got int"):
        load_checkpoint(model, 3)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        load_checkpoint(None, {})
    with pytest.raises(TypeError, match="classifier: expected True for a model other than"):
        load_checkpoint(model, model.state_dict(), classifier=False)
    with pytest.raises(ValueError, match="model: expected parameters with storage"):
        load_checkpoint(SMLPBlock(2, 2, 2, device="meta"), model.state_dict())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["damaged.pt", "legacy.pt", "damaged.safetensors", "no_suffix"])
def test_damaged_files_leave_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        modern = name != "legacy.pt"
        state = SMLPBlock(3, 4, 5).state_dict()
        torch.save(state, path, _use_new_zipfile_serialization=modern)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(SMLPBlock(3, 4, 5).state_dict(), path)
    data, random, refused = path.read_bytes(), Random(0), 0
    for _ in range(150):
        damaged = bytearray(data[: random.randrange(len(data))] if random.random() < 0.4 else data)
        for _ in range(4):
            if damaged:
                damaged[random.randrange(min(len(damaged), 600))] = random.randrange(256)
        path.write_bytes(damaged)
        model = SMLPBlock(3, 4, 5)
        before = copy_of(model)
        try:
            load_checkpoint(model, path)
        except ValueError as error:
            assert isinstance(error, CheckpointError) or name in str(error)
            refused += 1
            assert same(model.state_dict(), before)
    assert refused > 100  # the others hit what nobody looks at, or the numbers


def test_export_errors() -> None:
    with pytest.raises(ValueError, match=r"network: expected square feature maps .* got 4 x 8"):
        paper_state_dict(SMLPNet(**{**SMALL, "image_size": (8, 16)}))
    with pytest.raises(TypeError, match="network: expected an SMLPNet, got SparseMLP"):
        paper_state_dict(SparseMLP(**SMALL))
    for network in (ablate("sum", **SMALL), SMLPNet(**SMALL, block=SMLPBlock)):
        with pytest.raises(ValueError, match=r"expected the weights of the paper.* others: "):
            paper_state_dict(network)
