"""The cost of a network, stage by stage: parameters, multiply-adds, memory kept for backward."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smlp.block import SMLPBlock, positive_int
from smlp.network import PyramidNetwork, require_network
from smlp.tables import markdown_table


@dataclass(frozen=True)
class Part:
    """The cost of one part of a network.

    Attributes:
        name: name of the module.
        output: shape of its output to the next part, without the batch.
        parameters: number of parameters.
        macs: multiply-adds of matrix products and convolutions for one image; the same for fused
            blocks.
        kept: bytes that a training step keeps from forward to backward for the whole batch, without
            the parameters. What two parts both keep counts only for the first.
        kept_fused: the same with fused blocks, which keep only their input.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    macs: int
    kept: int
    kept_fused: int


def parts(
    network: PyramidNetwork, batch_size: int = 1, dtype: torch.dtype = torch.float32
) -> list[Part]:
    """Count the cost of every stage, of what comes before them and of the head.

    Nothing is computed: a copy of the network runs on torch's meta device, forward in training
    mode. Multiply-adds are those of ``torch.utils.flop_counter``, halved.

    Args:
        network: the network, on any device; it is not changed.
        batch_size: images that memory is counted for.
        dtype: floating-point type of parameters and activations.

    Returns:
        One entry per part, in the order in which they run.

    Raises:
        TypeError: if ``network`` is none of ours, or ``batch_size`` is not an integer.
        ValueError: if ``batch_size`` is less than 1, or 1 where a training step needs two images.
    """
    require_network(network)
    batch_size = positive_int("batch_size", batch_size)
    if batch_size == 1 and network.sizes[-1] == (1, 1):
        raise ValueError(
            "batch_size: expected at least 2, since the last feature maps are 1 x 1 and BatchNorm "
            "needs two values in training, got 1"
        )
    shadow = copy.deepcopy(network).to(device="meta", dtype=dtype).train()
    images = torch.empty(batch_size, network.in_channels, *network.image_size, device="meta")
    plain = _run(shadow, images.to(dtype))
    for module in shadow.modules():
        if isinstance(module, SMLPBlock):
            module.__class__ = _InputKeepingBlock
    fused = _run(shadow, images.to(dtype))
    return [
        Part(
            name=name,
            output=cost.output,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            macs=cost.flops // 2 // batch_size,
            kept=cost.kept,
            kept_fused=fused[name].kept,
        )
        for (name, module), cost in zip(_parts(shadow), plain.values(), strict=True)
    ]


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the network in order, the entries of its lists one by one."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", entry) for i, entry in enumerate(child))
        else:
            yield name, child


@dataclass
class _Cost:
    output: tuple[int, ...] = ()
    flops: int = 0
    kept: int = 0


def _run(network: nn.Module, images: Tensor) -> dict[str, _Cost]:
    costs = {name: _Cost() for name, _ in _parts(network)}
    counter = FlopCounterMode(display=False)
    with counter, kept_storages(network.parameters()) as kept:
        handles = []
        for name, module in _parts(network):
            before, after = _meters(costs[name], counter, kept)
            # timm's networks call the modules of their head one by one
            inside = [*module] if isinstance(module, nn.Sequential) and len(module) else [module]
            handles.append(inside[0].register_forward_pre_hook(before))
            handles.append(inside[-1].register_forward_hook(after))
        network(images)
        for handle in handles:
            handle.remove()
    return costs


def _meters(
    cost: _Cost, counter: FlopCounterMode, kept: dict[int, torch.UntypedStorage]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the hooks that read both counters before and after one part."""

    def reading() -> tuple[int, int]:
        return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())

    def before(*_: Any) -> None:
        cost.flops, cost.kept = (-value for value in reading())

    def after(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        flops, bytes_ = reading()
        cost.flops, cost.kept = cost.flops + flops, cost.kept + bytes_
        cost.output = tuple((output if isinstance(output, Tensor) else output[-1]).shape[1:])

    return before, after


@contextmanager
def kept_storages(parameters: Iterable[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collect the storages that autograd saves for backward, each once, parameters left out.

    It does not see inside a function that torch.compile made.
    """
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class _InputKeepingBlock(SMLPBlock):
    """Keeps what the fused block keeps, on a device without kernels."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _KeepInput.apply(x, *self.weights())
        return output


class _KeepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return torch.empty_like(x)


def as_table(network_parts: list[Part], batch_size: int = 1) -> str:
    """Lay :func:`parts` out as Markdown, with a last row of sums."""
    numbers = (
        "parameters",
        "MMAC / image",
        f"kept, batch {batch_size} (MiB)",
        "with fused blocks (MiB)",
    )
    rows = [
        (part.name, " x ".join(map(str, part.output)), *_numbers([part])) for part in network_parts
    ]
    rows.append(("total", "", *_numbers(network_parts)))
    return "\n".join(markdown_table(("part", "output", *numbers), rows, right=numbers))


def _numbers(some: list[Part]) -> tuple[str, str, str, str]:
    return (
        f"{sum(part.parameters for part in some):,}",
        f"{sum(part.macs for part in some) / 1e6:,.2f}",
        f"{sum(part.kept for part in some) / 2**20:,.2f}",
        f"{sum(part.kept_fused for part in some) / 2**20:,.2f}",
    )
