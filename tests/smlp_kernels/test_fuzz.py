"""Random blocks: size, type, layout, layout of the gradient, what wants one, biases or none.

Derandomised, so that CI runs the same cases every time. For a long run with new cases::

    SMLP_FUZZ_CASES=10000 pytest tests/smlp_kernels/test_fuzz.py
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlp.block import smlp
from smlp.testing import EPS, NAMES, compare_block
from smlp_kernels import fused_smlp
from tests.smlp_kernels.chips import narrow_kernel_here
from tests.smlp_kernels.oracle import Case, in_layout

CASES = int(os.environ.get("SMLP_FUZZ_CASES", "0"))
LAYOUTS = st.sampled_from(["channels_last", "contiguous", "bordered", "strided", "transposed"])
SIZES = st.integers(1, 17)  # the interpreter is slow; longer axes have tests of their own
DTYPES = [torch.float64, torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter has none


def fuzzing(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        derandomize=not CASES,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # ours only fills memory
    )


@fuzzing(CASES or 25)
@given(
    case=st.builds(Case, st.integers(1, 3), SIZES, SIZES, st.integers(1, 34)),
    dtype=st.sampled_from(DTYPES),
    layout=LAYOUTS,
    gradient_layout=LAYOUTS,
    wanted=st.sets(st.sampled_from(NAMES), min_size=1),
    absent=st.sets(st.sampled_from(["bias_h", "bias_w", "bias_fuse"])),
    seed=st.integers(0, 2**31),
)
def test_block(
    case: Case,
    dtype: torch.dtype,
    layout: str,
    gradient_layout: str,
    wanted: set[str],
    absent: set[str],
    seed: int,
) -> None:
    arguments = case.arguments(dtype, layout, seed)
    for index, name in enumerate(NAMES):
        if name in absent:
            arguments[index] = None
        elif name in wanted:
            arguments[index].requires_grad_()
    dy = in_layout(case.arguments(dtype, "contiguous", seed + 1)[0], gradient_layout)
    results = compare_block(fused_smlp, arguments, dy, eps=EPS[dtype], peer=smlp)
    assert len(results) == 1 + sum(a is not None and a.requires_grad for a in arguments)
    for result in results:
        assert result.problem is None, f"{result.name}: {result.problem}"
    if len(results) == 1:
        assert not fused_smlp(*arguments).requires_grad


@fuzzing(CASES // 10 or 5)
@given(
    case=st.builds(Case, st.integers(1, 4), SIZES, SIZES, st.sampled_from([40, 48, 64, 88])),
    wanted=st.sampled_from([NAMES, ("x",)]),
    absent=st.sets(st.sampled_from(["bias_h", "bias_w", "bias_fuse"])),
    programs=st.sampled_from([4, 8, 396]),
    seed=st.integers(0, 2**31),
)
def test_narrow_block(
    case: Case, wanted: tuple[str, ...], absent: set[str], programs: int, seed: int
) -> None:
    """What goes to ``narrow_kernel``, on a chip that has it."""
    with narrow_kernel_here(programs):
        as_any = test_block.hypothesis.inner_test
        as_any(case, torch.float16, "channels_last", "channels_last", set(wanted), absent, seed)
