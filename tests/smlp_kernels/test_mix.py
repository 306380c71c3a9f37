"""The forward operator against the formula in float64."""

from collections.abc import Iterator

import pytest
import torch

from smlp.block import smlp
from smlp.testing import EPS, TF32_EPS, assert_close, formula, to_float64
from smlp_kernels import fused_smlp, launch, ops
from smlp_kernels.kernels import mix, rows
from tests.smlp_kernels.oracle import DEVICE, Case, in_layout

# Odd, prime and ragged sizes, several images a tile, and the real stages scaled down. The grid is
# small because the interpreter runs it.
CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 5, 7),
    Case(5, 7, 7, 20),
    Case(3, 14, 14, 33),
    Case(1, 13, 11, 17, bias=False),
    Case(2, 8, 32, 12),
    Case(1, 28, 20, 24),
    Case(2, 70, 9, 18),  # axes longer than any tile of some types: products of PyTorch
    Case(1, 5, 70, 3, bias=False),
    Case(1, 66, 130, 2),
    Case(1, 56, 56, 5),
    Case(9, 4, 2, 70),
]
INTERPRETED_DTYPES = [torch.float64, torch.float32, torch.float16]
GPU_DTYPES = [pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES + GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = formula(*to_float64(arguments))
    actual = fused_smlp(*arguments)
    assert actual.dtype == dtype
    assert_close(actual, exact, smlp(*arguments), eps=EPS[dtype])


@pytest.mark.parametrize(
    ("layout", "copies"), [("channels_last", 0), ("bordered", 1), ("contiguous", 2)]
)
def test_chunks_of_a_batch(layout: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images at a time, and one at the end."""
    case = Case(5, 6, 7, 9)
    arguments = case.arguments(torch.float64, layout)
    columns = 32 + copies * case.channels  # 3 * 9 + 1, up to eights; then those of x and y
    image = case.height * case.width * columns * 8
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2 * image)
    monkeypatch.setattr(mix, "mix_plan", mix.mix_plan.__wrapped__)
    launched = []
    original = launch.Call.launch

    def record(call: launch.Call) -> None:
        launched.append(call.plan.kernel.__name__)
        original(call)

    monkeypatch.setattr(launch.Call, "launch", record)
    actual = fused_smlp(*arguments)
    assert launched.count("axes_kernel") == 3
    assert launched.count("copy_images_kernel") == 3 * copies
    assert_close(actual, formula(*to_float64(arguments)), None, eps=EPS[torch.float64])


@pytest.mark.parametrize("layout", ["contiguous", "bordered", "strided", "transposed"])
@pytest.mark.parametrize("case", [Case(2, 3, 5, 7), Case(1, 14, 12, 20), Case(3, 1, 9, 2)], ids=str)
def test_layouts(case: Case, layout: str) -> None:
    arguments = case.arguments(torch.float64, layout)
    exact = formula(*to_float64(arguments))
    assert_close(fused_smlp(*arguments), exact, None, eps=EPS[torch.float64])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_output_keeps_the_memory_format(layout: str) -> None:
    arguments = Case(2, 6, 5, 4).arguments(torch.float32, layout)
    assert fused_smlp(*arguments).stride() == arguments[0].stride()


def test_expanded_input() -> None:
    arguments = Case(3, 5, 4, 6).arguments(torch.float64)
    arguments[0] = arguments[0][:1, :, :, :1].expand(3, 6, 5, 4)
    exact = formula(*to_float64(arguments))
    assert_close(fused_smlp(*arguments), exact, None, eps=EPS[torch.float64])


def test_strided_weights() -> None:
    arguments = Case(2, 6, 5, 4).arguments(torch.float64)
    arguments[1] = arguments[1].t()
    arguments[3] = torch.stack([arguments[3]] * 2, dim=-1)[..., 0]
    arguments[5] = arguments[5].contiguous(memory_format=torch.channels_last)
    arguments[2] = arguments[2][:1].expand(6)
    arguments[4] = torch.stack([arguments[4]] * 2, dim=-1)[:, 0]
    arguments[6] = arguments[6][:1].expand(4)
    exact = formula(*to_float64(arguments))
    assert_close(fused_smlp(*arguments), exact, None, eps=EPS[torch.float64])


def test_strides_of_a_single_position_mean_nothing() -> None:
    """A kernel compiled for them would be refused: they take more than 31 bits."""
    arguments = Case(2, 1, 5, 7).arguments(torch.float64)
    exact = formula(*to_float64(arguments))
    arguments[1] = arguments[1].as_strided((1, 1), (2**33, 2**33))
    assert_close(fused_smlp(*arguments), exact, None, eps=EPS[torch.float64])


def test_empty_batch() -> None:
    arguments = Case(0, 5, 4, 3).arguments(torch.float32)
    assert fused_smlp(*arguments).shape == (0, 3, 5, 4)


def test_inputs_are_not_written() -> None:
    arguments = Case(2, 5, 4, 3).arguments(torch.float32)
    before = [(a._version, a.clone()) for a in arguments]
    fused_smlp(*arguments)
    for argument, (version, values) in zip(arguments, before, strict=True):
        assert argument._version == version
        torch.testing.assert_close(argument, values, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(
    "case", [Case(6, 7, 7, 20), Case(3, 14, 9, 18), Case(4, 4, 3, 2), Case(2, 3, 66, 3)], ids=str
)
def test_bad_values_stay_where_the_formula_has_them(
    case: Case, bad: float, dtype: torch.dtype
) -> None:
    arguments = case.arguments(dtype)
    arguments[0][1, 0, -1, -1] = bad
    expected = torch.isfinite(formula(*to_float64(arguments)))
    actual = torch.isfinite(fused_smlp(*arguments))
    assert torch.equal(actual, expected)
    assert not bool(actual[1].all()) and bool(actual[0].all())


@pytest.mark.parametrize("layout", ["contiguous", "bordered", "strided", "transposed"])
def test_copies_of_images(layout: str) -> None:
    """There and back, with what lies between the values untouched."""
    values = torch.randn(3, 5, 14, 9, dtype=torch.float64, device=DEVICE)
    source = in_layout(values, layout)
    target = torch.empty_like(values, memory_format=torch.channels_last)
    back = in_layout(torch.zeros_like(values), layout)
    for one, other in ((source, target), (target, back)):
        rows.copy_images(one, other, launch.Call.launch)
    assert torch.equal(target, values) and torch.equal(back, values)
    assert bool(torch.isnan(back._base).any() if layout in ("bordered", "strided") else True)


def test_copies_have_64_bit_offsets_where_an_image_is_far_spread() -> None:
    def is_wide(x: torch.Tensor) -> bool:
        plan = rows.copy_images_plan(x.shape, x.stride(), x.contiguous().stride())
        return plan.constants["INDEX_64"]

    # 2^33 elements in all, but no image reaches beyond 2^31
    assert not is_wide(torch.empty(64, 2048, 256, 256, device="meta"))
    # one image of a view whose rows lie far apart
    assert is_wide(torch.empty(1, 1, 2**16, 2**16, device="meta")[:, :, :: 2**10, :: 2**10])


def test_64_bit_offsets_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(3, 14, 9, 18).arguments(torch.float32, "bordered")
    expected = fused_smlp(*arguments)
    monkeypatch.setattr(rows, "INT32_MAX", 0)
    monkeypatch.setattr(rows, "copy_images_plan", rows.copy_images_plan.__wrapped__)
    assert torch.equal(fused_smlp(*arguments), expected)


@pytest.fixture
def matmul_setting() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


SETTINGS = {
    "default": (lambda: None, "ieee"),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "allow_tf32": (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
    "fp32_precision": (
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "tf32",
    ),
}


@pytest.mark.usefixtures("matmul_setting")
@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_follows_the_float32_matmul_setting(setting: str) -> None:
    change, expected = SETTINGS[setting]
    change()
    assert launch.input_precision(torch.float32) == expected
    assert launch.input_precision(torch.float16) == "ieee"
    assert launch.input_precision(torch.float64) == "ieee"


# Relative errors of the formula in TF32, by hardware that rounds operands or that truncates them.
LEAST_OF_TF32, MOST_OF_TF32 = 16 * EPS[torch.float32], 3 * TF32_EPS


@pytest.mark.parametrize("half", [0x1000, 0], ids=["rounding", "truncating"])
def test_bounds_of_tf32_are_those_of_any_hardware(half: int) -> None:
    def tf32(operand: torch.Tensor) -> torch.Tensor:
        bits = operand.float().contiguous().view(torch.int32) + half & ~0x1FFF
        return bits.view(torch.float32).double()

    exact = to_float64(Case(1, 28, 28, 192).arguments(torch.float32))
    x, proj_h, bias_h, proj_w, bias_w, fuse, bias = exact
    x_h = torch.einsum("hk,bckw->bchw", tf32(proj_h), tf32(x)) + bias_h[:, None]
    x_w = torch.einsum("wk,bchk->bchw", tf32(proj_w), tf32(x)) + bias_w
    branches = tf32(torch.cat([x_h, x_w, x], 1))
    y = torch.einsum("oc,bchw->bohw", tf32(fuse).flatten(1), branches) + bias[:, None, None]
    expected = formula(*exact)
    assert LEAST_OF_TF32 < (y - expected).norm() / expected.norm() < MOST_OF_TF32 / 1.5


@pytest.mark.gpu
@pytest.mark.usefixtures("matmul_setting")
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_values(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    arguments = Case(4, 28, 28, 192).arguments(torch.float32)
    exact = formula(*to_float64(arguments))
    error = (fused_smlp(*arguments).double() - exact).norm() / exact.norm()
    if allowed:
        assert LEAST_OF_TF32 < error < MOST_OF_TF32
    else:
        assert error < 16 * EPS[torch.float32]


@pytest.mark.gpu
def test_other_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = [a.to("cuda:1") for a in Case(2, 7, 7, 16).arguments(torch.float32)]
    exact = formula(*to_float64(arguments))
    assert_close(fused_smlp(*arguments), exact, smlp(*arguments), eps=EPS[torch.float32])


def test_launch_is_refused_where_there_is_no_way_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"x: expected a CUDA tensor, got one on cpu"):
        ops.mix(*(a.cpu() for a in Case(1, 2, 2, 2).arguments(torch.float32)))


def test_layout_helper_keeps_values() -> None:
    x = torch.arange(24.0, device=DEVICE).reshape(1, 2, 3, 4)
    for layout in ("channels_last", "contiguous", "bordered", "strided", "transposed"):
        assert torch.equal(in_layout(x, layout), x)
