"""What the executed blocks are compared with, and how they are chosen and broken."""

import pytest
import torch

from smlp.testing import NAMES, formula, relative_error, to_float64
from tests.ptx import compiled
from tests.ptx.blocks import Block, placed, tf32_formula
from tests.ptx.cases import ARCHS, groups, random_block
from tests.ptx.chip import Chip, flat
from tests.ptx.kernels import blocks_on, replaced
from tests.ptx.mutants import MUTATIONS, mutants, run_mutation
from tests.smlp_kernels.oracle import Case

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))


def step(function, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [a.detach().requires_grad_() for a in arguments]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) / 3)]


def test_tf32_operands_have_ten_bits() -> None:
    arguments = [a for a in Case(2, 5, 4, 6).arguments(torch.float32) if a is not None]
    exact = step(formula, [a for a in to_float64(arguments) if a is not None])
    cut = [relative_error(a, e) for a, e in zip(step(tf32_formula, arguments), exact, strict=True)]
    ieee = [relative_error(a, e) for a, e in zip(step(formula, arguments), exact, strict=True)]
    assert all(2.0**-13 < error < 2.0**-9 for error in cut[:2])
    assert all(error < 2.0**-9 for error in cut) and all(error < 2.0**-20 for error in ieee)


def test_tf32_is_exact_where_nothing_is_cut_off() -> None:
    """Sums and products of small integers, in every argument's gradient."""
    torch.manual_seed(0)
    shapes = ((2, 4, 3, 5), (3, 3), (3,), (5, 5), (5,), (4, 12), (4,))
    arguments = [torch.randint(-3, 4, shape).float() for shape in shapes]
    for dy in (1.0, 3.0):
        results = []
        for function in (formula, tf32_formula):
            leaves = [a.clone().requires_grad_() for a in arguments]
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, torch.full_like(y, dy))])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_layouts_keep_the_values() -> None:
    x = torch.randn(2, 6, 3, 5)
    for layout in ("shifted", "bordered", "contiguous"):
        assert torch.equal(placed(x, layout), x)
    assert placed(x, "shifted").data_ptr() % 16 == 4
    far = placed(x[:1].bfloat16(), "far")
    assert torch.equal(far, x[:1].bfloat16())
    assert (far.shape[1] - 1) * far.stride(1) > 2**31


def test_random_blocks_are_the_same_for_a_seed_and_differ() -> None:
    blocks = [random_block(seed) for seed in range(200)]
    assert blocks == [random_block(seed) for seed in range(200)]
    assert len(set(blocks)) == 200
    assert {block.arch for block in blocks} == set(ARCHS)
    assert sum(block.size[1] % 8 == 0 for block in blocks) > 80
    assert {name for block in blocks for name in block.wanted} == set(NAMES)


def test_runs_have_names_of_their_own() -> None:
    every = [(t.group, t.name) for tasks in groups(range(1, 50)).values() for t in tasks]
    assert len(set(every)) == len(every) > 600


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutants_change_one_place(mutation: str) -> None:
    text = """
    bar.sync 0;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.wait_group 1;
    wgmma.wait_group.sync.aligned 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    bar.warp.sync -1;
    @%p1 ld.global.b16 { %rs20 }, [ %rd49 + 0 ];
    @!%p1 st.global.b16 [ %rd49 + 0 ], { %rs20 };
    st.shared.v4.b32 [ %r107 + 0 ], { %r108, %r109, %r110, %r111 };
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r9];
    """
    (mutant,) = mutants(text, mutation, 8)
    before, after = text.splitlines(), mutant.splitlines()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    both = list(mutants(text + text, mutation, 8))
    assert len(both) == 2 and both[0] != both[1]


def test_mutants_that_nobody_notices() -> None:
    """Of four barriers the subject needs the last two."""
    text = "".join(f"bar.sync 0; // {i}\n" for i in range(4))

    def subject(change) -> list[str]:
        changed = change("kernel", text)
        return [] if changed.endswith("bar.sync 0; // 2\nbar.sync 0; // 3\n") else ["race"]

    def problems(mutation: str, needed: bool, unnoticed: int | None) -> list[str]:
        return run_mutation(subject, mutation, 100, needed, unnoticed).problems

    assert problems("barrier removed", True, None) == problems("barrier removed", True, 2) == []
    assert problems("barrier removed", True, 1) == ["barrier removed: 2 of 4 mutants were noticed"]
    for unnoticed in (None, 0):
        assert problems("proxy fence removed", False, unnoticed) == []
        assert problems("proxy fence removed", True, unnoticed) != []
    no_subject = run_mutation(
        lambda change: change("kernel", text) and [], "barrier removed", 9, True
    )
    assert no_subject.problems == ["barrier removed: 0 of 4 mutants were noticed"]


def test_arguments_in_tuples_become_parameters() -> None:
    types = ["*fp32", ("i32", ("constexpr", "i64")), "constexpr", "i1"]
    assert list(flat(types, ["x", (3, (1, 4)), 7, True])) == [
        ("*fp32", "x"), ("i32", 3), ("i64", 4), ("i1", True),
    ]  # fmt: skip


def test_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no such_function any"), replaced("such_function", 1):
        pass


def test_the_interpreter_has_no_ptx() -> None:
    from smlp_kernels.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("about Triton's interpreter, which is left alone where there is a GPU")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), blocks_on(Chip(90)):
        pass


def test_names_say_what_differs() -> None:
    assert str(Block(90, "bf16", (2, 3, 4, 5))) == "sm_90 bf16 NHWC 2x3x4x5"
    odd = Block(
        80, "fp16", (2, 3, 4, 5), "strided", "shifted", ("x",), ("bias_h",), True, True, 2, True
    )
    assert str(odd) == (
        "sm_80 fp16 strided 2x3x4x5 dy shifted d x no bias_h bias_map autocast early_copies "
        "second order"
    )
