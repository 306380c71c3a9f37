"""The network with timm's methods, held against the plain one; timm itself is not needed."""

import copy
import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPNet, SparseMLP, load_checkpoint, resize
from smlp.network import PyramidNetwork
from smlp.timm_network import TimmSMLPNet
from tests.smlp.paper import paper_network, paper_state

SMALL = dict(image_size=(16, 32), patch_size=2, in_channels=2, d_model=4, depth=(1, 2, 1))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, 16, 32, generator=torch.Generator().manual_seed(0))


def pair(**options: object) -> tuple[TimmSMLPNet, SMLPNet]:
    """The network and the plain one with the same weights and statistics, in eval mode."""
    torch.manual_seed(0)
    model = TimmSMLPNet(num_classes=5, **options, **SMALL)
    for _ in range(3):
        model(images(8))
    plain = SMLPNet(num_classes=5, **SMALL)
    plain.load_state_dict(model.state_dict())
    return model.eval(), plain.eval()


def test_same_function_and_state() -> None:
    model, plain = pair(drop_rate=0.3)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(images()), plain(images()))
    assert torch.equal(model.forward_features(images()), plain.forward_features(images())[-1])
    assert isinstance(model.forward_features(images()), Tensor)


def test_dropout_comes_before_the_classifier() -> None:
    model, _ = pair(drop_rate=0.5)
    features = model.forward_features(images(64))
    expected = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.get_classifier()(expected), model.forward_head(features))
    model.head_drop.train()
    dropped = model.forward_head(features, pre_logits=True)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * expected[kept])
    with pytest.raises(ValueError, match=r"drop_rate: expected a number in \[0, 1\), got 1.0"):
        TimmSMLPNet(drop_rate=1.0, **SMALL)


def test_without_and_with_another_classifier() -> None:
    model, _ = pair()
    features = model.forward_features(images())
    pooled = model.forward_head(features, pre_logits=True)
    norm = model.mlp_head[0]
    torch.testing.assert_close(pooled, norm(features).mean((2, 3)))
    model.reset_classifier(0)
    assert model.num_classes == 0 and type(model.get_classifier()) is nn.Identity
    assert torch.equal(model(images()), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), norm(features))
    model.double().reset_classifier(7, "avg")
    assert model.num_classes == 7 and not model.get_classifier().training
    assert model(images().double()).shape == (2, 7)
    built = TimmSMLPNet(num_classes=0, **SMALL)
    assert built.num_classes == 0 and built(images()).shape == (2, model.head_hidden_size)
    assert TimmSMLPNet(num_classes=0, global_pool="", **SMALL)(images()).shape == (2, 16, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_classes: expected at least 0, got -1"),
        ((3, "max"), "global_pool: expected 'avg', or '' with num_classes=0, got 'max' with"),
        (
            (3, ""),
            "global_pool: expected 'avg', or '' with num_classes=0, got '' with num_classes=3",
        ),
    ],
)
def test_classifiers_that_there_are_not(arguments: tuple[object, ...], message: str) -> None:
    model, plain = pair()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.reset_classifier(*arguments)
    assert torch.equal(model(images()), plain(images()))


@pytest.mark.parametrize("indices", [None, 1, 2, (0,), (-1,), (-2, 0), (2, 1)])
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates(indices: int | tuple[int, ...] | None, stop_early: bool) -> None:
    model, plain = pair()
    maps = plain.forward_features(images())
    last = {None: 3, 1: 1, 2: 2}.get(indices, indices)
    wanted = maps[-last:] if isinstance(last, int) else [maps[i] for i in last]
    final, taken = model.forward_intermediates(images(), indices, stop_early=stop_early)
    assert len(taken) == len(wanted) and all(map(torch.equal, taken, wanted))
    stopped = stop_early and indices in ((0,), (-2, 0))
    assert torch.equal(final, maps[{(0,): 0, (-2, 0): 1}[indices] if stopped else 2])
    alone = model.forward_intermediates(images(), indices, norm=True, intermediates_only=True)
    for one, plain_map in zip(alone, wanted, strict=True):
        is_last = plain_map.shape == maps[-1].shape
        assert torch.equal(one, model.mlp_head[0](plain_map) if is_last else plain_map)


def test_stages_and_formats_that_there_are_not() -> None:
    model, _ = pair()
    for indices in ((3,), (-4,), 0, 4, ()):
        with pytest.raises(ValueError, match="indices: expected some of the 3 stages"):
            model.forward_intermediates(images(), indices)
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_pruning() -> None:
    model, plain = pair()
    assert model.prune_intermediate_layers((0, -2)) == [0, 1]
    assert model.depth == (1, 2) and model.num_features == 8 and model.num_classes == 0
    expected = plain.forward_features(images())[:2]
    taken = model.forward_intermediates(images(), (0, 1), intermediates_only=True)
    assert all(map(torch.equal, taken, expected))
    torch.testing.assert_close(model(images()), expected[1].mean((2, 3)))
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
    other, _ = pair()
    other.prune_intermediate_layers((0, 1), prune_head=False)  # it was for 16 channels, not for 8
    assert torch.equal(other(images()), expected[1].mean((2, 3)))


