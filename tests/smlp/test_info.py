"""The cost of a network's parts: products by formula, memory against a real step."""

import copy

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPNet, SparseMLP, smlpnet_tiny
from smlp.info import as_table, parts
from smlp.network import PyramidNetwork
from smlp.timm_network import TimmSMLPNet


def test_smlpnet_tiny_costs_what_the_paper_says() -> None:
    with torch.device("meta"):
        rows = parts(smlpnet_tiny())
    inputs, patch = 3, 4
    for row, side, channels, depth in zip(
        rows, (56, 28, 14, 7), (80, 160, 320, 640), (2, 8, 14, 2), strict=False
    ):
        pixels = side * side
        block = pixels * channels * 2 * side + 3 * pixels * channels**2
        layer = block + 9 * pixels * channels + 2 * 3 * pixels * channels**2
        assert row.macs == depth * layer + pixels * patch**2 * inputs * channels
        assert row.output == (channels, side, side)
        inputs, patch = channels, 2
    assert [row.name for row in rows] == [*(f"stages.{i}" for i in range(4)), "mlp_head"]
    assert rows[-1].macs == 640 * 1000
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(4.989, abs=5e-4)
    assert sum(row.parameters for row in rows) == 24_123_584


def test_sparse_mlp_counts_its_merging_in_the_stage_before() -> None:
    rows = parts(SparseMLP((8, 16), 2, 1, 5, d_model=6, depth=(2, 1)), batch_size=3)

    def layer(height: int, width: int, c: int) -> int:
        return height * width * c * (9 + height + width + 3 * c + 2 * 2 * c)

    merging = 2 * 4 * (4 * 6) * (2 * 6)
    expected = [4 * 8 * 4 * 6, 2 * layer(4, 8, 6) + merging, layer(2, 4, 12), 12 * 5]
    assert [row.macs for row in rows] == expected
    assert [row.output for row in rows] == [(6, 4, 8), (12, 2, 4), (12, 2, 4), (5,)]


def test_a_network_of_timms_costs_as_much() -> None:
    sizes = dict(image_size=16, d_model=4, depth=(1, 1), num_classes=7)
    rows, expected = (
        parts(TimmSMLPNet(**sizes), batch_size=2),
        parts(SMLPNet(**sizes), batch_size=2),
    )
    assert rows[: len(expected)] == expected
    assert [row.macs for row in rows[len(expected) :]] == [0]  # of its dropout


NETWORKS = [
    SMLPNet(8, 1, 1, 4, d_model=8, depth=(2, 1), drop_path_rate=0.1),
    SparseMLP((8, 16), 2, 3, 4, d_model=8, depth=(1, 2)),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("network", NETWORKS, ids=["smlpnet", "sparse_mlp"])
def test_memory_is_what_a_real_step_keeps(network: PyramidNetwork, fused: bool) -> None:
    real = copy.deepcopy(network).train()
    if fused:  # on their kernels, in Triton's interpreter where there is no GPU
        kernels = pytest.importorskip("smlp_kernels")
        kernels.fuse_model(real)
        real.to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(real.parameters()).device
    kept = bytes_kept(real, torch.randn(4, real.in_channels, *real.image_size, device=device))
    counted = sum(row.kept_fused if fused else row.kept for row in parts(network, batch_size=4))
    # A device chooses what its normalisations keep besides: means and deviations.
    assert counted == pytest.approx(kept, rel=0.02)


def bytes_kept(network: nn.Module, images: Tensor) -> int:
    """Sizes of the tensors that autograd holds after forward, shared memory once."""
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        network(images)
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in held.items()
        if address not in parameters
    )


def test_memory_grows_with_the_batch_and_shrinks_with_the_type() -> None:
    one, four = (parts(NETWORKS[1], batch_size=size) for size in (1, 4))
    half = parts(NETWORKS[1], batch_size=4, dtype=torch.bfloat16)
    for a, b, c in zip(one, four, half, strict=True):
        assert a.macs == b.macs == c.macs
        assert b.kept == pytest.approx(4 * a.kept, rel=0.05)
        assert c.kept == pytest.approx(b.kept / 2, rel=0.1)


def test_counting_leaves_the_network_alone() -> None:
    network = NETWORKS[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    parts(network)
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        parts(network, batch_size=0)
    with pytest.raises(TypeError, match=r"batch_size: expected an integer, got 2\.5"):
        parts(network, batch_size=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network: expected a SparseMLP or an SMLPNet, got Ident"):
        parts(nn.Identity())  # type: ignore[arg-type]


def test_table_sums_its_columns() -> None:
    rows = parts(NETWORKS[0], batch_size=2)
    lines = as_table(rows, batch_size=2).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1
    assert cells[0][4] == "kept, batch 2 (MiB)"
    assert cells[2][:3] == ["stages.0", "8 x 8 x 8", f"{rows[0].parameters:,}"]
    assert cells[-1][0] == "total"
    assert cells[-1][2] == f"{sum(p.numel() for p in NETWORKS[0].parameters()):,}"
    assert float(cells[-1][4]) == pytest.approx(sum(row.kept for row in rows) / 2**20, abs=0.005)
