"""The drop-in module and model surgery."""

import copy
import io
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from smlp import SMLPBlock, SparseMLP
from smlp.testing import EPS, assert_close, formula, to_float64
from smlp_kernels import FusedSMLPBlock, fuse_model, unfuse_model
from tests.smlp_kernels.oracle import DEVICE, Case


def block(case: Case, dtype: torch.dtype = torch.float64, **kwargs: bool) -> FusedSMLPBlock:
    torch.manual_seed(0)
    size = (case.height, case.width, case.channels)
    return FusedSMLPBlock(*size, device=DEVICE, dtype=dtype, **kwargs)


@pytest.mark.parametrize("fuse_bias", [True, False])
def test_forward_and_backward(fuse_bias: bool) -> None:
    case = Case(3, 5, 6, 7)
    module = block(case, fuse_bias=fuse_bias)
    x = case.arguments(torch.float64)[0].requires_grad_()
    exact_arguments = to_float64([x, *module.weights()])
    exact = formula(*exact_arguments)
    actual = module(x)
    assert_close(actual, exact, None, eps=EPS[torch.float64])
    actual.square().sum().backward()
    exact.square().sum().backward()
    for tensor, reference in zip([x, *module.weights()], exact_arguments, strict=True):
        if tensor is not None:
            assert_close(tensor.grad, reference.grad, None, eps=EPS[torch.float64])


def test_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests compare numbers, which the fallback would get right too."""
    from smlp_kernels import launch

    launched = []
    original = launch.Call.launch
    monkeypatch.setattr(
        launch.Call,
        "launch",
        lambda c: launched.append(c.plan.kernel.__name__) or original(c),
    )
    case = Case(2, 5, 6, 7)
    block(case)(case.arguments(torch.float64)[0]).sum().backward()
    # x wants no gradient; that of the output is expanded
    backward = ["copy_images_kernel", "axes_kernel", "axes_kernel", "weight_sums_kernel"]
    assert launched == ["axes_kernel", *backward]


@pytest.mark.parametrize("fused_first", [True, False])
def test_state_dict_is_the_plain_blocks(fused_first: bool) -> None:
    case = Case(2, 5, 6, 7)
    fused, plain = block(case), SMLPBlock(5, 6, 7, device=DEVICE, dtype=torch.float64)
    source, target = (fused, plain) if fused_first else (plain, fused)
    target.load_state_dict(source.state_dict())
    x = case.arguments(torch.float64)[0]
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_close(fused(x), formula(x, *plain.weights()), None, eps=EPS[torch.float64])


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # a file of our own making


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(copied) -> None:
    case = Case(2, 5, 6, 7)
    module = block(case)
    other = copied(module)
    x = case.arguments(torch.float64)[0]
    expected = formula(x, *[w.detach() for w in module.weights()])
    with torch.no_grad():
        module.proj_h.weight.zero_()  # the copy has its own
    assert type(other) is FusedSMLPBlock
    assert_close(other(x), expected, None, eps=EPS[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_to_another_type(dtype: torch.dtype) -> None:
    case = Case(2, 5, 6, 7)
    module = block(case).to(dtype)
    arguments = [case.arguments(dtype)[0], *module.weights()]
    exact = formula(*to_float64(arguments))
    assert_close(module(arguments[0]), exact, formula(*arguments), eps=EPS[dtype])


# The reference's behaviour is the specification: one row per type of input and of autocast.
AUTOCAST_TYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("autocast", AUTOCAST_TYPES, ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_under_autocast(
    inputs: torch.dtype, weights: torch.dtype, autocast: torch.dtype
) -> None:
    case = Case(2, 5, 6, 7)
    results = []
    for kind in (SMLPBlock, FusedSMLPBlock):
        torch.manual_seed(0)
        module = kind(5, 6, 7, device=DEVICE, dtype=weights)
        x = case.arguments(inputs)[0].requires_grad_()
        with torch.autocast(DEVICE, autocast):
            y = module(x)
        y.float().square().sum().backward()
        tensors = [y, x.grad, *(p.grad for p in module.parameters())]
        results.append(tensors)
    for plain, fused in zip(*results, strict=True):
        assert fused.dtype == plain.dtype
        error = (fused.double() - plain.double()).norm() / plain.double().norm()
        assert error < 4 * max(EPS[autocast], EPS[fused.dtype])


def test_float64_is_exempt_from_autocast() -> None:
    case = Case(2, 5, 6, 7)
    module = block(case)
    x = case.arguments(torch.float64)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = module(x)
    assert_close(y, formula(x, *module.weights()), None, eps=EPS[torch.float64])


class Twice(nn.Module):
    """One block used in two places, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SMLPBlock(4, 5, 3, dtype=torch.float64, device=DEVICE)
        self.again = self.first
        self.rest = nn.Sequential(nn.GELU(), SMLPBlock(4, 5, 3, dtype=torch.float64, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.again(self.first(x)))


def test_fuse_and_unfuse() -> None:
    torch.manual_seed(0)
    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = Case(2, 4, 5, 3).arguments(torch.float64)[0]
    before, keys = model(x), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]

    assert fuse_model(model) == 2
    assert type(model.first) is FusedSMLPBlock and model.again is model.first
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert_close(model(x), before, None, eps=EPS[torch.float64])

    model(x).square().sum().backward()  # the optimizer made before the swap still steps
    optimizer.step()
    stepped = model(x)
    assert (stepped - before).abs().max() > 1e-3
    assert unfuse_model(model) == 2
    assert type(model.first) is SMLPBlock
    assert_close(model(x), stepped, None, eps=EPS[torch.float64])


