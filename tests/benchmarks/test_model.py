"""Times from counted work: the largest term, launches added up, measured rates in their place."""

import sys

import pytest
import torch

from benchmarks import model
from benchmarks.model import (
    H200,
    Chip,
    forward_configs,
    main_bound,
    predict,
    predict_pass,
    predicted_us,
    table,
    time_of,
    weight_config,
)
from benchmarks.roofline import Ceilings, floor_us
from benchmarks.shapes import BY_NAME, STAGES
from benchmarks.traffic import Work

CHIP = Chip(
    sms=4,
    dram=1e12,
    l2=2e12,
    shared=4e12,
    matrix={"bf16": 8e12, "fp32": 1e12},
    mma=0.5,
    instructions=1e12,
)
WORK = Work(dram=1e6, l2=8e6, shared=4e6, wgmma=8e6, mma=8e6, instructions=2e6)


def test_terms_by_hand_and_the_largest_is_the_time() -> None:
    prediction = time_of("launch", WORK, 8, "bf16", CHIP)
    assert prediction.terms == pytest.approx(
        {"DRAM": 1.0, "L2": 4.0, "shared memory": 1.0, "tensor cores": 3.0, "issue slots": 2.0}
    )
    assert (prediction.us, prediction.bound) == (pytest.approx(4.0), "L2")


def test_a_wave_that_is_not_full_takes_as_long() -> None:
    whole, part = (time_of("launch", WORK, programs, "bf16", CHIP).terms for programs in (8, 5))
    for term in ("L2", "shared memory", "tensor cores", "issue slots"):
        assert part[term] == pytest.approx(whole[term] * 8 / 5)
    assert part["DRAM"] == whole["DRAM"]


def test_float32_has_one_rate() -> None:
    assert time_of("launch", WORK, 8, "fp32", CHIP).terms["tensor cores"] == pytest.approx(16.0)
    with pytest.raises(ValueError, match="dtype: expected one of bf16, fp32, got 'fp8'"):
        time_of("launch", WORK, 8, "fp8", CHIP)


def test_measured_ceilings_replace_the_datasheets() -> None:
    measured = CHIP.with_ceilings(Ceilings(5e11, {"bf16": 4e12}, "slow"))
    terms = time_of("launch", WORK, 8, "bf16", measured).terms
    assert terms["DRAM"] == pytest.approx(2.0) and terms["tensor cores"] == pytest.approx(6.0)
    assert measured.matrix["fp32"] == 1e12 and measured.l2 == CHIP.l2


def test_passes_are_made_of_launches() -> None:
    shape = BY_NAME["tiny-14"]
    by_pass = {p: predict_pass(shape, p, "bf16") for p in ("inference", "fwd", "bwd", "fwd+bwd")}
    assert [len(launches) for launches in by_pass.values()] == [1, 1, 4, 5]
    assert predicted_us(by_pass["fwd+bwd"]) == pytest.approx(
        predicted_us(by_pass["fwd"]) + predicted_us(by_pass["bwd"])
    )
    (tile,), weights = forward_configs(shape, "bf16"), weight_config(shape, "bf16")
    assert by_pass["inference"] == predict(shape, "bf16", tile)
    assert by_pass["bwd"] == [*predict(shape, "bf16", tile), *predict(shape, "bf16", weights)]
    longest = max(by_pass["bwd"], key=lambda launch: launch.us)
    assert main_bound(by_pass["bwd"]) == longest.bound
    with pytest.raises(ValueError, match="pass_: expected one of inference"):
        predict_pass(shape, "sideways", "bf16")


@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
@pytest.mark.parametrize("pass_", ["inference", "fwd+bwd"])
def test_no_prediction_beats_the_floor(pass_: str, dtype: str) -> None:
    ceilings = Ceilings(H200.dram, H200.matrix, "datasheet")
    for shape in STAGES:
        floor = floor_us(shape, pass_, dtype, ceilings)
        assert predicted_us(predict_pass(shape, pass_, dtype)) >= floor


def test_table_says_that_it_predicts() -> None:
    lines = table([BY_NAME["base-7"]], "bwd", "bf16", "channels_last")
    assert lines[0].startswith("PREDICTIONS of a model, not measurements: bwd, bf16")
    assert [line.split()[1] for line in lines[2:6]] == ["mix", "projection", "fuse", "sums"]
    total = predicted_us(predict_pass(BY_NAME["base-7"], "bwd", "bf16"))
    assert f"{total:.1f} us" in lines[-2] and "bound by" in lines[-2]
    assert "geometric mean" in lines[-1] and "worst" in lines[-1]


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["model", "--shapes", "tiny-7,cifar", "--pass", "bwd"])
    with pytest.raises(SystemExit, match="shapes: expected names among"):
        model.main()
    monkeypatch.setattr(sys, "argv", ["model", "--shapes", "tiny-7,base-7", "--dtype", "fp16"])
    model.main()
    printed = capsys.readouterr().out
    assert "inference, fp16, channels_last" in printed and "base-7" in printed


def test_a_long_axis_is_a_launch_of_its_own() -> None:
    shape = BY_NAME["channel-32x128"]
    by_pass = {p: predict_pass(shape, p, "bf16") for p in ("inference", "bwd")}
    assert [launch.name for launch in by_pass["inference"]] == ["projection along H", "mix"]
    assert [len(launches) for launches in by_pass.values()] == [2, 5]
    # x and x_h once through memory, then both again with y
    project, mix = (launch.terms["DRAM"] for launch in by_pass["inference"])
    assert mix / project == pytest.approx(1.5, rel=0.01)


def test_types_and_layouts_ask_for_their_own_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    for name in ("mix_config", "project_config", "weight_grad_config"):
        monkeypatch.setattr(model, name, lambda *what, name=name: asked.append((name, *what)))
    for name, dtype, layout in (
        ("square-64", "tf32", "channels_last"),
        ("growth-224", "fp32", "nchw"),
    ):
        forward_configs(BY_NAME[name], dtype, 80, layout)
        weight_config(BY_NAME[name], dtype, 80, layout)
    assert asked == [
        ("mix_config", 64, 64, 96, torch.float32, 80, "tf32", True),
        ("weight_grad_config", 96, torch.float32, 80, "tf32", True),
        ("project_config", 224, 224, 96, torch.float32, 80, "ieee", False),
        ("mix_config", 224, 224, 96, torch.float32, 80, "ieee", False),
        ("weight_grad_config", 96, torch.float32, 80, "ieee", False),
    ]
