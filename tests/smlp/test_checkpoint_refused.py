"""What load_checkpoint and paper_state_dict refuse: the model stays as it was, and no code runs."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from smlp import (
    CheckpointError,
    SMLPBlock,
    SMLPNet,
    SparseMLP,
    load_checkpoint,
    paper_state_dict,
)
from smlp.ablations import ablate
from tests.smlp.paper import paper_state
from tests.smlp.test_checkpoint import DEPTH, SMALL, copy_of, same, small_paper_state


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
