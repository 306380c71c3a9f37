"""Checkpoints: written so that a kill at any moment leaves a whole file, read back to the bit."""

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from smlp.checkpoint import reading
from smlp.files import write_atomically
from smlp.train.parallel import World

# Sharded or not, a checkpoint holds whole tensors under plain names, so that it can continue with
# another number of processes.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them; nothing that could run code."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, argument: str = "resume") -> dict[str, Any]:
    """Read what :func:`save` wrote, onto the CPU, refusing everything but data.

    Args:
        path: the file.
        argument: what an error calls it.

    Raises:
        ValueError: if the file is not such a checkpoint.
    """
    expected = "a checkpoint of smlp train"
    try:
        with reading(argument, expected, path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{argument}: expected {expected} in {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: expected {expected} in {path}, got other data")
    return content


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the whole state dict on the CPU; on other processes than the main one, nothing."""
    return get_model_state_dict(model, options=_WHOLE)


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state dict in a model that may be sharded."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by parameter name; on other processes, nothing."""
    return dict(get_optimizer_state_dict(model, optimizer, options=_WHOLE))


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state that :func:`optimizer_state` returned."""
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def random_states(world: World) -> list[dict[str, Any]]:
    """Return the state of torch's random numbers of every process, in the order of ranks."""
    mine: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(world.device)
    if world.size == 1:
        return [mine]
    states: list[Any] = [None] * world.size
    dist.all_gather_object(states, mine)
    return states


def restore_random_state(states: list[dict[str, Any]], world: World) -> bool:
    """Set this process's random numbers; returns False where the processes are others than then."""
    if len(states) != world.size:
        return False
    mine = states[world.rank]
    torch.set_rng_state(mine["cpu"])
    if world.device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], world.device)
    return True
