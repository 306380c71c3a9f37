"""Time a whole SparseMLP with its defaults, plain blocks next to fused ones.

    python -m benchmarks.network [--compiled]

Milliseconds of a training step and of inference, and peak memory: bfloat16 autocast, channels_last.
The step is forward, cross entropy, backward and fused AdamW on random images. With ``--compiled``
both models go through torch.compile in its default mode, since tuning every product of a network
would take longer than all other measurements, and only the step is timed.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.shapes import IMAGES
from smlp.testing import relative_error

ROUNDS = 5


def network(*, compiled: bool = False, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Yield the relative difference of the models' logits, then each measurement as it is made."""
    from smlp import SparseMLP
    from smlp_kernels import fuse_model

    torch.manual_seed(0)
    plain = SparseMLP().to(device)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(plain)
    swapped = fuse_model(fused)
    images = torch.randn(IMAGES, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, IMAGES[:1], device=device)
    plain.eval(), fused.eval()
    logits = [inference_step(model, images)().double() for model in (fused, plain)]
    plain.train(), fused.train()
    yield {"blocks_swapped": swapped, "logits_difference": relative_error(*logits)}
    models = {"plain": plain, "fused": fused}
    calls = {name: torch.compile(m) if compiled else m for name, m in models.items()}
    steps = {name: training_step(models[name], calls[name], images, labels) for name in models}
    yield {"training": measure(steps)}
    if not compiled:  # inference would be compiled once more, for minutes
        for model in models.values():
            model.eval()
        yield {"inference": measure({n: inference_step(m, images) for n, m in models.items()})}


def training_step(
    model: nn.Module, call: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """An optimizer step of ``model``, computed through ``call``: the model or its compiled form."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(call: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A forward without autograd."""

    def step() -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            return call(images)

    return step


def measure(steps: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Wall milliseconds per synchronised step, taken in turn, and peak bytes beyond the start's."""
    for step in steps.values():
        for _ in range(3):
            step()
    clocks = {name: timing.wall_stopwatch(step) for name, step in steps.items()}
    samples = timing.interleaved(clocks, rounds=ROUNDS)
    milliseconds = {name: us.median / 1e3 for name, us in samples.items()}
    return {
        "milliseconds": milliseconds,
        "speedup": milliseconds["plain"] / milliseconds["fused"],
        "peak_bytes": {name: timing.peak_bytes(step) for name, step in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="both models through torch.compile")
    for found in network(compiled=parser.parse_args().compiled):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