def test_its_description_follows_its_size() -> None:
    model, _ = pair()
    assert model.default_cfg["input_size"] == model.pretrained_cfg["input_size"] == (2, 16, 32)
    assert model.default_cfg["pool_size"] == (2, 4) and len(model.default_cfg["mean"]) == 2
    larger = resize(model, (32, 32))
    assert larger.default_cfg["input_size"] == (2, 32, 32)
    assert larger.default_cfg["pool_size"] == (4, 4)
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert type(model.get_submodule(model.default_cfg["first_conv"])) is nn.Conv2d
    assert [info["num_chs"] for info in model.feature_info] == [4, 8, 16]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]
    assert (model.num_features, model.head_hidden_size, model.in_chans) == (16, 16, 2)


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_follow_the_depth(coarse: bool) -> None:
    model, _ = pair()
    matcher = model.group_matcher(coarse=coarse)
    assert re.match(matcher["stem"], "stages.0.0.weight")
    groups: list[tuple[str, ...]] = []
    for name, _ in model.named_parameters():
        match = re.match(matcher["blocks"], name)
        assert bool(match) == name.startswith("stages.")
        if match and match.groups() not in groups:
            groups.append(match.groups())
    assert groups == sorted(groups) and len(groups) == (3 if coarse else 3 + sum(model.depth))
    assert model.no_weight_decay() == set()


def test_the_papers_layout_loads_as_a_state_dict() -> None:
    state = paper_state(16, 16, 2, 2, 5, 4, (1, 2, 1), 3)
    model = TimmSMLPNet(num_classes=5, **{**SMALL, "image_size": 16}).double().eval()
    model.load_state_dict(state)
    x = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    expected = paper_network(x, state, (1, 2, 1))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    nn.Sequential(model).load_state_dict({f"0.{name}": value for name, value in state.items()})
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    headless = TimmSMLPNet(num_classes=0, **{**SMALL, "image_size": 16}).double().eval()
    report = load_checkpoint(headless, state)
    assert report.left_out == ("mlp_head.0.weight", "mlp_head.0.bias")
    report = load_checkpoint(headless, model.state_dict())
    assert report.left_out == ("mlp_head.2.weight", "mlp_head.2.bias")
    head = nn.Linear(16, 5).double()
    head.load_state_dict(model.get_classifier().state_dict())
    torch.testing.assert_close(head(headless(x)), expected, rtol=1e-10, atol=1e-10)


# --- activation checkpointing, of both networks ------------------------------------------------


def saved_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for a step."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


NETWORKS: list[Callable[[], PyramidNetwork]] = [
    lambda: TimmSMLPNet(num_classes=5, drop_path_rate=0.5, drop_rate=0.2, **SMALL),
    lambda: SparseMLP(num_classes=5, dropout=0.2, **SMALL),
]


@pytest.mark.parametrize("build", NETWORKS)
def test_checkpointing_changes_memory_alone(build: Callable[[], PyramidNetwork]) -> None:
    torch.manual_seed(0)
    plain = build()
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    results = []
    for network in (plain, model):
        torch.manual_seed(1)
        network(images()).square().sum().backward()
        results.append([p.grad for p in network.parameters()] + list(network.buffers()))
    assert all(map(torch.equal, *results))  # the statistics among them count every batch once
    parameters = sum(p.nbytes for p in model.parameters())
    kept = [saved_for_backward(network, images(16)) - parameters for network in (plain, model)]
    assert kept[1] < kept[0] / 2
    model.set_grad_checkpointing(False)
    assert saved_for_backward(model, images(16)) - parameters == kept[0]


# --- signatures --------------------------------------------------------------------------------

# As timm's MlpMixer has them (test_timm_models.py compares with the installed one).
SIGNATURES = {
    "forward_head": ["x", "pre_logits"],
    "forward_features": ["x"],
    "reset_classifier": ["num_classes", "global_pool"],
    "get_classifier": [],
    "group_matcher": ["coarse"],
    "set_grad_checkpointing": ["enable"],
    "forward_intermediates": [
        *("x", "indices", "norm", "stop_early", "output_fmt", "intermediates_only")
    ],
    "prune_intermediate_layers": ["indices", "prune_norm", "prune_head"],
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_signatures(method: str) -> None:
    parameters = inspect.signature(getattr(TimmSMLPNet, method)).parameters
    assert list(parameters)[1:] == SIGNATURES[method]
