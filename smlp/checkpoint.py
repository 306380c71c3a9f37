"""Loading weights in any published layout, and saving them in the paper's."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from smlp.layouts import Rule, known_names, paper_rules, rules_for, unused
from smlp.network import FeaturePyramid, PyramidNetwork, require_module, unwrapped
from smlp.smlpnet import SMLPNet
from smlp.weight_files import find_weights, read_weights, reading

__all__ = ["CheckpointError", "LoadReport", "load_checkpoint", "paper_state_dict", "reading"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mapped:
    """One tensor of a checkpoint: its name there, its name in the model, and what was done."""

    theirs: str
    ours: str
    how: str


@dataclass(frozen=True)
class LoadReport:
    """The report of :func:`load_checkpoint`.

    Attributes:
        layout: ``"spach"`` (the paper's code), ``"port"`` (the SparseMLP port as it saves itself),
            ``"external-attention"`` (the same with a linear ``fuse``) or ``"smlp"`` (ours).
        mapped: every tensor that was loaded.
        kept: entries of the model that the checkpoint does not have, and need not have.
        left_out: entries of the checkpoint that the model has no use for.
        classifier: entries of the model that ``classifier=False`` left unchanged.
        weights: where the weights are in the source, such as ``state_dict_ema``; empty for its top
            level.
        averaged: whether their name says that these are averaged weights.
        others: other entries of the source that look like weights.
    """

    layout: str
    mapped: tuple[Mapped, ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    classifier: tuple[str, ...] = ()
    weights: str = ""
    averaged: bool = False
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = Counter(
            entry.how or ("unchanged" if entry.theirs == entry.ours else "renamed")
            for entry in self.mapped
        )
        lines = [f"{len(self.mapped)} tensors loaded from a checkpoint in the {self.layout} layout"]
        lines += [f"  {count} {how}" for how, count in done.most_common()]
        if self.weights or self.others:
            kind = "averaged weights" if self.averaged else "weights"
            rest = f"; not loaded: {', '.join(self.others)}" if self.others else ""
            lines.append(f"  these are the {kind} in {self.weights or 'the top'}{rest}")
        if self.classifier:
            names = ", ".join(self.classifier)
            lines.append(f"  kept by classifier=False: {names}")
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
        several = f"{len(problems)} entries that do not"
        lines[0] += f" with {several if len(problems) > 1 else 'one entry that does not'}:"
        lines += [f"  {problem}" for problem in problems[: self._SHOWN]]
        if len(problems) > self._SHOWN:
            lines.append(f"  and {len(problems) - self._SHOWN} more, in this error's .problems")
        super().__init__("\n".join([*lines, hint] if hint else lines))


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | BinaryIO | Mapping[str, Any],
    *,
    classifier: bool = True,
    weights: str = "auto",
) -> LoadReport:
    """Load weights of any published layout into a model, all of them or none.

    It reads the layouts of the paper's code (microsoft/SPACH; its projections are 1x1 convolutions
    with the axes' names swapped, its concatenation starts with the identity), of the SparseMLP port
    and its Jittor sibling, of blocks with a linear ``fuse`` (External-Attention), and our own. The
    weights may be anywhere in the file, such as under ``model`` or ``state_dict``, and their names
    may have any prefix, such as ``module.``, ``backbone.`` or those of ``torch.compile`` and FSDP.

    Args:
        model: an :class:`SMLPNet`, a :class:`SparseMLP`, an :class:`SMLPBlock`, or a module with
            blocks in it; changed in place, dtype and device kept. It may be wrapped by
            ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` or ``torch.compile``.
            A :class:`FeaturePyramid`, or a network without its head, takes checkpoints with one.
        source: a file written by torch.save or by safetensors, by its path or opened for reading in
            binary mode, or a state dict (tensors or arrays), or a mapping that holds one. Files are
            read without running any code they may contain.
        classifier: False leaves the network's last linear layer as it is, to fine-tune on other
            classes.
        weights: which weights to load from a source that holds averaged ones (``model_ema``,
            ``state_dict_ema``, ``ema``, an ``AveragedModel``, ...) next to those of the last step:
            ``"ema"`` the averaged, ``"raw"`` the others, ``"auto"`` the averaged if there are some.

    Returns:
        Which weights were loaded and how each entry was mapped; the same is logged.

    Raises:
        CheckpointError: (a ValueError) if entries are missing, unknown or of another shape.
        ValueError: if the file cannot be read as tensors, if it has no weights of the kind asked
            for, or several, or if the model is on the meta device or sharded.
        OSError: if the file cannot be opened.
        TypeError: if ``model`` is not a module, ``source`` is not a path, file or state dict, or
            ``classifier=False`` is given for a model other than the networks named above.
        ModuleNotFoundError: if a safetensors file is given and safetensors is not installed.
    """
    require_module(model)
    model = unwrapped(model)
    if isinstance(model, FeaturePyramid):
        model = model.network
    present = model.state_dict()
    if any(value.is_meta for value in present.values()):
        raise ValueError(
            "model: expected parameters with storage, got some on the meta device; "
            'call model.to_empty(device="cpu") first'
        )
    sharded = [name for name, value in present.items() if hasattr(value, "full_tensor")]
    if sharded:
        raise ValueError(
            f"model: expected whole parameters, got {len(sharded)} that are sharded, as "
            f"{sharded[0]}; load before fully_shard"
        )
    chosen = find_weights(_content(source), known_names(model), weights)
    state = chosen.entries
    layout, rules = rules_for(model, state)
    own = set() if classifier else _classifier(model)

    left_out = list(unused(model, state))
    left_out += [rule.theirs for rule in rules if rule.ours in own and rule.theirs in state]
    rules = [rule for rule in rules if rule.ours not in own]
    loaded, kept, problems = _apply(rules, state, present)
    alien = present.keys() - {rule.ours for rule in rules} - own
    problems += [f"missing: {name} {list(present[name].shape)}" for name in sorted(alien)]
    unknown = state.keys() - {rule.theirs for rule in rules} - set(left_out)
    problems += [f"not in the model: {name} {_shape(state[name])}" for name in sorted(unknown)]
    if problems:
        raise CheckpointError(layout, problems, _hint(problems))

    model.load_state_dict({name: loaded.get(name, value) for name, value in present.items()})
    mapped = [Mapped(rule.theirs, rule.ours, rule.how) for rule in rules if rule.theirs in state]
    report = LoadReport(
        layout=layout,
        mapped=tuple(mapped),
        kept=tuple(kept),
        left_out=tuple(left_out),
        classifier=tuple(sorted(own)),
        weights=chosen.name,
        averaged=chosen.averaged,
        others=chosen.others,
    )
    _logger.info("%s", report)
    return report


def paper_state_dict(network: SMLPNet) -> dict[str, Tensor]:
    """Return the weights of a network under the names and shapes of the paper's code.

    Args:
        network: the network; its feature maps must be square, as the paper's code requires.

    Returns:
        Copies of all tensors; the paper's code loads what ``torch.save`` writes of them.

    Raises:
        TypeError: if ``network`` is not an :class:`SMLPNet`.
        ValueError: if its feature maps are not square, or if it has weights that the paper's code
            does not have, as after an ablation or with adapters.
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
    rules = [rule for rule in paper_rules(network) if not rule.ours.endswith("fuse.bias")]
    alien = sorted(state.keys() - {rule.ours for rule in rules})
    if alien:
        raise ValueError(
            f"network: expected the weights of the paper's network alone, got {len(alien)} others: "
            f"{', '.join(alien[:5])}"
        )
    return {
        rule.theirs: rule.to_theirs(state[rule.ours]).detach().clone().contiguous()
        for rule in rules
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
        elif given.is_meta or given.layout != torch.strided:
            problems.append(f"no dense values: {name}, {given.layout} on {given.device}")
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


def _content(source: Any) -> Mapping[str, Any]:
    is_file = isinstance(source, (str, os.PathLike)) or hasattr(source, "read")
    content = read_weights(source) if is_file else source
    if not isinstance(content, Mapping):
        where = f" in {source}" if is_file else ""
        raise TypeError(
            f"source: expected a path, a file or a state dict, got {type(content).__name__}{where}"
        )
    return content


def _classifier(model: nn.Module) -> set[str]:
    """Return the names of the entries of a network's last linear layer."""
    head = getattr(model, "mlp_head", None)
    if isinstance(model, PyramidNetwork) and isinstance(head, nn.Identity):
        return set()
    if not isinstance(model, PyramidNetwork) or not isinstance(head, nn.Sequential):
        raise TypeError(
            "classifier: expected True for a model other than a SparseMLP or an SMLPNet with its "
            f"head, got False for {type(model).__name__}"
        )
    return {f"mlp_head.{len(head) - 1}.{name}" for name in head[-1].state_dict()}
