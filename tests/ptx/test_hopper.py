"""How ``smlp_kernels.hopper`` is executed: the launches that are made of a call, and which calls.

What is executed are tests of ``test_kernels.py``.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import smlp_kernels.hopper
from smlp.testing import formula, random_arguments, relative_error, to_float64
from smlp_kernels.hopper import launch
from smlp_kernels.hopper import plan as hopper_plan
from smlp_kernels.hopper.plan import call_of
from smlp_kernels.launch import Call
from smlp_kernels.weights import Weights
from tests.ptx import compiled, hopper
from tests.ptx.blocks import PRECISIONS, Block, misplaced_nan
from tests.ptx.chip import Chip
from tools.hopper_ptx import shipped_ptx

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))

SIZE = (2, 7, 14, 72)  # B, H, W, C


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chip]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(smlp_kernels.hopper, "binary_of", lambda name: shipped_ptx(name).encode())
    load = functools.cache(smlp_kernels.hopper.load.__wrapped__)
    monkeypatch.setattr(smlp_kernels.hopper, "load", load)
    chip = Chip(90)
    with chip.active():
        yield chip


@pytest.fixture
def made(chip: Chip) -> tuple[Call, Tensor]:
    """A call, and its exact result."""
    x, weights = random_arguments(*SIZE, torch.bfloat16)
    call = call_of(x.contiguous(memory_format=torch.channels_last), Weights(*weights), 132)
    assert call is not None
    return call, formula(*to_float64([x, *weights]))


def test_what_is_handed_to_the_driver_runs(chip: Chip, made: tuple[Call, Tensor]) -> None:
    call, exact = made
    assert launch(call) is None
    (record,) = chip.records
    assert (record.kernel, record.violations) == (call.plan.kernel, [])
    assert relative_error(call.tensors[1], exact) < 3e-3


def test_other_arguments_give_other_results(chip: Chip, made: tuple[Call, Tensor]) -> None:
    """So that it is the package's arguments that run, and not what a test makes of its tensors."""
    call, exact = made
    x, y, proj_h, bias_h, proj_w, bias_w, *others = call.tensors
    biases_swapped = call._replace(tensors=(x, y, proj_h, bias_w, proj_w, bias_h, *others))
    integers = list(call.plan.integers)
    integers[4:8] = [*integers[6:8], *integers[4:6]]  # strides of H and W
    strides_swapped = call._replace(plan=replace(call.plan, integers=tuple(integers)))
    for other in (biases_swapped, strides_swapped):
        chip.records.clear()
        assert launch(other) is None
        assert any("out of bounds" in text for text in chip.records[0].violations)
        assert not relative_error(call.tensors[1], exact) < 0.1


def test_shared_memory_is_what_the_chip_has(
    chip: Chip, made: tuple[Call, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, _ = made
    monkeypatch.setattr(smlp_kernels.hopper, "BLOCK", (12, 1, 227 * 1024 + 1))
    assert "at most 232448 bytes, got 232449" in str(launch(call))
    monkeypatch.setattr(smlp_kernels.hopper, "BLOCK", (12, 1, 100_000))
    smlp_kernels.hopper.load.cache_clear()
    assert launch(call) is None
    assert any("shared access out of bounds" in text for text in chip.records[-1].violations)


@pytest.mark.parametrize("size", hopper.STAGES)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_group_has_the_plan_of_the_batch(size: tuple[int, ...], transposed: bool) -> None:
    """All but its share of the batch and of the grid."""
    _, channels, side, _ = size
    proj, fuse = (side, 1), (3 * channels, channels, 1)
    strides = (*proj[::-1], *proj[::-1]) if transposed else (*proj, *proj)
    fuse = fuse[::-1] if transposed else fuse

    def plan(batch: int, multiprocessors: int):
        shape = torch.Size((batch, channels, side, side))
        return hopper_plan.make_plan.__wrapped__(
            shape, torch.bfloat16, strides, fuse, multiprocessors
        )

    whole, share = plan(128, 132), plan(size[0], hopper.STAGES[size])
    assert share.kernel == whole.kernel
    assert share.integers[1:] == whole.integers[1:]
    blocks = share.integers[12]  # of a group
    assert share.programs == blocks and whole.programs == -(-128 // size[0]) * blocks


def kernels_of(blocks: list[Block]) -> Iterator[str]:
    """Of both launches."""
    for block in blocks:
        batch, channels, height, width = block.size
        dtype = PRECISIONS[block.precision].dtype
        x, weights = random_arguments(batch, height, width, channels, dtype)
        x, given = x.contiguous(memory_format=torch.channels_last), Weights(*weights)
        for one in (given, given.transposed()):
            call = call_of(x, one, block.multiprocessors)
            assert call is not None, block
            yield call.plan.kernel


def test_every_kernel_is_executed_with_every_change() -> None:
    shipped = {
        f"smlp_{dtype}_{tile}{transposed}"
        for dtype in ("bf16", "fp16")
        for tile in ("200", "248", "256", "strips")
        for transposed in ("", "_t")
    }
    assert set(kernels_of([*hopper.whole_images(), *hopper.strips()])) == shipped
    quick = set(kernels_of(hopper.quick()))
    assert {name.split("_")[2] for name in quick} == {"200", "248", "256", "strips"}


def test_the_cases_are_of_all_kinds() -> None:
    cases = [*hopper.whole_images(), *hopper.strips()]
    assert set(hopper.quick()) <= set(cases)
    assert any(block.size[1] % 32 for block in cases)
    for name in ("nan", "bias_map", "transposed_weights", "early_copies", "absent"):
        both = {max(block.size[2:]) > 16 for block in cases if getattr(block, name)}
        assert both == {False, True}, name
    tasks = hopper.selection()
    assert len(tasks) == 80 and len({task.name for task in tasks}) == 80
    assert {task.name.split(":")[0] for task in tasks if task.name.startswith("seed")} == {
        f"seed {seed}" for seed in (2, 3, 4, 5)
    }
    assert len({task.name for task in hopper.everything()}) == 80 + 8 + 300


def test_nan_where_none_belongs() -> None:
    exact = torch.zeros(2, 3)
    exact[1, 2] = torch.nan
    assert misplaced_nan(exact.float(), exact) is None
    found = exact.clone()
    found[0, 1] = torch.nan
    assert misplaced_nan(found, exact) == "NaN or none in 1 wrong places, first [0, 1]"
    assert misplaced_nan(torch.zeros(2, 3), exact) == "NaN or none in 1 wrong places, first [1, 2]"


def test_another_kernel_in_its_place() -> None:
    case = hopper.block("bf16", 1, 64, 14, 14)
    assert case.not_in_cuda(["smlp_bf16_200", "smlp_bf16_200_t"]) == []
    assert case.not_in_cuda(["smlp_bf16_200", "axes_kernel"]) != []
    assert Block(90, "bf16", (1, 64, 14, 14)).not_in_cuda(["axes_kernel"]) == []
    assert Block(90, "bf16", (1, 64, 14, 14)).not_in_cuda(["smlp_bf16_200"]) != []
