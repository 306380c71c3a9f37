"""How ``smlp_kernels.hopper`` is executed: the launches that are made of a call, and which calls.

What is executed are tests of ``test_kernels.py``.
"""

import struct
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from smlp.testing import formula, random_arguments, relative_error, to_float64
from smlp_kernels.hopper import driver as hopper_driver
from smlp_kernels.hopper import plan as hopper_plan
from smlp_kernels.hopper.plan import Call, call_of
from smlp_kernels.weights import Weights
from tests.ptx import hopper, library
from tests.ptx.blocks import PRECISIONS, Block, misplaced_nan
from tests.ptx.chip import Chip
from tests.ptx.cuda import ChipDriver

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

SIZE = (2, 7, 14, 72)  # B, H, W, C


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Chip:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    text = hopper_driver.ptx_of
    monkeypatch.setattr(hopper_driver, "binary_of", lambda kernel: text(kernel).encode())
    return Chip(90)


def made(chip: Chip) -> tuple[Call, Tensor]:
    """A call, and its exact result."""
    x, weights = random_arguments(*SIZE, torch.bfloat16)
    with chip.memory:
        x = x.contiguous(memory_format=torch.channels_last)
        call = call_of(x, Weights(*weights), 132)
    assert call is not None
    return call, formula(*to_float64([x, *weights]))


def test_what_is_handed_to_the_driver_runs(chip: Chip) -> None:
    call, exact = made(chip)
    ChipDriver(chip).launch(call, 0, 0)
    (record,) = chip.records
    assert (record.kernel, record.violations) == (call.plan.kernel, [])
    assert relative_error(call.tensors[1], exact) < 3e-3


def test_other_parameters_give_other_results(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is the package's bytes that run, and not what a test makes of its tensors."""
    call, exact = made(chip)
    right = call.parameters()

    def runs(parameters: bytes) -> tuple[list[str], float]:
        monkeypatch.setattr(Call, "parameters", lambda self: parameters)
        chip.records.clear()
        ChipDriver(chip).launch(call, 0, 0)
        return chip.records[0].violations, relative_error(call.tensors[1], exact)

    biases_swapped = right[:32] + right[40:48] + right[32:40] + right[48:]
    violations, error = runs(biases_swapped)  # of 7 and 14 numbers
    assert any("out of bounds" in text for text in violations) and not error < 0.1
    strides = struct.pack("<2i", *struct.unpack("<2i", right[92:100])[::-1])
    violations, error = runs(right[:92] + strides + right[100:])
    assert any("out of bounds" in text for text in violations) and not error < 0.1
    with pytest.raises(ValueError, match="each tensor once in the struct"):
        runs(bytes(8) + right[8:])


def test_shared_memory_is_what_the_chip_has(chip: Chip) -> None:
    call, _ = made(chip)
    much = call.plan._replace(shared=227 * 1024 + 1)
    with pytest.raises(ValueError, match="at most 232448 bytes, got 232449"):
        ChipDriver(chip).launch(Call(much, call.tensors), 0, 0)
    driver = ChipDriver(chip)
    driver.load(call.plan, 0)
    more = call.plan._replace(shared=call.plan.shared + 1)
    with pytest.raises(ValueError, match=f"{more.shared} bytes .* of {call.plan.shared} allowed"):
        driver.launch(Call(more, call.tensors), 0, 0)
    little = call.plan._replace(shared=100_000)
    ChipDriver(chip).launch(Call(little, call.tensors), 0, 0)
    assert any("shared access out of bounds" in text for text in chip.records[-1].violations)


@pytest.mark.parametrize("size", hopper.STAGES)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_group_has_the_plan_of_the_batch(
    size: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but its share of the batch and of the grid."""
    monkeypatch.setattr(hopper_plan, "CUBLAS_PIXELS", 128 * 49 + 1)
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
    assert (share.kernel, share.shared, share.grid[1]) == (
        whole.kernel,
        whole.shared,
        whole.grid[1],
    )
    assert share.integers[1:] == whole.integers[1:]
    assert share.grid[0] == 1 and whole.grid[0] == -(-128 // size[0])


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
    assert case.not_in_cuda(["smlp_bf16_200", "axis_kernel"]) != []
    assert Block(90, "bf16", (1, 64, 14, 14)).not_in_cuda(["axis_kernel"]) == []
    assert Block(90, "bf16", (1, 64, 14, 14)).not_in_cuda(["smlp_bf16_200"]) != []
