"""Which weights load_checkpoint takes from a file that holds several, and where it finds them."""

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from smlp import FeaturePyramid, SMLPBlock, SMLPNet, SparseMLP, load_checkpoint, paper_state_dict
from smlp.smlpnet import SMLPNetLayer
from tests.smlp.paper import paper_state
from tests.smlp.test_checkpoint import SMALL, port_of, same

State = dict[str, Tensor]
DEPTH = SMALL["depth"]


def random_state(seed: int) -> State:
    torch.manual_seed(seed)
    return SMLPNet(**SMALL).state_dict()


RAW, EMA = random_state(1), random_state(2)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def averaged_model(state: State) -> State:
    model = SMLPNet(**SMALL)
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


# What training scripts write, by whom; the first of each pair is where the averaged weights are.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("state_dict_ema", {"state_dict": RAW, "state_dict_ema": EMA, "epoch": 3}),
    "the paper's code": ("model_ema", {"model": RAW, "model_ema": EMA, "epoch": 3}),
    "torchvision": ("model_ema.module", {"model": RAW, "model_ema": averaged_model(EMA)}),
    "ours": ("ema", {"config": {}, "model": RAW, "ema": EMA, "ema_steps": 7}),
    "mmengine": (
        "ema_state_dict.module",
        {"state_dict": RAW, "ema_state_dict": averaged_model(EMA)},
    ),
    "params": ("params_ema", {"params": RAW, "params_ema": EMA}),
    "swa": ("swa_model", {"model_state_dict": RAW, "swa_model": EMA}),
    "averaged by name": ("averaged_model", {"net": RAW, "averaged_model": EMA}),
    "lightning": (
        "state_dict.model",
        {
            "current_model_state": prefixed("model.", RAW),
            "state_dict": prefixed("model.", EMA),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
    ),
    "in one state dict": (
        "state_dict.model_ema",
        {"state_dict": prefixed("model.", RAW) | prefixed("model_ema.", EMA)},
    ),
    "at the top": ("ema", {**RAW, "ema": EMA}),
    "deeply": ("callbacks.EMA.state", {"model": RAW, "callbacks": {"EMA": {"state": EMA}}}),
}
WITH_OPTIMIZER = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}}


@pytest.mark.parametrize("name", FILES)
def test_the_averaged_weights_are_taken_unless_asked_otherwise(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    where, content = FILES[name]
    if name != "at the top":
        content = content | WITH_OPTIMIZER
    for weights, expected in (("auto", EMA), ("ema", EMA), ("raw", RAW)):
        model = SMLPNet(**SMALL)
        with caplog.at_level(logging.INFO, logger="smlp"):
            report = load_checkpoint(model, content, weights=weights)
        assert same(model.state_dict(), expected)
        assert report.averaged == (weights != "raw")
        assert len(report.others) == 1
        if report.averaged:
            assert report.weights == where
            said = f"these are the averaged weights in {where}; not loaded: {report.others[0]}"
            assert said in caplog.text


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"lightning", "in one state dict"}))
def test_files_with_averaged_weights_alone(name: str) -> None:
    where, content = FILES[name]
    key = where.partition(".")[0]
    model = SMLPNet(**SMALL)
    report = load_checkpoint(model, {key: content[key]})
    assert same(model.state_dict(), EMA) and report.averaged and not report.others
    with pytest.raises(
        ValueError, match=rf"one set of raw weights \(weights='raw'\), got only: {key}"
    ):
        load_checkpoint(model, {key: content[key]}, weights="raw")


def test_the_state_dict_of_an_averaged_model_itself() -> None:
    model = SMLPNet(**SMALL)
    report = load_checkpoint(model, averaged_model(EMA), weights="ema")
    assert same(model.state_dict(), EMA) and report.averaged


