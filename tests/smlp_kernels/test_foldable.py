"""A part that is more than its weights say is not folded, runs as before, and is named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from smlp import SMLPBlock
from smlp.folding import foldable
from smlp.smlpnet import SMLPNetLayer
from smlp.sparse_mlp import PreNormResidual
from smlp_kernels import FusedSMLPBlock, fuse_model
from tests.smlp_kernels.test_folding import IMAGES, smlpnet, sparse_mlp

# The first layer of the second stage, whose parts these are, by name.
CONV, BLOCK, LAYER = "layers.1.model.0.0", "layers.1.model.0.1", "stages.1.1"
SPARSE_PARTS = ["", ".norm", ".fn", ".fn.0"]
SPARSE = [CONV + part for part in SPARSE_PARTS] + [BLOCK + part for part in SPARSE_PARTS]
SPARSE += [f"{BLOCK}.fn.0.{part}" for part in ("proj_h", "proj_w", "fuse")]
PAPER = [f"{LAYER}.{part}" for part in ("local", "local.conv", "mix", "mix.norm")]
WITH_WEIGHTS = [n for n in SPARSE + PAPER if n.endswith((".0", "proj_h", "fuse", "conv", "norm"))]
WITH_WEIGHTS = [n for n in WITH_WEIGHTS if n not in (CONV, f"{BLOCK}.fn.0")]


@pytest.fixture(autouse=True)
def on_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What folds does not depend on what runs it, and the interpreter takes its time."""
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")


def owner(name: str) -> str:
    """The part that the module is in."""
    return next(part for part in (CONV, BLOCK, LAYER) if name.startswith(part))


def run_and_compare(name: str, change: Callable[[nn.Module], object]) -> str:
    """Change a module, fold, compare with the changed network; returns why it was left."""
    kind = "SMLPNet" if name.startswith("stages") else "SparseMLP"
    build, shape = IMAGES[kind]
    model = build()
    x = torch.randn(shape, dtype=torch.float64)
    x = x.to(next(model.parameters()))
    all_parts = set(foldable(model).parts)
    change(model.get_submodule(name))
    model.eval()
    expected = model(x)
    found = foldable(model)
    part = owner(name)
    # a convolution without the block's step after it folds no more, and is not held up by its own
    gone = {CONV, BLOCK} if part == BLOCK else {part}
    if part == LAYER:
        gone = {f"{LAYER}.local.conv", f"{LAYER}.mix.norm"}
    assert set(found.parts) == all_parts - gone
    assert list(found.left) == [part]
    fuse_model(model, fold=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)
    return found.left[part]


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda m: m.register_forward_hook(lambda module, inputs, output: 0 * output),
    "forward_kwargs": lambda m: m.register_forward_hook(
        lambda module, inputs, options, output: 0 * output, with_kwargs=True
    ),
    "pre": lambda m: m.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "full_backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "full_backward_pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", SPARSE + PAPER)
def test_hooks_on_any_module_of_a_part(name: str) -> None:
    assert run_and_compare(name, HOOKS["forward"]).endswith("has hooks")


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", [f"{BLOCK}.fn.0", f"{LAYER}.mix"])
def test_hooks_of_every_kind(name: str, hook: str) -> None:
    assert run_and_compare(name, HOOKS[hook]).endswith("has hooks")


def patch_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: original(x) * 2


@pytest.mark.parametrize("name", [*SPARSE, *PAPER, LAYER])
def test_patched_forward(name: str) -> None:
    assert run_and_compare(name, patch_forward).endswith("has a forward that is not its class's")


