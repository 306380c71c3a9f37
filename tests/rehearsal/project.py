"""What a rehearsal changes in this project: sizes, and what stands in for kernels."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

# those that do not take the tiles of a kernel apart
FIRST_TESTS = ("tests/smlp_kernels/test_mix.py::test_tf32_values",)
GPU_TESTS = "tests/smlp_kernels/test_gpu.py"


def functional(module: ModuleType) -> None:
    """Fused blocks compute with PyTorch's operators, while all code sees them run on kernels.

    All tensors are the CPU's, and ``fallback_reason`` says so; only here is that passed over.
    """
    reason, dispatch = module.fallback_reason, module.dispatch

    def no_reason(x: Tensor) -> str | None:
        found = reason(x)
        return None if found and found.startswith("the device is cpu") else found

    def by_pytorch(*arguments: Any, **named: Any) -> Tensor:
        module.fallback_reason = reason
        try:
            return dispatch(*arguments, **named)
        finally:
            module.fallback_reason = no_reason

    module.fallback_reason, module.dispatch = no_reason, by_pytorch


def by_formula(x: Tensor, *weights: Any) -> Tensor:
    """The operator ``mix``, weights transposed or not."""
    from smlp.testing import formula

    return formula(x, *weights[:4], weights[4].flatten(1), weights[5])


def ops(module: ModuleType) -> None:
    """What calls the operator by itself gets its values."""
    module.run_mix = by_formula


def hopper(module: ModuleType) -> None:
    """The kernel in CUDA C++ computes by PyTorch."""
    module.mix = lambda x, weights: by_formula(x, *weights)


def shapes(module: ModuleType) -> None:
    """Every shape keeps its name and becomes small; a few stages stand for all.

    So does the network. A module that is run, and not imported, keeps its constants.
    """
    import smlp

    smlp.SparseMLP = functools.partial(smlp.SparseMLP, image_size=32, d_model=4, depth=(1, 1, 1, 1))
    module.IMAGES = (2, 3, 32, 32)

    def small(shape: Any) -> Any:
        sizes = min(shape.channels, 8), min(shape.height, 8), min(shape.width, 8)
        return module.Shape(shape.name, min(shape.batch, 2), *sizes)

    kept = ("small-14", "small-56", "small-28", "base-7")
    module.STAGES = tuple(small(shape) for shape in module.STAGES if shape.name in kept)
    module.BY_NAME = {name: small(shape) for name, shape in module.BY_NAME.items()}
    module.GROUPS = {
        name: tuple(module.BY_NAME[s.name] for s in group if name != "stages" or s.name in kept)
        for name, group in module.GROUPS.items()
    }
    module.GROUPS["others"] = module.GROUPS["others"][:3]
    module.GROUPS["small"] = tuple(s for s in module.STAGES if s.name.startswith("small"))


def steps(module: ModuleType) -> None:
    """Fewer tests, and no step is stopped, however busy the machine is."""
    constants(FIRST_TESTS=FIRST_TESTS, ALL_TESTS=GPU_TESTS, WORKERS="1")(module)
    run = module.Step.run
    module.Step.run = lambda step, folder, seconds: run(step, folder, 10 * seconds)


def data(module: ModuleType) -> None:
    """Ten patterns to learn in a moment, in place of MNIST."""
    import torch

    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 28, 28, generator=generator)
    images, labels = patterns.repeat(20, 1, 1, 1), torch.arange(10).repeat(20)
    split = module.ImageSplit("patterns", images, labels, images[:20], labels[:20], 10, 0.0, 1.0)
    module.mnist5k = lambda: split


def constants(**values: Any) -> Callable[[ModuleType], None]:
    """Give a module's names other values, which it must have."""

    def change(module: ModuleType) -> None:
        for name, value in values.items():
            if not hasattr(module, name):
                raise AttributeError(f"{module.__name__}.{name}: there is nothing to be changed")
            setattr(module, name, value)

    return change


def models(module: ModuleType) -> None:
    """The network for the demo's images becomes small."""
    module.SIZES_FOR_DATA["mnist5k"] = {"patch_size": 2, "d_model": 4, "depth": (2, 1)}


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "smlp_kernels.functional": functional,
    "smlp_kernels.ops": ops,
    "smlp_kernels.hopper": hopper,
    "smlp.data": data,
    "smlp.train.models": models,
    "benchmarks.shapes": shapes,
    "benchmarks.roofline": constants(COPY_BYTES=1 << 16, GEMM_SIZE=64),
    "benchmarks.timing": constants(GRAPH_US=1.0),
    "benchmarks.workbench": constants(MAX_INPUT_SETS=2),
    "tools.tune": constants(TILE_BYTES=(4096,), WARPS=(2, 4), REGISTERS=(None,), PROGRAMS=(3,)),
    "benchmarks.steps": steps,
}
