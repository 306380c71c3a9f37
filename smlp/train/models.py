"""Networks by name, with the sizes that fit the data."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import nn

import smlp
from smlp.ablations import ablate
from smlp.images import Preprocessing
from smlp.network import PyramidNetwork
from smlp.train import checkpoint
from smlp.train.config import BUNDLED, TrainConfig

MODEL = "model.pt"  # the file of trained weights in the folder of a run
FUSE = "smlp.fuse"  # group of entry points, see installed_fuse

Fuse = Callable[[nn.Module], object]
"""Swaps the blocks inside a model for fused ones, in place."""

# Small enough for a CPU; each gets more than 95 % of held-out images right in a minute or two.
SIZES_FOR_DATA: dict[str, dict[str, Any]] = {
    "digits": {"patch_size": 1, "d_model": 32, "depth": (2, 2)},
    "mnist5k": {"patch_size": 2, "d_model": 32, "depth": (2, 2)},
}


def model_arguments(
    config: TrainConfig, image_size: tuple[int, int], in_channels: int, num_classes: int
) -> dict[str, Any]:
    """Return the network's keyword arguments: from the options, else from the data."""
    arguments: dict[str, Any] = {
        "image_size": image_size,
        "in_channels": in_channels,
        "num_classes": num_classes,
    }
    if config.data in BUNDLED:
        arguments |= SIZES_FOR_DATA[config.data]
    for name in ("patch_size", "d_model", "depth"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    if config.ablation != "none":
        arguments["ablation"] = config.ablation
    return arguments


def installed_fuse() -> Fuse:
    """Load the first entry point of the group ``smlp.fuse``, which an installed package declares.

    ``smlp`` does not import the kernels, which depend on it: it finds them by package metadata.

    Raises:
        ImportError: if no installed package declares one, or it cannot be imported.
    """
    for entry_point in entry_points(group=FUSE):
        fuse: Fuse = entry_point.load()
        return fuse
    raise ImportError(
        f"fused: expected an installed package with an entry point in the group {FUSE}, got none; "
        "in a checkout of smlp-kernels, pip install . (or -e .) installs it"
    )


def build_model(name: str, arguments: dict[str, Any], fuse: Fuse | None = None) -> PyramidNetwork:
    """Build a network by its name on the command line.

    Args:
        name: one of :data:`smlp.train.config.MODELS`.
        arguments: of the network; ``ablation`` among them is one of
            :data:`smlp.ablations.ABLATIONS`.
        fuse: swaps the fused blocks in; None leaves them plain.

    Raises:
        ValueError: if the sizes do not divide, or the network has no ablations.
    """
    sizes = {key: value for key, value in arguments.items() if key != "ablation"}
    builder: Any = smlp.SparseMLP if name == "sparse_mlp" else getattr(smlp, name)
    if "ablation" in arguments:
        if name == "sparse_mlp":
            got = arguments["ablation"]
            raise ValueError(f"ablation: expected an smlpnet to change, got {got!r} of {name}")
        builder = partial(ablate, arguments["ablation"], builder)
    model: PyramidNetwork = builder(**sizes)
    if fuse is not None:
        fuse(model)
    return model


@dataclass(frozen=True)
class Trained:
    """The content of the ``model.pt`` that ``smlp train`` writes.

    Attributes:
        network: in eval mode, on the CPU, with plain blocks.
        classes: the names of the classes, by the index of the output.
        data: what it was trained on: a bundled set or the path of a folder.
        mean: what is subtracted from each colour channel, on a scale from 0 to 1.
        std: what each channel is divided by after that.
        crop: share of an image file's height and width that its centre is cut from.
    """

    network: PyramidNetwork
    classes: list[str]
    data: str
    mean: list[float]
    std: list[float]
    crop: float

    @property
    def preprocessing(self) -> Preprocessing:
        """How image files become input: in the same way as the held-out ones in training."""
        network = self.network
        return Preprocessing(
            network.in_channels, network.image_size, self.mean, self.std, self.crop
        )


def load_network(path: str | Path) -> Trained:
    """Rebuild a trained network from the ``model.pt`` of a run.

    Raises:
        ValueError: if there is no such file, or it is not a ``model.pt``.
    """
    content = checkpoint.load(Path(path), "checkpoint")
    about = [field.name for field in fields(Trained) if field.name != "network"]
    missing = {"model", "arguments", "state_dict", *about} - content.keys()
    if missing:
        raise ValueError(
            f"checkpoint: expected the {MODEL} of a run of smlp train, got {path} without "
            f"{', '.join(sorted(missing))}"
        )
    network = build_model(content["model"], content["arguments"])
    network.load_state_dict(content["state_dict"])
    return Trained(network.eval(), **{name: content[name] for name in about})