def subclass(module: nn.Module) -> None:
    kind = type(module)

    class Doubled(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    module.__class__ = Doubled


@pytest.mark.parametrize("name", [*SPARSE, *PAPER, LAYER])
def test_subclasses(name: str) -> None:
    assert run_and_compare(name, subclass).endswith("is a Doubled")


@pytest.mark.parametrize("name", [CONV, BLOCK])
def test_a_further_module_in_the_function(name: str) -> None:
    reason = run_and_compare(f"{name}.fn", lambda fn: fn.append(nn.GELU()))
    assert reason == "fn holds 0, 1, not 0"
    reason = run_and_compare(f"{name}.fn", lambda fn: fn.insert(0, nn.GELU()))
    assert reason == "fn holds 0, 1, not 0"
    assert run_and_compare(name, lambda m: m.add_module("more", nn.GELU())).startswith("it holds")


@pytest.mark.parametrize("name", ["local", "mix"])
def test_a_further_module_in_a_layer_of_the_paper(name: str) -> None:
    change = lambda part: part.add_module("more", nn.GELU())  # noqa: E731
    assert run_and_compare(f"{LAYER}.{name}", change).startswith(f"{name} holds norm, activation,")


CHANGED_WEIGHTS: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "parametrized": parametrizations.orthogonal,
    "weight_norm": lambda m: nn.utils.weight_norm(m, "weight"),
    "buffer": lambda m: m.register_buffer("scale", torch.ones(1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        for name in WITH_WEIGHTS
        for change in CHANGED_WEIGHTS
        if change in ("pruned", "buffer") or not name.endswith("norm")  # whose weight has one axis
    ],
)
def test_changed_weights(name: str, change: str) -> None:
    assert run_and_compare(name, CHANGED_WEIGHTS[change])


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: setattr(conv, "padding_mode", "circular"),
        lambda conv: setattr(conv, "_conv_forward", lambda x, w, b: conv.bias.view(-1, 1, 1) * x),
    ],
)
def test_other_convolutions(change: Callable[[nn.Module], object]) -> None:
    assert run_and_compare(f"{CONV}.fn.0", change).startswith("fn.0")


def test_statistics() -> None:
    def forget(norm: nn.Module) -> None:
        norm.running_mean = norm.running_var = None

    for name in (f"{CONV}.norm", f"{BLOCK}.norm", f"{LAYER}.mix.norm"):
        assert run_and_compare(name, forget).endswith("norm keeps no running statistics")


def test_what_is_shared_by_two_layers_is_replaced_in_both_or_neither() -> None:
    """One norm after two convolutions, of which one has a hook: it cannot become an identity."""
    model = smlpnet()
    first: SMLPNetLayer = model.stages[1][1]
    second = SMLPNetLayer(4, 8, 8, 3, 0.0).to(next(model.parameters())).eval()
    second.mix = first.mix
    second.local.conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    model.stages[1].append(second)
    x = torch.randn(2, 1, 16, 32).to(next(model.parameters()))
    expected = model(x)
    found = foldable(model)
    assert found.left[LAYER] == "mix is used in several places"
    fuse_model(model, fold=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)


def test_a_sequence_that_runs_otherwise_keeps_its_convolution() -> None:
    """What its convolution is given has the size of the block only in a plain sequence."""

    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            fine = self[0](nn.functional.interpolate(x, scale_factor=2.0))
            return self[1](nn.functional.avg_pool2d(fine, 2))

    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(
        Pooled(
            PreNormResidual(4, nn.Sequential(conv), norm=nn.BatchNorm2d),
            PreNormResidual(4, nn.Sequential(SMLPBlock(6, 5, 4)), norm=nn.BatchNorm2d),
        )
    ).eval()
    x = torch.randn(2, 4, 6, 5)
    expected = model(x)
    assert fuse_model(model, fold=True) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_is_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_mlp()
    model.get_submodule(f"{BLOCK}.fn").append(nn.GELU())
    assert fuse_model(model, fold=True) == 3  # two folded, one swapped
    assert type(model.get_submodule(f"{BLOCK}.fn.0")) is FusedSMLPBlock
    (record,) = [r for r in caplog.records if r.name.startswith("smlp_kernels")]
    expected = f"parts left as they were, not folded: {BLOCK}, as fn holds 0, 1, not 0"
    assert (record.levelname, record.getMessage()) == ("WARNING", expected)


def test_state_dict_hooks_and_hooks_around_a_part_do_not_matter() -> None:
    model, net = sparse_mlp(), smlpnet()
    parts = [set(foldable(m).parts) for m in (model, net)]
    for module in model.modules():
        module._register_state_dict_hook(lambda *_: None)
        module.register_load_state_dict_pre_hook(lambda *_: None)
    for module in (model, model.layers[1], model.layers[1].model[0], net.get_submodule(LAYER)):
        module.register_forward_hook(lambda *_: None)
    assert [set(foldable(m).parts) for m in (model, net)] == parts
