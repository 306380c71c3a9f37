"""The state-dict layouts sMLP weights come in, as rules between our entries and theirs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smlp.block import SMLPBlock, as_matrix, identity_last
from smlp.network import PyramidNetwork
from smlp.smlpnet import SMLPNet
from smlp.sparse_mlp import SparseMLPStage
from smlp.weight_files import without_wrappers

OURS = "smlp"
SPACH = "spach"
PORT = "port"
LINEAR_FUSE = "external-attention"


def _same(value: Tensor) -> Tensor:
    return value


def _as_conv(weight: Tensor) -> Tensor:
    return weight[:, :, None, None] if weight.dim() == 2 else weight


@dataclass(frozen=True)
class Rule:
    """How one entry of a model's state dict relates to one of another layout.

    Attributes:
        ours: the name in the model's state dict.
        theirs: the name in the other layout.
        how: what happens to the values, in words; empty if nothing.
        to_ours: maps their tensor to ours; the identity on what does not have their shape.
        to_theirs: maps our tensor to theirs.
        if_absent: what our entry becomes, given its present value, where theirs does not exist;
            None if it has to.
    """

    ours: str
    theirs: str
    how: str = ""
    to_ours: Callable[[Tensor], Tensor] = _same
    to_theirs: Callable[[Tensor], Tensor] = _same
    if_absent: Callable[[Tensor], Tensor] | None = None


# A module of SMLPNetLayer and its place in the paper's code; {} is the layer's number, counted
# through all stages.
_PAPER_LAYER = {
    "local.norm": "token_mix.{}.0.conv_merge.BN",
    "local.conv": "token_mix.{}.0.conv_merge.Conv",
    "mix.norm": "token_mix.{}.1.BN",
    "norm_mlp": "channel_mix.{}.1",
    "mlp.0": "channel_mix.{}.2.net.0",
    "mlp.2": "channel_mix.{}.2.net.3",
}
_PAPER_BLOCK = "token_mix.{}.1."


def paper_rules(network: SMLPNet) -> list[Rule]:
    """Return one rule per entry of ``network`` that the paper's code has, to its layout.

    That is microsoft/SPACH, ``models/smlp.py``; pytorch-attention has the same names.
    """
    renamed = {"mlp_head.0": "batch_norm", "mlp_head.2": "mlp_head.0"}
    blocks = {}
    number = 0
    for stage, layers in enumerate(network.depth):
        renamed[f"stages.{stage}.0"] = f"to_patch_embedding.{stage}.0"
        for layer in range(1, layers + 1):
            ours = f"stages.{stage}.{layer}"
            blocks[f"{ours}.mix.block."] = _PAPER_BLOCK.format(number)
            for module, theirs in _PAPER_LAYER.items():
                renamed[f"{ours}.{module}"] = theirs.format(number)
            number += 1
    rules = []
    names = _names(network)
    for bare, name in names.items():
        module, _, entry = bare.rpartition(".")
        if module in renamed:
            rules.append(_plain(name, f"{renamed[module]}.{entry}"))
    for prefix in _blocks(network):
        if prefix in blocks:
            rules += _paper_block(prefix, blocks[prefix], names)
    return rules


def from_paper_layout(
    network: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Rename the entries of an :class:`SMLPNet` in ``state_dict`` (load_state_dict's own copy)."""
    if (
        not isinstance(network, SMLPNet)
        or f"{prefix}to_patch_embedding.0.0.weight" not in state_dict
    ):
        return
    rules = paper_rules(network)
    given = {rule: state_dict.pop(prefix + rule.theirs, None) for rule in rules}
    for rule, value in given.items():
        if value is not None:
            state_dict[prefix + rule.ours] = rule.to_ours(value)


