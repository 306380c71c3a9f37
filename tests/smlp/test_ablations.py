"""Ablations: each block against its formula, what it sees, what it costs, and the comparison."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPNet, smlpnet_tiny
from smlp.ablations import (
    ABLATIONS,
    NoIdentityBlock,
    OneAxisBlock,
    SequentialBlock,
    SumBlock,
    ablate,
)
from smlp.cli import main
from smlp.features import receptive_fields
from smlp.info import parts
from smlp.train import TrainConfig
from smlp.train.ablations import Row, as_table, run_ablations
from smlp.train.models import build_model, load_network

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {"image_size": (12, 8), "patch_size": 2, "in_channels": 1}
SIZES |= {"num_classes": 5, "d_model": 4, "depth": (2, 1)}


def mix(linear: Any, x: Tensor, equation: str) -> Tensor:
    weight, bias = linear.weight, linear.bias
    return torch.einsum(equation, weight, x) + (bias[:, None] if "kw" in equation else bias)


def along_h(block: Any, x: Tensor) -> Tensor:
    return mix(block.proj_h, x, "hk,bckw->bchw")


def along_w(block: Any, x: Tensor) -> Tensor:
    return mix(block.proj_w, x, "wk,bchk->bchw")


def fuse(block: Any, *branches: Tensor) -> Tensor:
    weight = block.fuse.weight[:, :, 0, 0].chunk(len(branches), dim=1)
    products = [torch.einsum("dc,bchw->bdhw", w, x) for w, x in zip(weight, branches, strict=True)]
    return sum(products[1:], products[0])


@pytest.mark.parametrize(
    ("build", "formula"),
    [
        (lambda *s: OneAxisBlock(*s, axis="height"), lambda m, x: fuse(m, along_h(m, x), x)),
        (lambda *s: OneAxisBlock(*s, axis="width"), lambda m, x: fuse(m, along_w(m, x), x)),
        (NoIdentityBlock, lambda m, x: fuse(m, along_h(m, x), along_w(m, x))),
        (SumBlock, lambda m, x: fuse(m, along_h(m, x) + along_w(m, x) + x)),
        (SequentialBlock, lambda m, x: fuse(m, along_w(m, along_h(m, x)), x)),
    ],
    ids=["height", "width", "no_identity", "sum", "sequential"],
)
def test_blocks_compute_their_formula(build: Any, formula: Any) -> None:
    torch.manual_seed(0)
    block = build(5, 7, 3).double()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), formula(block, x), rtol=1e-12, atol=1e-12)


def test_none_is_the_paper_s_network() -> None:
    torch.manual_seed(0)
    same = ablate("none", **SIZES)
    torch.manual_seed(0)
    paper = smlpnet_tiny(**SIZES)
    for (name, mine), (expected, theirs) in zip(
        same.state_dict().items(), paper.state_dict().items(), strict=True
    ):
        assert name == expected
        assert torch.equal(mine, theirs)


def test_costs_are_what_each_change_takes_away() -> None:
    cost = {name: parts(ablate(name, **SIZES)) for name in ABLATIONS}
    full = cost.pop("none")
    # (height, width, channels) of the two layers of the first stage and the one of the second
    layers = [(6, 4, 4), (6, 4, 4), (3, 2, 8)]

    def saved(numbers: Any) -> int:
        return sum(numbers(h, w, c) for h, w, c in layers)

    expected = {
        "no_depthwise": (lambda h, w, c: 2 * c + 9 * c, lambda h, w, c: 9 * h * w * c),
        "height_only": (lambda h, w, c: w * w + w + c * c, lambda h, w, c: h * w * c * (w + c)),
        "width_only": (lambda h, w, c: h * h + h + c * c, lambda h, w, c: h * w * c * (h + c)),
        "no_identity": (lambda h, w, c: c * c, lambda h, w, c: h * w * c * c),
        "sum": (lambda h, w, c: 2 * c * c, lambda h, w, c: 2 * h * w * c * c),
        "sequential": (lambda h, w, c: c * c, lambda h, w, c: h * w * c * c),
    }
    for name, (parameters, macs) in expected.items():
        for attribute, numbers in (("parameters", parameters), ("macs", macs)):
            gone = [sum(getattr(part, attribute) for part in some) for some in (full, cost[name])]
            assert gone[0] - gone[1] == saved(numbers), (name, attribute)


def test_a_single_stage_is_the_deepest() -> None:
    with torch.device("meta"):
        single = ablate("single_stage")
    assert (single.patch_size, single.depth, single.channels) == ((16, 16), (26,), (320,))
    tie = ablate("single_stage", **{**SIZES, "depth": (1, 1)})
    assert (tie.patch_size, tie.depth, tie.channels) == ((4, 4), (2,), (8,))


def test_one_layer_sees_what_its_branches_reach() -> None:
    rows, columns = torch.zeros(2, 12, 8, dtype=torch.bool)
    rows[2 * 2 : 2 * 5] = True  # the pixel (3, 2) of 6 x 4, and its neighbours of the 3x3 filter
    columns[:, 2 * 1 : 2 * 4] = True
    row, column = torch.zeros(2, 12, 8, dtype=torch.bool)
    row[2 * 3 : 2 * 4] = True
    column[:, 2 * 2 : 2 * 3] = True
    expected = {
        "none": rows | columns,
        "no_depthwise": row | column,
        "height_only": columns,
        "width_only": rows,
        "no_identity": rows | columns,
        "sum": rows | columns,
        "sequential": torch.ones(12, 8, dtype=torch.bool),
    }
    for name, reached in expected.items():
        torch.manual_seed(0)
        network = ablate(name, **SIZES)
        field = receptive_fields(network, torch.randn(2, 1, 12, 8), [1])[1]
        assert torch.equal(field > 0, reached), name


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_parameter_learns(name: str) -> None:
    network = ablate(name, **SIZES)
    assert isinstance(network, SMLPNet)
    nn.functional.cross_entropy(network(torch.randn(4, 1, 12, 8)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().any() for p in network.parameters())


def test_unknown_and_impossible_ablations_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ablation: expected one of none, .* got 'no_mlp'"):
        ablate("no_mlp")
    with pytest.raises(ValueError, match=r"ablation: expected one of none, .* got 'no_mlp'"):
        TrainConfig(ablation="no_mlp")
    with pytest.raises(
        ValueError, match=r"ablation: expected an smlpnet .* got 'sum' of sparse_mlp"
    ):
        build_model("sparse_mlp", {"ablation": "sum"})
    with pytest.raises(ValueError, match="axis: expected 'height' or 'width', got 'depth'"):
        OneAxisBlock(4, 4, 2, axis="depth")
    with pytest.raises(ValueError, match="height: expected at least 1, got 0"):
        NoIdentityBlock(0, 4, 2)
    with pytest.raises(TypeError, match=r"channels: expected an integer, got 2\.0"):
        SumBlock(4, 4, 2.0)  # type: ignore[arg-type]


def test_the_comparison_trains_each_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="needs the demo extra")
    options = "--data digits --d-model 4 --depth 1,1 --epochs 1 --warmup-epochs 0 --batch-size 256"
    options += " --no-progress --device cpu --seeds 0,1 --out"
    assert main(["ablations", *options.split(), str(tmp_path)]) == 0
    table = capsys.readouterr().out.strip()
    assert (tmp_path / "ablations.md").read_text().strip() == table
    lines = [line.strip("|").split("|") for line in table.splitlines()[2 : 2 + len(ABLATIONS)]]
    assert [cells[0].strip() for cells in lines] == list(ABLATIONS)
    for name, cells in zip(ABLATIONS, lines, strict=True):
        network = load_network(tmp_path / f"{name}-0" / "model.pt").network
        count = sum(p.numel() for p in network.parameters())
        assert cells[2].strip() == f"{count:,}"
        accuracies = [
            float((tmp_path / f"{name}-{seed}" / "epochs.csv").read_text().split(",")[-4])
            for seed in (0, 1)
        ]
        low, high = (f"{share:.2%}" for share in sorted(accuracies))
        assert cells[4].strip() == f"{sum(accuracies) / 2:.2%} ({low} to {high})"
    assert "seeds 0, 1" in table and "d_model=4" in table

    from smlp.train import loop

    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("a finished run took a step"))
    assert main(["ablations", *options.split(), str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == table


def test_one_seed_has_no_range() -> None:
    line = as_table([Row("sum", 1234, 5_678_900, (0.5,))]).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["1,234", "5.679", "50.00%"]


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        run_ablations(TrainConfig(model="smlpnet_tiny"), [])
    with pytest.raises(
        ValueError, match=r"model: expected one of smlpnet_tiny, .*got 'sparse_mlp'"
    ):
        run_ablations(TrainConfig())