def test_gradients_have_the_strides_of_their_parameters() -> None:
    """Or else data parallelism, which keeps them in buckets, warns of slow copies."""
    block = FusedSMLPBlock(5, 6, 4, device=DEVICE).to(memory_format=torch.channels_last)
    assert block.fuse.weight.stride() == (12, 1, 12, 12)
    block(torch.randn(2, 4, 5, 6, device=DEVICE)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_fuse_a_block_itself() -> None:
    module = SMLPBlock(4, 5, 3, device=DEVICE)
    assert fuse_model(module) == 1
    assert type(module) is FusedSMLPBlock


def test_network() -> None:
    torch.manual_seed(0)
    model = SparseMLP((8, 12), 2, 3, 5, d_model=4, depth=[1, 1]).to(DEVICE, torch.float64).eval()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, device=DEVICE)
    expected = model(x)
    assert fuse_model(model) == 2
    assert_close(model(x), expected, None, eps=EPS[torch.float64])


@pytest.mark.parametrize("swap", [fuse_model, unfuse_model])
def test_nothing_to_swap_is_an_error(swap) -> None:
    with pytest.raises(ValueError, match=r"model: expected at least one .*SMLPBlock.* in Linear"):
        swap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        swap(3)


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class Negated(SMLPBlock):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model = nn.Sequential(Negated(2, 2, 2), SMLPBlock(2, 2, 2), SMLPBlock(2, 2, 2))
    model[2].forward = partial(lambda forward, x: -forward(x), model[2].forward)
    assert fuse_model(model) == 1
    assert [type(block) for block in model] == [Negated, FusedSMLPBlock, SMLPBlock]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="shards over a process group of CPUs")
@pytest.mark.usefixtures("process_group")
def test_blocks_that_are_sharded_themselves() -> None:
    torch.manual_seed(0)
    model = SparseMLP((8, 12), 2, 3, 5, d_model=4, depth=[1, 1]).double()
    expected = model(images := torch.randn(2, 3, 8, 12).double())
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    blocks = [module for module in model.modules() if isinstance(module, SMLPBlock)]
    for module in (blocks[0], model):  # one by itself, the other as a part
        fully_shard(module, mesh=mesh)
    assert fuse_model(model) == 2
    assert all(isinstance(module, FusedSMLPBlock) for module in blocks)
    assert isinstance(blocks[0], FSDPModule) and type(blocks[1]) is FusedSMLPBlock
    y = model(images)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert unfuse_model(model) == 2
    assert not any(isinstance(module, FusedSMLPBlock) for module in blocks)
    torch.testing.assert_close(model(images), y, rtol=1e-10, atol=1e-10)


WEIGHTS = [
    f"{part}.{entry}" for part in ("proj_h", "proj_w", "fuse") for entry in ("weight", "bias")
]


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_has_the_device_and_type_of_the_input(name: str) -> None:
    """A kernel would read another GPU's memory, or bits of another type, without a word."""
    case = Case(1, 4, 5, 3)
    x = case.arguments(torch.float32)[0]
    part, entry = name.split(".")
    for change, error, message in (
        ({"device": "meta"}, ValueError, f"expected the .*device.* {x.device}"),
        (
            {"dtype": torch.float16},
            TypeError,
            "expected the type of x, torch.float32, got",
        ),
    ):
        module = block(case, torch.float32)
        weight = getattr(module.get_submodule(part), entry)
        setattr(module.get_submodule(part), entry, nn.Parameter(weight.to(**change)))
        named = "x" if name == "fuse.weight" else name
        expected = message if named != "x" else "expected the parameters' (device|dtype)"
        with pytest.raises(error, match=f"^{named}: {expected}"):
            module(x)


def test_errors_are_the_plain_blocks() -> None:
    module = block(Case(1, 4, 5, 3), torch.float32)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 3, 4, 5\], got \[1, 3, 5, 4\]"):
        module(torch.zeros(1, 3, 5, 4, device=DEVICE))
    with pytest.raises(TypeError, match=r"x: expected the parameters' dtype torch.float32"):
        module(torch.zeros(1, 3, 4, 5, device=DEVICE, dtype=torch.float64))