def rules_for(model: nn.Module, state: Mapping[str, Any]) -> tuple[str, list[Rule]]:
    """Recognise the layout of ``state`` and return its name and one rule per entry of ``model``."""
    if isinstance(model, SMLPNet) and any(
        name.startswith(("token_mix.", "to_patch_embedding.")) for name in state
    ):
        return SPACH, paper_rules(model)
    layout = PORT if any(True for _ in unused_merge(model, state)) else OURS
    names = _names(model)
    rules = {name: _plain(name, bare) for bare, name in names.items()}
    for prefix in _blocks(model):
        fuse = f"{prefix}fuse.weight"
        if f"{prefix}proh_w.weight" in state:
            layout = SPACH
            rules.update({rule.ours: rule for rule in _paper_block(prefix, prefix, names)})
        elif fuse in names and isinstance(state.get(fuse), Tensor) and state[fuse].dim() == 2:
            layout = LINEAR_FUSE
            how = "linear layer to 1x1 convolution"
            rules[names[fuse]] = Rule(names[fuse], fuse, how, _as_conv, as_matrix)
    return layout, list(rules.values())


def known_names(model: nn.Module) -> set[str]:
    """Return the names under which entries of ``model`` may be found, in any layout."""
    names = _names(model)
    known = set(names)
    if isinstance(model, SMLPNet):
        known.update(rule.theirs for rule in paper_rules(model))
    for prefix in _blocks(model):
        known.update(rule.theirs for rule in _paper_block(prefix, prefix, names))
    return known


def _names(model: nn.Module) -> dict[str, str]:
    """Return the names of the model's entries, by what they are without wrappers of modules."""
    return {without_wrappers(name): name for name in model.state_dict()}


def _blocks(model: nn.Module) -> Iterator[str]:
    """Yield the prefix of the entries of every block, without wrappers of modules."""
    for path, block in model.named_modules():
        if isinstance(block, SMLPBlock):
            yield without_wrappers(f"{path}.") if path else ""


def unused(model: nn.Module, state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in ``state`` that the model has no use for.

    They belong to a patch merging after the port's last stage, or to a head that was removed.
    """
    yield from unused_merge(model, state)
    if isinstance(model, PyramidNetwork) and not _has_classifier(model):
        taken = {rule.theirs for rule in rules_for(model, state)[1]}
        heads = (name for name in state if name.startswith(("mlp_head.", "batch_norm.")))
        yield from (name for name in heads if name not in taken)


def _has_classifier(network: PyramidNetwork) -> bool:
    return any(isinstance(part, nn.Linear) for part in network.mlp_head.modules())


def unused_merge(model: nn.Module, state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in ``state`` that the port saves and never uses."""
    for path, stage in model.named_modules():
        if isinstance(stage, SparseMLPStage) and isinstance(stage.patch_merge, nn.Identity):
            prefix = without_wrappers(f"{path}.patch_merge." if path else "patch_merge.")
            yield from (name for name in state if name.startswith(prefix))


def _plain(ours: str, theirs: str) -> Rule:
    # A counter that only BatchNorm without momentum reads; not every framework has it.
    keep = _same if ours.endswith("num_batches_tracked") else None
    return Rule(ours, theirs, if_absent=keep)


def _paper_block(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """Return the rules of a block's entries, those of ``names``, which :func:`_names` returned.

    The names of its axes are swapped there, and identity comes first.
    """
    rules = []
    for our_axis, their_axis in (("proj_h", "proh_w"), ("proj_w", "proj_h")):
        rules += [
            Rule(
                f"{ours}{our_axis}.weight",
                f"{theirs}{their_axis}.weight",
                "1x1 convolution to linear layer, axis named the other way round",
                as_matrix,
                _as_conv,
            ),
            Rule(
                f"{ours}{our_axis}.bias",
                f"{theirs}{their_axis}.bias",
                "axis named the other way round",
            ),
        ]
    # Reversing three groups of columns is its own inverse.
    how = "columns reordered: identity, W, H to H, W, identity"
    rules.append(
        Rule(f"{ours}fuse.weight", f"{theirs}fuse.weight", how, identity_last, identity_last)
    )
    rules.append(Rule(f"{ours}fuse.bias", f"{theirs}fuse.bias", if_absent=torch.zeros_like))
    return [replace(rule, ours=names[rule.ours]) for rule in rules if rule.ours in names]
