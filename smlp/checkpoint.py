"""Loading weights in any published layout, and saving them in the paper's."""

import argparse
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smlp.layouts import Rule, paper_rules, rules_for, unused
from smlp.network import PyramidNetwork
from smlp.smlpnet import SMLPNet

_logger = logging.getLogger(__name__)

# Where training scripts keep the weights inside what they save.
_CONTAINERS = ("model", "state_dict", "model_state_dict")
# What wrappers (DistributedDataParallel, torch.compile) put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Mapped:
    """One tensor of a checkpoint: its name there, its name in the model, and what was done."""

    theirs: str
    ours: str
    how: str


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        layout: ``"spach"`` (the paper's code), ``"port"`` (the SparseMLP port, as it is saved),
            ``"external-attention"`` (the same with a linear ``fuse``) or ``"smlp"`` (ours).
        mapped: every tensor that was loaded.
        kept: entries of the model that the checkpoint need not have and does not have.
        left_out: entries of the checkpoint that the model has no use for.
    """

    layout: str
    mapped: tuple[Mapped, ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        done = Counter(
            entry.how or ("unchanged" if entry.theirs == entry.ours else "renamed")
            for entry in self.mapped
        )
        lines = [f"{len(self.mapped)} tensors loaded from a checkpoint in the {self.layout} layout"]
        lines += [f"  {count} {how}" for how, count in done.most_common()]
        if self.kept:
            lines.append(f"  not in the checkpoint, kept: {', '.join(self.kept)}")
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


class CheckpointError(ValueError):
    """A checkpoint that does not fit its model; the model was not changed.

    Attributes:
        problems: one line for every entry that does not fit, with its shape.
    """

    _SHOWN = 20

    def __init__(self, layout: str, problems: list[str], hint: str) -> None:
        self.problems = tuple(problems)
        lines = [f"source: expected a checkpoint that fits the model, got one (read as {layout})"]
        lines[0] += f" with {len(problems)} entries that do not:"
        lines += [f"  {problem}" for problem in problems[: self._SHOWN]]
        if len(problems) > self._SHOWN:
            lines.append(f"  and {len(problems) - self._SHOWN} more, in this error's .problems")
        super().__init__("\n".join([*lines, hint] if hint else lines))


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    classifier: bool = True,
) -> LoadReport:
    """Load weights of any published layout into a model, all of them or none.

    Understood are the paper's code (microsoft/SPACH; its projections are 1x1 convolutions with the
    axes' names swapped, its concatenation starts with the identity), the SparseMLP port and its
    Jittor sibling, blocks with a linear ``fuse`` (External-Attention), and our own. Names may carry
    the prefixes of DistributedDataParallel or torch.compile, and the weights may lie under
    ``model``, ``state_dict`` or ``model_state_dict``.

    Args:
        model: an :class:`SMLPNet`, a :class:`SparseMLP`, an :class:`SMLPBlock`, or a module with
            blocks in it; changed in place, dtype and device kept.
        source: a file written by torch.save or by safetensors, or a state dict (tensors or arrays).
            Files are read without running any code they may contain.
        classifier: False leaves the network's last linear layer as it is, to fine-tune on other
            classes.

    Returns:
        What was mapped and how; the same is logged.

    Raises:
        CheckpointError: (a ValueError) if entries are missing, unknown or of another shape.
        ValueError: if the file cannot be read as tensors, or the model is on the meta device.
        OSError: if the file cannot be opened.
        TypeError: if ``source`` is no path or state dict, or ``classifier=False`` is asked for a
            model that is no network of ours.
        ModuleNotFoundError: if a safetensors file is given and safetensors is not installed.
    """
    present = model.state_dict()
    if any(value.is_meta for value in present.values()):
        raise ValueError(
            "model: expected parameters with storage, got some on the meta device; "
            'call model.to_empty(device="cpu") first'
        )
    state = _without_wrappers(_as_state_dict(source), present)
    layout, rules = rules_for(model, state)
    own = set() if classifier else _classifier(model)

    left_out = list(unused(model, state))
    left_out += [rule.theirs for rule in rules if rule.ours in own and rule.theirs in state]
    rules = [rule for rule in rules if rule.ours not in own]
    loaded, kept, problems = _apply(rules, state, present)
    unknown = state.keys() - {rule.theirs for rule in rules} - set(left_out)
    problems += [f"not in the model: {name} {_shape(state[name])}" for name in sorted(unknown)]
    if problems:
        raise CheckpointError(layout, problems, _hint(problems))

    kept += sorted(own)
    model.load_state_dict({name: loaded.get(name, value) for name, value in present.items()})
    mapped = [Mapped(rule.theirs, rule.ours, rule.how) for rule in rules if rule.theirs in state]
    report = LoadReport(layout, tuple(mapped), tuple(kept), tuple(left_out))
    _logger.info("%s", report)
    return report


def paper_state_dict(network: SMLPNet) -> dict[str, Tensor]:
    """Return the weights of a network under the names and shapes of the paper's code.

    Args:
        network: the network, square, since the paper's code asks for that.

    Returns:
        Copies of all tensors; ``torch.save`` writes what the paper's code loads.

    Raises:
        TypeError: if ``network`` is no :class:`SMLPNet`.
        ValueError: if its feature maps are not square.
    """
    if not isinstance(network, SMLPNet):
        raise TypeError(f"network: expected an SMLPNet, got {type(network).__name__}")
    height, width = network.sizes[0]
    if height != width:
        raise ValueError(
            "network: expected square feature maps (the paper's code has no others), "
            f"got {height} x {width} in the first stage"
        )
    state = network.state_dict()
    return {
        rule.theirs: rule.to_theirs(state[rule.ours]).detach().clone().contiguous()
        for rule in paper_rules(network)
    }


def _apply(
    rules: list[Rule], state: Mapping[str, Any], present: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return the new values, the names kept for want of one, and what does not fit."""
    loaded: dict[str, Tensor] = {}
    kept: list[str] = []
    problems: list[str] = []
    for rule in rules:
        want = present[rule.ours]
        name = rule.theirs + (f" (for {rule.ours})" if rule.ours != rule.theirs else "")
        given = state.get(rule.theirs)
        if given is None and rule.if_absent is not None:
            loaded[rule.ours] = rule.if_absent(want)
            kept.append(rule.ours)
        elif given is None:
            problems.append(f"missing: {name} {list(want.shape)}")
        elif not isinstance(given, Tensor):
            problems.append(f"no tensor: {name}, a {type(given).__name__}")
        elif (value := rule.to_ours(given)).shape != want.shape:
            wanted = list(want.shape)
            problems.append(f"shape: {name} {_shape(given)}, where the model has {wanted}")
        elif value.is_floating_point() != want.is_floating_point():
            problems.append(f"dtype: {name} {value.dtype}, where the model has {want.dtype}")
        else:
            loaded[rule.ours] = value
    return loaded, kept, problems


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"


def _hint(problems: list[str]) -> str:
    shapes = [problem for problem in problems if problem.startswith("shape: ")]
    if shapes and len(shapes) == len(problems):
        if all("proj_" in problem or "proh_" in problem for problem in shapes):
            return (
                "only projections differ: another image size. Load into a model of the "
                "checkpoint's image size, then call smlp.resize"
            )
        if all("head." in problem for problem in shapes):
            return "only the head differs: classifier=False leaves the last layer as it is"
    return ""


def _classifier(model: nn.Module) -> set[str]:
    """Return the names of the entries of a network's last linear layer."""
    head = getattr(model, "mlp_head", None)
    if not isinstance(model, PyramidNetwork) or not isinstance(head, nn.Sequential):
        raise TypeError(
            "classifier: expected True for a model other than a SparseMLP or an SMLPNet with its "
            f"head, got False for {type(model).__name__}"
        )
    return {f"mlp_head.{len(head) - 1}.{name}" for name in head[-1].state_dict()}


# --- reading -----------------------------------------------------------------------------------


def _as_state_dict(source: object) -> dict[str, Any]:
    content = _read(Path(source)) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(content, Mapping):
        where = "" if content is source else f" in {source}"
        raise TypeError(
            f"source: expected a path or a state dict, got {type(content).__name__}{where}"
        )
    state: Mapping[str, Any] = content
    for key in _CONTAINERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    return {str(name): _as_tensor(value) for name, value in state.items()}


def _as_tensor(value: object) -> object:
    # Frameworks without torch tensors save arrays; anything else is reported by its name later.
    return torch.as_tensor(value) if hasattr(value, "__array__") else value


def _read(path: Path) -> object:
    """Read a file of tensors without running code from it."""
    read: Callable[[Path], Any] = _read_pickled_tensors
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as read
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"reading {path} needs safetensors: pip install safetensors", name=error.name
            ) from error
    with reading("source", "a file of tensors", path):
        return read(path)


@contextlib.contextmanager
def reading(argument: str, expected: str, path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file, other than an OSError, into a ValueError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # anything, where bytes are damaged
        # without the error's text: torch's advises to load the file unsafely
        raise ValueError(
            f"{argument}: expected {expected}, got {path}, which cannot be read without running "
            f"code from it, or is damaged ({type(error).__name__})"
        ) from error


def _read_pickled_tensors(path: Path) -> Any:
    # Training scripts save their options along; a Namespace holds values and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _without_wrappers(state: dict[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Remove what wrappers put before every name, unless the model is wrapped like that itself."""
    for prefix in _WRAPPERS * 2:
        wrapped = state and all(name.startswith(prefix) for name in state)
        if wrapped and not any(name.startswith(prefix) for name in present):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
