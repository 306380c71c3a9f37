"""Folding by PyTorch alone; what folds, what does not and why is in tests/smlp_kernels."""

import pytest
import torch
from torch import nn

from smlp import SMLPNet, SparseMLP
from smlp.folding import FoldedDepthwise, PlainFoldedSMLPBlock, foldable

SIZES = {"image_size": (16, 24), "patch_size": 2, "in_channels": 1, "num_classes": 3}
BUILD = {
    "SparseMLP": lambda: SparseMLP(**SIZES, d_model=6, depth=[1, 2]),
    "SMLPNet": lambda: SMLPNet(**SIZES, d_model=4, depth=(1, 1)),
}
EXPECTED = {
    "SparseMLP": [FoldedDepthwise, PlainFoldedSMLPBlock] * 3,
    "SMLPNet": [nn.Conv2d, nn.Identity] * 2,
}


@pytest.mark.parametrize("name", BUILD)
def test_folded_parts_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = BUILD[name]().double()
    images = torch.randn(4, 1, 16, 24, dtype=torch.float64)
    for _ in range(3):  # statistics other than those of a new network
        model(images * 2 + 1)
    expected = model.eval()(images)
    found = foldable(model)
    assert not found.left
    kinds = sorted((type(part) for part in found.parts.values()), key=lambda kind: kind.__name__)
    assert kinds == sorted(EXPECTED[name], key=lambda kind: kind.__name__)
    for path, part in found.parts.items():
        model.set_submodule(path, part.eval())
    torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-12)
