"""Folded networks compute what they did before, and nothing is folded that must not be."""

import copy

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPBlock, SMLPNet, SparseMLP
from smlp.folding import FoldedDepthwise
from smlp.sparse_mlp import PreNormResidual
from smlp_kernels import FusedSMLPBlock, fuse_model, launch, unfuse_model
from smlp_kernels.folding import FoldedSMLPBlock
from smlp_kernels.kernels.axis import axes_kernel
from tests.smlp_kernels.oracle import DEVICE


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms as after training, far from doing nothing; in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(random(module.running_mean) - 0.5)
            module.running_var.copy_(random(module.running_var) + 0.5)
            if module.affine:
                module.weight.data.copy_(random(module.weight) + 0.5)
                module.bias.data.copy_(random(module.bias) - 0.5)
    return model.eval()


def sparse_mlp() -> nn.Module:
    torch.manual_seed(0)
    model = SparseMLP(
        image_size=(16, 24), patch_size=2, in_channels=1, num_classes=3, d_model=6, depth=[1, 2]
    )
    return with_statistics(model.double().to(DEVICE))


def smlpnet() -> nn.Module:
    torch.manual_seed(0)
    model = SMLPNet(
        image_size=(16, 32), patch_size=2, in_channels=1, num_classes=3, d_model=4, depth=(1, 1)
    )
    return with_statistics(model.double().to(DEVICE))


IMAGES = {"SparseMLP": (sparse_mlp, (2, 1, 16, 24)), "SMLPNet": (smlpnet, (2, 1, 16, 32))}


@pytest.mark.parametrize("fused_before", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_same_function(name: str, fused_before: bool) -> None:
    build, shape = IMAGES[name]
    model = build()
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    expected = model(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    blocks = sum(isinstance(module, SMLPBlock) for module in model.modules())
    if fused_before:
        assert fuse_model(model) == blocks
        blocks = blocks if name == "SparseMLP" else 0  # an SMLPNet's are behind GELU, swapped once
    assert fuse_model(model, fold=True) == blocks
    y = model(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-11)


def test_what_is_left_of_the_norms() -> None:
    """Every BatchNorm before a linear step is gone; LayerNorms, and norms before GELU, stay."""
    model = sparse_mlp()
    fuse_model(model, fold=True)
    kinds = [type(module) for module in model.modules()]
    assert nn.BatchNorm2d not in kinds and SMLPBlock not in kinds and FusedSMLPBlock not in kinds
    assert kinds.count(FoldedSMLPBlock) == kinds.count(FoldedDepthwise) == 3
    net = smlpnet()
    before = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    fuse_model(net, fold=True)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == before - 2


def pre_norm_block(bias: bool = True, **norm: bool) -> nn.Sequential:
    torch.manual_seed(1)
    block = SMLPBlock(5, 7, 6, fuse_bias=bias)
    step = PreNormResidual(6, nn.Sequential(block), norm=lambda c: nn.BatchNorm2d(c, **norm))
    return with_statistics(nn.Sequential(step).double().to(DEVICE))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_one_launch_for_norm_block_and_residual(
    bias: bool, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pre_norm_block(bias, affine=affine)
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
    fuse_model(model, fold=True)
    launched = []
    original = launch.Call.launch

    def record(call: launch.Call) -> None:
        launched.append(call.plan.kernel)
        original(call)

    monkeypatch.setattr(launch.Call, "launch", record)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    assert launched == [axes_kernel]


def test_half_is_as_exact_as_unfolded() -> None:
    exact_model = pre_norm_block()
    x = torch.randn(8, 6, 5, 7, dtype=torch.float64, device=DEVICE).half()
    plain = copy.deepcopy(exact_model).half()
    folded = copy.deepcopy(plain)
    fuse_model(folded, fold=True)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        error = (folded(x).double() - exact).square().mean().sqrt()
        peer = (plain(x).double() - exact).square().mean().sqrt()
    assert folded(x).dtype == torch.float16
    assert error < 1.25 * peer + 2.0**-11 * exact.square().mean().sqrt()


def test_nothing_is_left_to_train_and_the_state_moves() -> None:
    model = pre_norm_block()
    fuse_model(model, fold=True)
    assert not list(model.parameters())
    assert model.float()[0].bias.dtype == torch.float32
    other = pre_norm_block()
    fuse_model(other, fold=True)
    other[0].weight_fuse.zero_()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 6, 5, 7, device=DEVICE)
    assert torch.equal(other.float()(x), model(x))


@pytest.mark.parametrize("name", IMAGES)
def test_training_mode_is_refused_and_nothing_changed(name: str) -> None:
    model = IMAGES[name][0]().train()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"expected something that folds .* is in training mode"):
        fuse_model(model, fold=True)
    assert [type(module) for module in model.modules()] == kinds


def test_where_nothing_folds_the_reason_is_named() -> None:
    model = pre_norm_block()
    model[0].norm = nn.BatchNorm2d(6, track_running_stats=False).double().eval()
    with pytest.raises(ValueError, match=r"with 0, as norm keeps no running statistics$"):
        fuse_model(model, fold=True)
    with pytest.raises(ValueError, match=r"got Sequential with no part of a known kind$"):
        fuse_model(nn.Sequential(SMLPBlock(5, 7, 6)).eval(), fold=True)
    with pytest.raises(ValueError, match="the model, as it is no part of another module"):
        fuse_model(pre_norm_block()[0], fold=True)


def test_a_block_without_projection_biases_folds() -> None:
    model = pre_norm_block()
    model[0].fn[0].proj_h.bias = None
    model[0].fn[0].proj_w = nn.Linear(7, 7, bias=False).to(model[0].norm.weight).eval()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, device=DEVICE)
    expected = model(x)
    assert fuse_model(model, fold=True) == 1 and type(model[0]) is FoldedSMLPBlock
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)


def test_a_folded_convolution_is_rounded_once() -> None:
    net = smlpnet().half()
    layer = net.stages[0][1]
    weight, norm = layer.local.conv.weight.double(), layer.mix.norm
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    fuse_model(net, fold=True)
    assert torch.equal(layer.local.conv.weight, (weight * scale.view(-1, 1, 1, 1)).half())
    shift = norm.bias.double() - norm.running_mean.double() * scale
    assert torch.equal(layer.local.conv.bias, shift.half())


def test_other_steps_are_left_alone() -> None:
    """LayerNorm depends on the input; a dilated convolution is another function."""
    conv = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6)
    model = nn.Sequential(
        PreNormResidual(6, nn.Sequential(conv), norm=nn.BatchNorm2d),
        PreNormResidual(6, nn.Sequential(SMLPBlock(5, 7, 6)), norm=nn.BatchNorm2d),
        PreNormResidual(7, nn.Identity()),
    )
    model = with_statistics(model.double().to(DEVICE))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, device=DEVICE)
    expected = model(x)
    assert fuse_model(model, fold=True) == 1
    assert [type(step) for step in model] == [PreNormResidual, FoldedSMLPBlock, PreNormResidual]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)


def test_folding_cannot_be_undone() -> None:
    model = pre_norm_block()
    fuse_model(model, fold=True)
    with pytest.raises(ValueError, match="found none"):
        unfuse_model(model)
