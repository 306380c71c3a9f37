"""What only a GPU shows: real sizes, streams, graphs, compiled code, repeats, offsets past 2^31.

All other tests of this folder run on the GPU too where there is one.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPBlock, SparseMLP
from smlp.block import smlp
from smlp.testing import EPS, NAMES, assert_close, compare_block, formula, to_float64, training_step
from smlp_kernels import FusedSMLPBlock, fuse_model, fused_smlp, ops
from tests.smlp_kernels.oracle import Case
from tools.aot_report import STAGES

pytestmark = pytest.mark.gpu
GIB = 2**30


WAIT_SECONDS = 60.0


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """What torch's allocator keeps is missing to other processes that run tests."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def need_memory(gib: float) -> None:
    """Skip on a GPU that has less free memory than this, and does not get it from other tests."""
    patience = time.monotonic() + WAIT_SECONDS * ("PYTEST_XDIST_WORKER" in os.environ)
    while (free := torch.cuda.mem_get_info()[0]) < gib * GIB and time.monotonic() < patience:
        time.sleep(0.5)
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, this one has {free / GIB:.1f}")


def random_arguments(shape: tuple[int, int, int], dtype: torch.dtype, batch: int) -> list[Tensor]:
    """Like Case.arguments, made on the GPU: the large ones take long on a CPU."""
    height, width, channels = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*sizes, generator=generator, device="cuda") + 0.25
        return (values * scale).to(dtype)

    x = random(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    return [
        x,
        random(height, height, scale=height**-0.5),
        random(height),
        random(width, width, scale=width**-0.5),
        random(width),
        random(channels, 3 * channels, 1, 1, scale=(3 * channels) ** -0.5),
        random(channels),
    ]


def assert_equal_to_rounding(arguments: list[Tensor], dtype: torch.dtype) -> None:
    """Output and all gradients of the fused block, for a random gradient of the output."""
    for argument in arguments:
        argument.requires_grad_()
    dy = torch.randn_like(arguments[0])
    results = compare_block(fused_smlp, arguments, dy, eps=EPS[dtype], peer=smlp)
    assert len(results) == 1 + len(NAMES)
    for result in results:
        assert result.problem is None, f"{result.name}: {result.problem}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_stages_at_batch_128(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On compute capability 9.0 with the Hopper kernel, then without."""
    need_memory(12)
    arguments = random_arguments(shape, dtype, 128)
    for run_hopper in (ops.run_hopper, None):
        monkeypatch.setattr(ops, "run_hopper", run_hopper)
        assert_equal_to_rounding(arguments, dtype)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(64, 64, 96), (112, 112, 96), (224, 224, 3), (256, 256, 130), (200, 2, 33), (8, 256, 64),
     (32, 128, 48), (16, 64, 96), (7, 7, 2048), (9, 9, 1000), (1, 1, 1)],
    ids=str,
)  # fmt: skip
def test_sizes_beyond_the_stages(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    """Long axes, thin images, many channels, channels that no vector load divides."""
    need_memory(4)
    arguments = random_arguments(shape, dtype, 3)
    if layout == "contiguous":
        arguments[0] = arguments[0].contiguous()
    assert_equal_to_rounding(arguments, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_gradcheck(layout: str) -> None:
    arguments = [a.requires_grad_() for a in Case(2, 7, 5, 6).arguments(torch.float64, layout)]
    assert torch.autograd.gradcheck(fused_smlp, arguments)
    assert torch.autograd.gradgradcheck(fused_smlp, arguments, fast_mode=True)


@pytest.mark.parametrize("shape", [(14, 14, 384), (56, 56, 80), (7, 7, 640)], ids=str)
def test_a_hundred_repeats_are_bitwise_equal(shape: tuple[int, int, int]) -> None:
    arguments = [a.requires_grad_() for a in random_arguments(shape, torch.bfloat16, 32)]
    dy = torch.randn_like(arguments[0])
    first = training_step(fused_smlp, arguments, dy)
    for _ in range(99):
        for name, value in training_step(fused_smlp, arguments, dy).items():
            assert torch.equal(value, first[name]), name


def test_images_do_not_depend_on_their_place_in_the_batch() -> None:
    arguments = random_arguments((14, 14, 96), torch.bfloat16, 37)
    order = torch.randperm(37, device="cuda")
    shuffled = fused_smlp(arguments[0][order], *arguments[1:])
    assert torch.equal(shuffled, fused_smlp(*arguments)[order])


def test_cuda_graph_of_a_training_step() -> None:
    block = FusedSMLPBlock(14, 14, 96, device="cuda")
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    reference = SMLPBlock(14, 14, 96, device="cuda")
    reference.load_state_dict(block.state_dict())
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    x = torch.randn(8, 96, 14, 14, device="cuda")

    def step(module: nn.Module, sgd: torch.optim.Optimizer) -> Tensor:
        sgd.zero_grad(set_to_none=False)
        loss = module(x).square().mean()
        loss.backward()
        sgd.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(block, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(block, optimizer)
    for _ in range(4):
        x.normal_()  # the graph reads what is in x when it is replayed
        graph.replay()
    block_after = {k: v.clone() for k, v in block.state_dict().items()}
    final_loss = loss.clone()

    # the reference does the last step alone, from the state before it: undo it first
    graph.replay()
    reference.load_state_dict(block_after)
    expected = step(reference, reference_optimizer)
    assert torch.isfinite(final_loss)
    # Either side may multiply in IEEE or in TF32, by hardware that rounds or that truncates: of
    # these the last is 0.003 off at most here. A replay that reads old images is 0.09 off at least.
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for name, value in block.state_dict().items():
        update = value - block_after[name]
        expected_update = reference.state_dict()[name] - block_after[name]
        assert (update - expected_update).norm() < 1e-2 * expected_update.norm(), name


def test_second_stream() -> None:
    arguments = [a.requires_grad_() for a in random_arguments((28, 28, 160), torch.float16, 32)]
    dy = torch.randn_like(arguments[0])
    expected = training_step(fused_smlp, arguments, dy)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # a launch on the default stream would overtake this
        late = [a.clone() for a in arguments]
        actual = training_step(fused_smlp, late, dy.clone())
    side.synchronize()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_compiled_with_one_graph() -> None:
    model = SparseMLP(
        image_size=56, patch_size=4, in_channels=3, num_classes=10, d_model=32, depth=[2, 2]
    ).to("cuda")
    x = torch.randn(2, 3, 56, 56, device="cuda", requires_grad=True)

    def output_and_gradient(module: Callable[[Tensor], Tensor], image: Tensor) -> list[Tensor]:
        y = module(image)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), image)]

    model.eval()
    exact = output_and_gradient(model.double(), x.detach().double().requires_grad_())
    peer = output_and_gradient(model.float(), x)
    fuse_model(model)
    actual = output_and_gradient(torch.compile(model, fullgraph=True), x)
    for name, a, e, p in zip(("output", "x"), actual, exact, peer, strict=True):
        assert_close(a, e, p, eps=EPS[torch.float32], name=name)


