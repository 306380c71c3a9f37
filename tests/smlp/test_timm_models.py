"""The networks in timm's registry, where timm can be imported with the installed torch."""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import smlp
from smlp.timm_network import TimmSMLPNet
from tests.smlp.paper import paper_state
from tests.smlp.test_timm_network import SIGNATURES

try:
    import timm  # type: ignore[import-not-found,unused-ignore]

    import smlp.timm_models
except (ImportError, RuntimeError) as error:
    missing = f"timm cannot be imported: {error}"
else:
    missing = ""
needs_timm = pytest.mark.skipif(bool(missing), reason=missing)


@needs_timm
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_timm_builds_the_published_networks(size: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"smlpnet_{size}")
        ours = getattr(smlp, f"smlpnet_{size}")()
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert theirs.num_features == theirs.head_hidden_size == ours.channels[-1]
    rates = [
        [m.drop_rate for m in net.modules() if hasattr(m, "drop_rate")] for net in (theirs, ours)
    ]
    assert rates[0] == rates[1]


SMALL = {"img_size": (32, 64), "in_chans": 1, "num_classes": 7, "d_model": 8, "depth": (1, 2, 1)}


@needs_timm
def test_timms_arguments_reach_the_network() -> None:
    torch.manual_seed(0)
    model = timm.create_model("smlpnet_tiny", drop_path_rate=0.5, **SMALL).eval()
    torch.manual_seed(0)
    expected = smlp.SMLPNet((32, 64), 4, 1, 7, d_model=8, depth=(1, 2, 1)).eval()
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert model.stages[2][1].drop_path.drop_rate == 0.5
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["interpolation"]) == ((1, 32, 64), "bicubic")


@needs_timm
@pytest.mark.parametrize("indices", [None, (0, 2), (-1,), (-2, -1), 2])
def test_features_only_is_a_pyramid(indices: int | tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    options = {} if indices is None else {"out_indices": indices}
    backbone = timm.create_model("smlpnet_tiny", features_only=True, **SMALL, **options).eval()
    torch.manual_seed(0)
    network = smlp.SMLPNet((32, 64), 4, 1, 7, d_model=8, depth=(1, 2, 1)).eval()
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        maps, every = backbone(x), network.forward_features(x)
    if indices == 2:
        indices = (-2, -1)
    expected = every if indices is None else [every[i] for i in indices]
    assert len(maps) == len(expected)
    assert all(map(torch.equal, maps, expected))
    assert backbone.feature_info.channels() == [stage.shape[1] for stage in expected]
    assert backbone.feature_info.reduction() == [32 // stage.shape[2] for stage in expected]
    assert not any("mlp_head" in name for name, _ in backbone.named_parameters())


@needs_timm
def test_the_calls_of_train_and_validate(tmp_path: Path) -> None:
    """Those that timm's train.py and validate.py make of a model, in their order."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.models import load_checkpoint, model_parameters, resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV2

    torch.manual_seed(0)
    options = {"drop_rate": 0.1, "drop_path_rate": 0.2, "global_pool": None, "bn_eps": None}
    options |= {"drop_block_rate": None, "scriptable": False, "checkpoint_path": ""}
    model = timm.create_model("smlpnet_tiny", pretrained=False, **options, **SMALL)
    assert model.num_classes == 7 and model.head_drop.p == 0.1
    model.set_grad_checkpointing(enable=True)
    data = timm.data.resolve_data_config({}, model=model)
    assert data["input_size"] == (1, 32, 64)
    rates = {"opt": "adamw", "lr": 1e-2, "weight_decay": 0.05, "layer_decay": 0.5}
    optimizer = create_optimizer_v2(model, **rates)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert len(scales) == len(list(model.parameters()))
    by_depth = [scales[id(model.stages[s][layer].norm_mlp.weight)] for s, layer in LAYERS]
    assert by_depth == sorted(by_depth) and len(set(by_depth)) == len(by_depth)
    assert scales[id(model.stages[0][0].weight)] < by_depth[0]
    assert scales[id(model.get_classifier().weight)] == 1
    ema = ModelEmaV2(model, decay=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2)
    arguments = argparse.Namespace(model="smlpnet_tiny")
    saver = CheckpointSaver(
        model, optimizer, arguments, ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    x, target = torch.randn(8, *data["input_size"]), torch.arange(8) % 7
    loss_of = LabelSmoothingCrossEntropy()
    model.train()
    losses = []
    for epoch in range(6):
        loss = loss_of(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model_parameters(model, exclude_head=True), 5.0)
        optimizer.step()
        ema.update(model)
        scheduler.step(epoch + 1)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")

    fresh = timm.create_model("smlpnet_tiny", **SMALL).eval()
    for use_ema, expected in ((True, ema.module), (False, model)):
        load_checkpoint(fresh, path, use_ema)
        with torch.no_grad():
            assert torch.equal(fresh(x), expected.eval()(x))
    assert resume_checkpoint(fresh, path) == 1
    report = smlp.load_checkpoint(fresh, path)
    assert report.averaged and report.weights == "state_dict_ema"
    with torch.no_grad():
        assert torch.equal(fresh(x), ema.module(x))
    assert timm.data.resolve_model_data_config(fresh)["input_size"] == (1, 32, 64)


LAYERS = [(0, 1), (1, 1), (1, 2), (2, 1)]


@needs_timm
def test_files_of_the_papers_code(tmp_path: Path) -> None:
    torch.save(paper_state(32, 32, 4, 1, 7, 8, (1, 2, 1), 3), tmp_path / "paper.pth")
    size = {**SMALL, "img_size": 32}
    path = str(tmp_path / "paper.pth")
    by_timm = timm.create_model("smlpnet_tiny", checkpoint_path=path, **size)
    overlay = {"file": path}
    ours = timm.create_model(
        "smlpnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **size
    )
    states = by_timm.state_dict(), ours.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = {**size, "num_classes": 3}
    overlay["num_classes"] = -1  # as train.py asks for another classifier
    ours = timm.create_model(
        "smlpnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **other
    )
    assert torch.equal(ours.mlp_head[0].weight, by_timm.mlp_head[0].weight)
    assert ours.num_classes == 3


@needs_timm
def test_timms_utilities() -> None:
    from timm.models import group_modules, group_parameters

    model = timm.create_model("smlpnet_tiny", **SMALL)
    for coarse, groups in ((False, 8), (True, 5)):
        matcher = model.group_matcher(coarse=coarse)
        assert len(group_parameters(model, matcher)) == groups
        assert len(group_modules(model, matcher)) == groups
    assert timm.models.get_pretrained_cfg("smlpnet_base").fixed_input_size
    headless = timm.create_model("smlpnet_tiny", **{**SMALL, "num_classes": 0})
    assert headless(torch.randn(2, 1, 32, 64)).shape == (2, 32)


@needs_timm
@pytest.mark.parametrize("method", SIGNATURES)
def test_signatures_are_timms(method: str) -> None:
    theirs = inspect.signature(getattr(timm.models.MlpMixer, method, lambda: None)).parameters
    ours = inspect.signature(getattr(TimmSMLPNet, method)).parameters
    assert set(theirs) <= set(ours)


@needs_timm
def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="pretrained: expected False, got True: no weights come"):
        timm.create_model("smlpnet_tiny", pretrained=True)
    with pytest.raises(ValueError, match="out_indices: expected some of the 3 stages"):
        timm.create_model("smlpnet_tiny", features_only=True, out_indices=(3,), **SMALL)


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "smlp.timm_models", raising=False)
    for name in ("timm", "timm.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install torchvision timm"):
        importlib.import_module("smlp.timm_models")
