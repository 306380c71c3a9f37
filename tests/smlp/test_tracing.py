"""torch.fx, which torchvision's create_feature_extractor uses, and TorchScript."""

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from smlp import FeaturePyramid, SMLPBlock, SMLPNet, SparseMLP
from smlp.ablations import ABLATIONS, ablate
from smlp.timm_network import TimmSMLPNet

SMALL = dict(image_size=(8, 16), patch_size=2, num_classes=5, d_model=4, depth=(1, 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused() -> nn.Module:
    model = SMLPNet(**SMALL).to(DEVICE)
    pytest.importorskip("smlp_kernels").fuse_model(model)
    return model


def folded() -> nn.Module:
    model = SparseMLP(**SMALL).to(DEVICE).eval()
    pytest.importorskip("smlp_kernels").fuse_model(model, fold=True)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "smlpnet": lambda: SMLPNet(drop_path_rate=0.5, **SMALL),
    "sparse_mlp": lambda: SparseMLP(dropout=0.5, patcher_norm=True, **SMALL),
    "backbone": lambda: FeaturePyramid(SMLPNet(**SMALL)),
    "timm": lambda: TimmSMLPNet(drop_rate=0.5, **SMALL),
    "fused": fused,
    "folded": folded,
    **{name: lambda name=name: ablate(name, SMLPNet, **SMALL) for name in ABLATIONS},
}


def images(model: nn.Module, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    return torch.randn(batch, 3, 8, 16, generator=generator).to(device)


def leaves(output: Tensor | list[Tensor]) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_fx_records_the_same_function(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.train(training and name != "folded")
    before = copy.deepcopy(model.state_dict())
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    results = []
    for module in (model, graph):
        module.load_state_dict(before)
        torch.manual_seed(1)
        outputs = leaves(module(images(model)))
        sum(y.square().sum() for y in outputs).backward()
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append({**gradients, **dict(enumerate(outputs))})
    assert results[0].keys() == results[1].keys() and len(results[0]) > len(outputs)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_the_graph_keeps_the_checks() -> None:
    graph = torch.fx.symbolic_trace(SMLPNet(**SMALL))
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 3, 8, 16\], got \[1, 3, 16, 8\]"):
        graph(torch.zeros(1, 3, 16, 8))
    half = graph.half().eval()
    assert half(torch.zeros(1, 3, 8, 16).half()).dtype == torch.float16  # of its weights then


def test_an_extractor_cut_out_of_the_graph() -> None:
    """What create_feature_extractor does: trace, end at a node, drop what is not needed."""
    torch.manual_seed(0)
    model = SMLPNet(**SMALL).eval()
    expected = model.forward_features(images(model))[0]

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, SMLPBlock) or super().is_leaf_module(module, name)

    graph = Tracer().trace(model)
    assert any(node.op == "call_module" and node.target.endswith("block") for node in graph.nodes)
    (downsample,) = [node for node in graph.nodes if node.target == "stages.1.0"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    output.args = (downsample.args[0],)
    extractor = torch.fx.GraphModule(model, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    assert not [node for node in extractor.graph.nodes if str(node.target).startswith("mlp_head")]
    assert torch.equal(extractor(images(model)), expected)


def test_torchvisions_extractor() -> None:
    try:
        from torchvision.models.feature_extraction import create_feature_extractor
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    for build in (SMLPNet, SparseMLP):
        model = build(**SMALL).eval()
        nodes = {"stages.0": "fine"} if build is SMLPNet else {"layers.0.model": "fine"}
        extractor = create_feature_extractor(model, nodes)
        expected = model.forward_features(images(model))[0]
        assert torch.equal(extractor(images(model))["fine"], expected)


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["smlpnet", "sparse_mlp", "timm", "fused", "folded"])
def test_torchscript_records_a_trace(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(model, 2))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for batch in (1, 3):
            expected = model(images(model, batch))
            torch.testing.assert_close(loaded(images(model, batch)), expected)


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch")
@pytest.mark.parametrize(
    "build",
    [*list(MODELS.values())[:6], lambda: SMLPBlock(2, 3, 4), lambda: nn.Sequential(fused())],
)
def test_torchscript_by_script_is_refused(build: Callable[[], nn.Module]) -> None:
    model = build()
    message = r"expected a module that torch\.jit\.script compiles, got \w+, .*torch\.jit\.trace\("
    with pytest.raises(TypeError, match=message):
        torch.jit.script(model)


def test_the_sentence_is_one() -> None:
    with pytest.raises(TypeError) as error:
        torch.jit.script(SMLPBlock(2, 3, 4))
    assert not re.search(r"\n|\. ", str(error.value))