@pytest.mark.large
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    need_memory(30)
    batch, channels, size = 683, 1024, 56  # 2.19e9 elements
    memory_format = getattr(torch, layout if layout == "channels_last" else "contiguous_format")
    x = torch.empty(
        batch, channels, size, size, dtype=torch.float16, device="cuda",
        memory_format=memory_format,
    )  # fmt: skip
    assert x.numel() > 2**31
    x.normal_()
    weights = random_arguments((size, size, channels), torch.float16, 1)[1:]
    y = fused_smlp(x, *weights)
    for image in (0, batch // 2, batch - 1):  # images are independent of each other
        part = [x[image : image + 1], *weights]
        assert_close(
            y[image : image + 1],
            formula(*to_float64(part)),
            smlp(*part),
            eps=EPS[torch.float16],
            name=f"image {image}",
        )


@pytest.mark.large
def test_more_than_two_to_the_31_elements_backward() -> None:
    need_memory(40)
    batch, channels, size = 683, 1024, 56
    x = torch.zeros(
        batch, channels, size, size, dtype=torch.float16, device="cuda",
        memory_format=torch.channels_last,
    )  # fmt: skip
    dy = torch.zeros_like(x)
    weights = [w.requires_grad_() for w in random_arguments((size, size, channels), x.dtype, 1)[1:]]
    for image in (0, batch - 1):  # all gradients come from the two ends
        x[image].normal_()
        dy[image].normal_()
    grads = torch.autograd.grad(fused_smlp(x, *weights), weights, dy)
    ends = torch.tensor([0, batch - 1], device="cuda")
    few = [x[ends], *(w.detach().requires_grad_() for w in weights)]
    exact_weights = to_float64(few)[1:]
    exact = torch.autograd.grad(
        formula(few[0].double(), *exact_weights), exact_weights, dy[ends].double()
    )
    peer = torch.autograd.grad(smlp(*few), few[1:], dy[ends])
    case = Case(2, size, size, channels)
    for name, a, e, p in zip(NAMES[1:], grads, exact, peer, strict=True):
        assert_close(a, e, p, eps=EPS[x.dtype], name=name, reduction=case.reduction(name))


def test_out_of_memory_leaves_the_next_call_healthy() -> None:
    arguments = random_arguments((14, 14, 96), torch.float32, 4)
    before = fused_smlp(*arguments)
    total = torch.cuda.get_device_properties(0).total_memory
    batch = int(1.5 * total) // (96 * 14 * 14 * 4)
    huge = arguments[0][:1].expand(batch, -1, -1, -1)  # takes no memory itself; its output would
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fused_smlp(huge, *arguments[1:])
    assert torch.equal(fused_smlp(*arguments), before)
