"""A whole SparseMLP with its defaults: training step and inference, plain blocks and fused ones."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.recorder import Context
from smlp.testing import relative_error

BATCH = 128
IMAGE = (3, 224, 224)
ROUNDS = 5


def network(context: Context, *, compiled: bool = False, device: str = "cuda") -> dict[str, Any]:
    """Milliseconds per training step and per inference, peak memory; bf16 autocast, channels_last.

    The step is forward, cross entropy, backward and fused AdamW on random images. Under compile the
    whole model goes through torch.compile in its default mode: tuning every product of a network
    would take longer than the rest of the report.
    """
    from smlp import SparseMLP
    from smlp_kernels import fuse_model

    torch.manual_seed(0)
    plain = SparseMLP().to(device)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(plain)
    swapped = fuse_model(fused)
    images = torch.randn(BATCH, *IMAGE, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (BATCH,), device=device)
    models = {"plain": plain, "fused": fused}
    result = context.so_far
    result |= {"batch": BATCH, "blocks_swapped": swapped}
    result["logits_difference"] = difference(plain, fused, images)
    calls = {name: torch.compile(m) if compiled else m for name, m in models.items()}
    try:
        steps = {name: training_step(models[name], calls[name], images, labels) for name in models}
        result["training"] = _measure(steps)
        if compiled:  # inference would be compiled once more, for minutes
            return result
        for model in models.values():
            model.eval()
        result["inference"] = _measure(
            {name: inference_step(call, images) for name, call in calls.items()}
        )
    finally:
        if compiled:
            torch._dynamo.reset()
    return result


def difference(plain: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """Relative Frobenius difference of two models' logits in evaluation mode, bf16 autocast."""
    logits = []
    for model in (fused, plain):
        training = model.training
        model.eval()
        logits.append(inference_step(model, images)().double())
        model.train(training)
    return relative_error(*logits)


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


def _measure(steps: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Wall milliseconds per synchronised step, taken in turn, and peak bytes beyond the start's."""
    for step in steps.values():
        for _ in range(3):
            step()
    clocks = {name: timing.wall_stopwatch(step) for name, step in steps.items()}
    medians = timing.interleaved(clocks, rounds=ROUNDS)
    milliseconds = {name: us / 1e3 for name, us in medians.items()}
    return {
        "milliseconds": milliseconds,
        "speedup": milliseconds["plain"] / milliseconds["fused"],
        "peak_bytes": {name: timing.peak_bytes(step) for name, step in steps.items()},
    }
