"""Exported networks: torch.export keeps the fused operator, ONNX Runtime agrees to rounding."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from smlp import FeaturePyramid, SMLPBlock, SMLPNet, SparseMLP
from smlp.cli import main
from smlp.export import example, export_onnx, largest_difference, without_fused_blocks
from smlp.network import PyramidNetwork

ROUNDING = 2e-6  # float32, through a few layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["smlpnet", "sparse_mlp"])
def network(request: pytest.FixtureRequest) -> PyramidNetwork:
    torch.manual_seed(0)
    if request.param == "smlpnet":
        model: PyramidNetwork = SMLPNet(16, 2, 3, 5, d_model=16, depth=(2, 1), drop_path_rate=0.1)
    else:
        model = SparseMLP((8, 16), 2, 1, 5, d_model=16, depth=(1, 1))
    with torch.no_grad():  # statistics other than 0 and 1
        for _ in range(3):
            model(example(model, 8))
    return model


def fused(network: nn.Module) -> nn.Module:
    """The network on its kernels: on a GPU, or in Triton's interpreter."""
    kernels = pytest.importorskip("smlp_kernels")
    model = copy.deepcopy(network).to(DEVICE)
    kernels.fuse_model(model)
    return model


def test_torch_export_keeps_the_fused_operator(network: PyramidNetwork) -> None:
    model, images = fused(network).eval(), example(network).to(DEVICE)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes]
    operators = torch.ops.smlp_kernels.mix.default, torch.ops.aten.cat.default
    assert [targets.count(operator) for operator in operators] == [sum(network.depth), 0]
    more = example(network, batch=3).to(DEVICE)
    with torch.no_grad():
        exported, expected = program.module()(more).cpu(), network.eval()(more.cpu())
    torch.testing.assert_close(exported, expected, atol=ROUNDING, rtol=1e-5)


def folded(network: nn.Module) -> nn.Module:
    model = copy.deepcopy(network).to(DEVICE).eval()
    pytest.importorskip("smlp_kernels").fuse_model(model, fold=True)
    return model


@pytest.mark.parametrize("blocks", ["plain", "fused", "folded", "wrapped"])
def test_onnx_runtime_agrees_for_any_batch(
    network: PyramidNetwork, blocks: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="needs the export extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    change = {"fused": fused, "folded": folded, "wrapped": nn.DataParallel}
    model = change.get(blocks, lambda model: model)(network)
    kinds = [type(module) for module in model.modules()]
    images = example(network).to(next(model.parameters()).device)
    export_onnx(model, images, tmp_path / "m.onnx")
    assert model.training == (blocks != "folded")  # it was left as it was
    assert [type(module) for module in model.modules()] == kinds
    assert largest_difference(tmp_path / "m.onnx", model, images) < ROUNDING
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(network).double().eval()
    for batch in (1, 3):
        images = example(network, batch)
        (logits,) = session.run(["output"], {"images": images.numpy()})
        with torch.no_grad():
            expected = exact(images.double())
        torch.testing.assert_close(
            torch.from_numpy(logits).double(), expected, atol=ROUNDING, rtol=1e-5
        )


def test_a_changed_model_is_seen_to_differ(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    network = SMLPNet(8, 2, 1, 5, d_model=8, depth=(1,)).eval()
    images = example(network)
    export_onnx(network, images, tmp_path / "m.onnx")
    assert largest_difference(tmp_path / "m.onnx", network, images) < ROUNDING
    with torch.no_grad():
        network.mlp_head.get_submodule("2").bias[0] += 0.25
        expected = 0.25 / network(images).abs().max().item()
    assert largest_difference(tmp_path / "m.onnx", network, images) == pytest.approx(expected, 1e-4)


def test_blocks_are_unfused_in_a_copy() -> None:
    model = fused(nn.Sequential(SMLPBlock(4, 6, 8)))
    plain = without_fused_blocks(model)
    assert type(plain[0]) is SMLPBlock
    assert type(model[0]) is not SMLPBlock
    assert torch.equal(plain[0].fuse.weight, model[0].fuse.weight)


def test_folded_blocks_run_on_pytorch_in_a_copy(network: PyramidNetwork) -> None:
    images = example(network)
    model = folded(network)
    plain = without_fused_blocks(model)
    kinds = {type(m).__module__ for m in plain.modules() if hasattr(type(m), "plain_class")}
    assert not kinds
    expected = copy.deepcopy(network).double().eval()(images.double())
    got = plain.double().cpu()(images.double())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # folded in float32
    state = zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(one.cpu(), other.cpu().to(one.dtype)) for one, other in state)


def test_subclasses_keep_their_own_forward() -> None:
    kernels = pytest.importorskip("smlp_kernels")

    class Negated(kernels.FusedSMLPBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    assert type(without_fused_blocks(Negated(2, 3, 4))) is Negated


def test_backbones_have_several_outputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the export extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    torch.manual_seed(0)
    network = SMLPNet(8, 2, 1, 5, d_model=8, depth=(1, 1))
    images = example(network)
    backbone = FeaturePyramid(network)
    export_onnx(backbone, images, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["output_0", "output_1"]
    assert largest_difference(tmp_path / "m.onnx", backbone, images) < ROUNDING


def test_what_cannot_be_exported_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = SMLPBlock(4, 6, 8)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        export_onnx(example, torch.zeros(2, 8, 4, 6), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images: expected a tensor, got list"):
        export_onnx(block, [], tmp_path / "m.onnx")  # type: ignore[arg-type]
    for shape in ((8, 4, 6), (1, 8, 4, 6)):
        with pytest.raises(ValueError, match=r"images: expected shape \[B, C, H, W\] with B of at"):
            export_onnx(block, torch.zeros(shape), tmp_path / "m.onnx")
    for package in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install.* {package}$"):
            if package == "onnxscript":
                export_onnx(block, torch.zeros(2, 8, 4, 6), tmp_path / "m.onnx")
            else:
                largest_difference(tmp_path / "m.onnx", block, torch.zeros(2, 8, 4, 6))
    assert not (tmp_path / "m.onnx").exists()


def test_plain_networks_need_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from smlp.export import *; import smlp;"
    code += (
        "without_fused_blocks(smlp.SMLPBlock(2, 2, 2)); assert 'smlp_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_the_command_says_how_far_the_file_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    out = tmp_path / "new" / "m.onnx"
    sizes = "--model sparse_mlp --image-size 8 --patch-size 2 --d-model 8 --depth 1"
    assert main(["export", *sizes.split(), "--out", str(out)]) == 0
    assert f"wrote {out}: ONNX Runtime differs by at most" in capsys.readouterr().out
    assert out.exists()