def test_errors_about_the_choice_leave_the_model() -> None:
    model = SMLPNet(**SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights: expected 'auto', 'ema' or 'raw', got 'best'"):
        load_checkpoint(model, RAW, weights="best")
    with pytest.raises(ValueError, match=r"averaged weights .* got only: state_dict$"):
        load_checkpoint(model, {"state_dict": RAW}, weights="ema")
    with pytest.raises(ValueError, match="got several: student, teacher; pass one of them"):
        load_checkpoint(model, {"student": RAW, "teacher": EMA})
    blocks = nn.ModuleList([SMLPBlock(2, 3, 4), SMLPBlock(2, 3, 4)])
    with pytest.raises(ValueError, match="got several: 0, 1; pass one of them"):
        load_checkpoint(SMLPBlock(2, 3, 4), blocks.state_dict())
    assert same(model.state_dict(), before)


def test_averaged_weights_that_cannot_be_read_are_mentioned() -> None:
    """Under names without dots, or without names."""
    without_dots = {name.replace(".", ""): value for name, value in EMA.items()}
    for ema in ({"shadow_params": list(EMA.values())}, without_dots):
        model = SMLPNet(**SMALL)
        report = load_checkpoint(model, {"model": RAW, "model_ema": ema})
        assert same(model.state_dict(), RAW) and not report.averaged
        assert report.others == ("model_ema (not understood)",)
        assert "not loaded: model_ema (not understood)" in str(report)


PREFIXES = ["model.", "backbone.", "module.", "_orig_mod.", "module.model.", "encoder.net.0.1."]
PREFIXES += [
    "module._orig_mod.",
    "_orig_mod.module.",
    "_forward_module.",
    "model._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("around", [lambda s: s, lambda s: {"state_dict": s, "step": 3}])
def test_any_common_beginning_of_names(prefix: str, around: Callable[[State], Any]) -> None:
    model = SMLPNet(**SMALL)
    other_parts = {"criterion.weight": torch.ones(3), "head.loss.scale": torch.ones(1)}
    if prefix in ("_orig_mod.", "_forward_module."):  # which say nothing of what they wrap
        other_parts = {}
    load_checkpoint(model, around({**prefixed(prefix, RAW), **other_parts}))
    assert same(model.state_dict(), RAW)
    paper = paper_state(16, 16, 2, 2, 5, 4, DEPTH, 3)
    report = load_checkpoint(model.double(), around(prefixed(prefix, paper)))
    assert report.layout == "spach" and len(report.mapped) == len(paper)


def inner_wrapped(state: State) -> State:
    return {name.replace("stages.1.", "stages.1._orig_mod."): v for name, v in state.items()}


def test_wrapped_modules_inside() -> None:
    model = SMLPNet(**SMALL)
    load_checkpoint(model, inner_wrapped(RAW))
    assert same(model.state_dict(), RAW)
    model.stages[1] = torch.compile(model.stages[1])
    assert same(model.state_dict(), inner_wrapped(RAW))
    load_checkpoint(model, {"state_dict": prefixed("module.", EMA)})
    assert same(model.state_dict(), inner_wrapped(EMA))
    paper = paper_state(16, 16, 2, 2, 5, 4, DEPTH, 3)
    report = load_checkpoint(model, paper)
    assert sorted(entry.theirs for entry in report.mapped) == sorted(paper)


@pytest.mark.parametrize("layout", ["smlp", "spach", "external-attention"])
def test_checkpointed_layers_inside(layout: str) -> None:
    """Their wrapper is part of the modules' names, but not of the weights'."""
    state = {"spach": paper_state(16, 16, 2, 2, 5, 4, DEPTH, 3)}.get(layout, RAW)
    if layout == "external-attention":
        state = {n: v[..., 0, 0] if "fuse" in n else v for n, v in RAW.items()}
    plain, model = SMLPNet(**SMALL), SMLPNet(**SMALL)
    load_checkpoint(plain, state)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, SMLPNetLayer))
    assert load_checkpoint(model, state).layout == layout
    assert same(model.state_dict(), plain.state_dict())
    assert same(paper_state_dict(model), paper_state_dict(plain))


@pytest.mark.parametrize(
    "wrap",
    [
        DataParallel,
        DistributedDataParallel,
        AveragedModel,
        torch.compile,
        lambda model: torch.compile(DistributedDataParallel(model)),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for state in (RAW, prefixed("module.", RAW), prefixed("_orig_mod.", RAW)):
        wrapped = wrap(SMLPNet(**SMALL))
        load_checkpoint(wrapped, state)
        values = [value for name, value in wrapped.state_dict().items() if name != "n_averaged"]
        assert all(map(torch.equal, values, RAW.values()))


@pytest.mark.usefixtures("process_group")
def test_sharded_models() -> None:
    """Their state dict loads; they themselves would take half of another before failing."""
    torch.manual_seed(3)
    sharded = SMLPNet(**SMALL)
    whole = {name: value.clone() for name, value in sharded.state_dict().items()}
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"model: expected whole parameters, got .* load before"):
        load_checkpoint(sharded, RAW)
    model = SMLPNet(**SMALL)
    load_checkpoint(model, sharded.state_dict())
    assert same(model.state_dict(), whole)


@pytest.mark.parametrize("layout", ["smlp", "spach", "port", "pyramid"])
def test_a_backbone_takes_a_classification_checkpoint(layout: str) -> None:
    if layout == "port":
        torch.manual_seed(3)
        source = SparseMLP(**SMALL)
        state, network = port_of(source, linear_fuse=False), SparseMLP(**SMALL)
        expected = source.state_dict()
    elif layout == "spach":
        state, network = paper_state(16, 16, 2, 2, 5, 4, DEPTH, 3), SMLPNet(**SMALL)
        full = SMLPNet(**SMALL)
        load_checkpoint(full, state)
        expected = full.state_dict()
    else:
        state, network, expected = RAW, SMLPNet(**SMALL), RAW
    backbone = FeaturePyramid(network, stages=(0, 2))
    if layout == "pyramid":  # its own
        state = {f"network.{n}": v for n, v in RAW.items() if not n.startswith("mlp_head.")}
    for model in (backbone, backbone.network):
        report = load_checkpoint(model, state, classifier=False)
        assert all(torch.equal(v, expected[n]) for n, v in network.state_dict().items())
        heads = [n for n in state if n.startswith(("mlp_head.", "batch_norm."))]
        assert set(report.left_out) >= set(heads)
        assert bool(heads) == (layout != "pyramid")


def test_files_that_are_open() -> None:
    buffer = io.BytesIO()
    torch.save({"model": RAW}, buffer)
    buffer.seek(0)
    model = SMLPNet(**SMALL)
    load_checkpoint(model, buffer)
    assert same(model.state_dict(), RAW)

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

    load_checkpoint(model.double(), Stream(buffer.getvalue()))
    with pytest.raises(ValueError, match="got the file object, which cannot be read"):
        load_checkpoint(model, io.BytesIO(buffer.getvalue()[:500]))
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the checkpoints extra")
    load_checkpoint(model.float(), io.BytesIO(safetensors.save(EMA)))
    assert same(model.state_dict(), EMA)


def test_whole_modules_in_memory() -> None:
    source = SMLPNet(**SMALL)
    model = SMLPNet(**SMALL)
    load_checkpoint(model, {"model": source, "epoch": 3})
    assert same(model.state_dict(), source.state_dict())
