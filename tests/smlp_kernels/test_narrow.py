"""Blocks of few channels, whose kernel takes the products over channels, too."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from smlp.testing import EPS, NAMES, compare_block, formula, to_float64
from smlp_kernels import env_report, fused_smlp, launch
from smlp_kernels.kernels.narrow import is_narrow
from tests.smlp_kernels.chips import narrow_kernel_here
from tests.smlp_kernels.oracle import DEVICE, Case

DTYPE = torch.float16  # the interpreter has no bfloat16
CASES = [
    Case(1, 56, 56, 40),
    Case(2, 7, 5, 40),  # four lines to a tile, of both images
    Case(3, 20, 9, 72),  # two lines to a tile along H, four along W
    Case(1, 64, 33, 128),  # as large as they come; two slices and more
    Case(2, 1, 17, 96, bias=False),
]
TWO_LAUNCHES = ["narrow_kernel along H", "narrow_kernel along W"]


@pytest.fixture(autouse=True)
def on_this_chip() -> Iterator[None]:
    with narrow_kernel_here(programs=12):  # so few that each has several tiles
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all kernels that a test launches."""
    names: list[str] = []
    original = launch.Call.launch

    def record(call: launch.Call) -> None:
        along_h = call.plan.constants.get("ALONG_H")
        axis = {True: " along H", False: " along W", None: ""}[along_h]
        names.append(call.plan.kernel.__name__ + axis)
        original(call)

    monkeypatch.setattr(launch.Call, "launch", record)
    return names


def wanting(arguments: list[Tensor | None], names: tuple[str, ...] = NAMES) -> list[Tensor | None]:
    for name, argument in zip(NAMES, arguments, strict=True):
        if argument is not None:
            argument.requires_grad_(name in names)
    return arguments


def check(arguments: list[Tensor | None], dy: Tensor) -> None:
    results = compare_block(fused_smlp, arguments, dy, eps=EPS[arguments[0].dtype])
    assert [result for result in results if result.problem] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, launched: list[str]) -> None:
    arguments = wanting(case.arguments(DTYPE))
    check(arguments, case.arguments(DTYPE, seed=1)[0])
    assert launched == [*TWO_LAUNCHES, *TWO_LAUNCHES, "weight_sums_kernel"]


@pytest.mark.parametrize("absent", ["bias_h", "bias_w", "bias_fuse"])
def test_without_a_bias(absent: str) -> None:
    case = Case(2, 7, 18, 40)
    arguments = wanting(case.arguments(DTYPE))
    arguments[NAMES.index(absent)] = None
    check(arguments, case.arguments(DTYPE, seed=1)[0])


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_bias_of_every_place(layout: str, launched: list[str]) -> None:
    case = Case(3, 9, 5, 40)
    arguments = case.arguments(DTYPE)
    bias = torch.randn(40, 9, 5, dtype=DTYPE, device=DEVICE)
    arguments[6] = bias if layout == "contiguous" else bias[:, :1].expand(40, 9, 5)
    check(wanting(arguments), case.arguments(DTYPE, seed=1)[0])
    assert launched[:2] == TWO_LAUNCHES


def test_weights_of_other_strides() -> None:
    case = Case(2, 6, 10, 48)
    x, *weights = case.arguments(DTYPE)
    for index in (0, 2, 4):  # the matrices
        matrix = weights[index].flatten(1).t().contiguous().t()
        weights[index] = matrix.view(weights[index].shape)
    check(wanting([x, *weights]), case.arguments(DTYPE, seed=1)[0])


def test_gradient_of_the_input_alone_is_a_forward(launched: list[str]) -> None:
    case = Case(2, 10, 6, 48)
    check(wanting(case.arguments(DTYPE), ("x",)), case.arguments(DTYPE, seed=1)[0])
    assert launched == [*TWO_LAUNCHES, *TWO_LAUNCHES]


def test_some_gradients_take_the_other_kernels(launched: list[str]) -> None:
    case = Case(2, 6, 10, 48)
    check(wanting(case.arguments(DTYPE), NAMES[1:]), case.arguments(DTYPE, seed=1)[0])
    assert launched[:2] == TWO_LAUNCHES and "axes_kernel along W" in launched[2:]


@pytest.mark.parametrize("layout", ["contiguous", "bordered"])
def test_other_layouts_take_the_other_kernels(layout: str, launched: list[str]) -> None:
    case = Case(2, 6, 10, 48)
    check(wanting(case.arguments(DTYPE, layout)), case.arguments(DTYPE, layout, seed=1)[0])
    assert not set(launched) & set(TWO_LAUNCHES)


def test_sums_of_a_fixed_order() -> None:
    case = Case(3, 9, 10, 40)
    arguments = wanting(case.arguments(DTYPE))
    dy = case.arguments(DTYPE, seed=1)[0]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused_smlp(*arguments), arguments, dy)

    for first, again in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_bad_values_stay_where_the_formula_has_them(bad: float) -> None:
    arguments = Case(3, 7, 5, 40).arguments(DTYPE)
    arguments[0][1, 0, -1, -1] = bad
    actual = torch.isfinite(fused_smlp(*arguments))
    assert torch.equal(actual, torch.isfinite(formula(*to_float64(arguments))))
    assert not bool(actual[1].all()) and bool(actual[0].all())


def test_the_report_names_the_kernel() -> None:
    lines = env_report.path_of(torch.empty(1, 40, 7, 5, dtype=DTYPE, device=DEVICE))
    assert "instead of these, if channels_last: narrow_kernel along H and W" in lines
    lines = env_report.path_of(torch.empty(1, 41, 7, 5, dtype=DTYPE, device=DEVICE))
    assert not [line for line in lines if "narrow_kernel" in line]


def test_what_is_narrow() -> None:
    assert is_narrow(torch.Size((128, 96, 56, 56)), DTYPE, 90)
    assert is_narrow(torch.Size((1, 40, 64, 1)), torch.bfloat16, 90)
    for shape in (
        (0, 96, 56, 56),
        (128, 32, 56, 56),
        (128, 136, 56, 56),
        (128, 100, 56, 56),  # rows of no whole 16 bytes
        (128, 96, 65, 56),
        (128, 96, 56, 65),
        (6000, 96, 64, 64),  # offsets of more than 31 bits
    ):
        assert not is_narrow(torch.Size(shape), DTYPE, 90), shape
    assert not is_narrow(torch.Size((128, 96, 56, 56)), DTYPE, 80)
    assert not is_narrow(torch.Size((128, 96, 56, 56)), torch.float32, 90)
