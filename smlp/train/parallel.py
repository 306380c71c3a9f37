"""One process or many: the processes of torchrun, and how the model is spread over them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from smlp.block import SMLPBlock
from smlp.train.config import AMP


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` over all processes."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def any(self, mine: bool) -> bool:
        """Return whether ``mine`` is true on any process."""
        return bool(self.sum(torch.tensor(float(mine), device=self.device)))

    def autocast(self, amp: str) -> torch.autocast:
        """Return the context of a forward pass in one of :data:`smlp.train.config.AMP`."""
        return torch.autocast(self.device.type, AMP[amp], enabled=amp != "none")

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world_of(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one, and leave at the end.

    If the caller has already joined them, this neither joins again nor leaves.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        ValueError: if there is no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError(
            "device: expected a CUDA GPU for 'cuda', got a machine where torch has none"
        )
    on_gpu = has_gpu and device != "cpu"
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else None
    if chosen is not None:
        torch.cuda.set_device(chosen)
    target = chosen or torch.device("cpu")
    joined = dist.is_initialized()
    if not joined and "WORLD_SIZE" not in os.environ:
        yield World(rank=0, size=1, device=target)
        return
    if not joined:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), target)
        if not joined:
            # Gloo's threads, which FSDP's caches keep alive, may still hold tensors of the last
            # collective. If they let go of them while Python ends, it aborts:
            # pytorch/pytorch#179291.
            dist.barrier()
    finally:
        if not joined:
            dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> None:
    """Shard ``model`` in place with FSDP2: the layer around each sMLP block, then the rest."""
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for layer in layers_with_one_block(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def layers_with_one_block(model: nn.Module) -> list[nn.Module]:
    """Return the largest submodules that hold exactly one sMLP block, in order."""
    found: list[nn.Module] = []
    for child in model.children():
        blocks = sum(isinstance(module, SMLPBlock) for module in child.modules())
        if blocks == 1 and not isinstance(child, SMLPBlock):
            found.append(child)
        elif blocks > 1:
            found += layers_with_one_block(child)
    return found


def replicate(model: nn.Module, world: World) -> nn.Module:
    """Wrap ``model`` for data parallelism."""
    device_ids = [world.device] if world.device.type == "cuda" else None
    # Broadcasting would replace the other processes' BatchNorm statistics by those of the first;
    # average_buffers needs what each has seen.
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def average_buffers(model: nn.Module, world: World) -> None:
    """Give every process the mean of BatchNorm's statistics, each having seen its own images.

    Training does not read them, so it is enough to do this before evaluation and checkpoints.
    """
    if world.size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(world.mean(buffer))


@contextmanager
def adding_gradients(forward: object, *, last: bool) -> Iterator[None]:
    """Keep gradients on each process until the last of several backward passes.

    Args:
        forward: what training calls, replicated, sharded or neither.
        last: whether this is the last of the passes, after which processes share their sums.
    """
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
    if isinstance(forward, DistributedDataParallel) and not last:
        with forward.no_sync():
            yield
    else:
        yield


def all_finite(model: nn.Module, world: World) -> bool:
    """Return whether every number of ``model`` on every process is finite."""
    tensors = [*model.parameters(), *model.buffers()]
    mine = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    finite = torch.stack([t.isfinite().all() for t in mine]).all()
    return not world.any(not finite)
