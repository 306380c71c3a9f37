"""All options of a training run, with their checks; the command line is generated from them."""

import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from smlp.ablations import ABLATIONS
from smlp.network import as_pair

BUNDLED = ("digits", "mnist5k")
SMLPNETS = ("smlpnet_tiny", "smlpnet_small", "smlpnet_base")
MODELS = ("sparse_mlp", *SMLPNETS)
PARALLEL = ("ddp", "fsdp")
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEEP = ("best", "last")

# What may differ between a run and its continuation: how long, where and how it runs, not what it
# computes in a step. A folder of images may have moved: classes and their sizes are compared.
FREE_ON_RESUME = frozenset(
    {"data", "out", "fused", "compile", "channels_last", "workers", "parallel", "device", "resume"}
    | {"checkpoint_every", "progress", "epochs", "grad_checkpointing", "overwrite"}
)


def _option(default: Any, help_text: str, **argparse_arguments: Any) -> Any:
    """Declare a field of the dataclass together with its option on the command line."""
    return field(default=default, metadata={"help": help_text, **argparse_arguments})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; each field is the option of the same name of ``smlp train``.

    Sizes left at None take the defaults of the data (the two bundled sets) or of the model.

    Raises:
        ValueError: if a value is out of range or two of them contradict each other.
        TypeError: if a value is of another type than its option.
    """

    data: str = _option(
        "digits", "digits, mnist5k, or a folder with train/<class>/ and val/<class>/ images"
    )
    out: str = _option("runs/train", "folder of checkpoints and logs")
    model: str = _option("sparse_mlp", "which network", choices=MODELS)
    image_size: tuple[int, int] | None = _option(
        None, "height,width of a folder's images, or one number"
    )
    patch_size: int | None = _option(None, "side of a patch in pixels")
    d_model: int | None = _option(None, "channels of the first stage")
    depth: tuple[int, ...] | None = _option(None, "layers of each stage, such as 2,8,14,2")
    ablation: str = _option("none", "one change to an smlpnet", choices=tuple(ABLATIONS))
    fused: bool = _option(False, "swap the fused Triton blocks in")
    init: str | None = _option(
        None, "weights to start from, in any layout; a head of other classes starts fresh"
    )

    epochs: int = _option(10, "passes over the training images")
    batch_size: int = _option(64, "images per step, over all processes together")
    lr: float = _option(2e-3, "highest learning rate")
    min_lr: float = _option(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: int = _option(
        1, "epochs of linear warm-up before the cosine; half of a run that is no longer than that"
    )
    weight_decay: float = _option(0.05, "weight decay of AdamW, on matrices and filters only")
    clip_grad: float = _option(0.0, "largest norm of the gradient; 0 does not clip")
    label_smoothing: float = _option(0.0, "share of the target spread over all classes")
    ema_decay: float = _option(0.0, "decay of the averaged weights, such as 0.9999; 0 keeps none")
    keep: str = _option(
        "best",
        "weights in model.pt: those of the best epoch on the held-out images, averaged or not, or "
        "those of the last epoch, averaged if averages are kept",
        choices=KEEP,
    )

    mixup: float = _option(0.0, "alpha of mixup (image folder; needs torchvision)")
    cutmix: float = _option(0.0, "alpha of cutmix (image folder; needs torchvision)")
    randaugment: int = _option(0, "magnitude of RandAugment (image folder; needs torchvision)")
    random_erasing: float = _option(0.0, "probability of erasing (image folder; needs torchvision)")
    workers: int = _option(4, "processes that read the image folder")

    amp: str = _option("none", "autocast of the forward pass", choices=tuple(AMP))
    accumulate: int = _option(1, "parts into which the images of a step are split, to save memory")
    grad_checkpointing: bool = _option(
        False, "keep only the input of each layer and recompute the rest, to save memory"
    )
    channels_last: bool = _option(False, "keep feature maps in the channels_last layout")
    compile: bool = _option(False, "run the model through torch.compile")
    parallel: str = _option("ddp", "how the processes of torchrun share the work", choices=PARALLEL)
    freeze_bn: bool = _option(False, "BatchNorm normalises with its stored statistics")
    sync_bn: bool = _option(False, "BatchNorm normalises over the batch of all processes (CUDA)")
    device: str = _option("auto", "cpu, cuda, or auto for a GPU where there is one")
    seed: int = _option(0, "seed of the weights, of the order of images and of every augmentation")

    resume: bool = _option(
        False,
        "continue from the checkpoint in the folder, if there is one, with the options of its run",
    )
    overwrite: bool = _option(False, "replace the run in the folder, if there is one")
    checkpoint_every: int = _option(0, "steps between checkpoints; 0 writes one per epoch")
    progress: bool = _option(True, "show a progress bar, on a terminal")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _plain(getattr(self, option.name))
            if isinstance(option.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{option.name}: expected True or False, got {value!r}")
            object.__setattr__(self, option.name, value)
        for name in ("data", "out", "init"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("init", None):
                raise TypeError(f"{name}: expected a name or a path, got {value!r}")
        if self.image_size is not None:
            object.__setattr__(self, "image_size", as_pair("image_size", self.image_size))
        for name in ("epochs", "batch_size", "accumulate"):
            _integer(name, getattr(self, name), at_least=1)
        for name in ("warmup_epochs", "workers", "checkpoint_every", "randaugment", "seed"):
            _integer(name, getattr(self, name), at_least=0)
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected less than 2**64, got {self.seed}")
        choices: dict[str, Any] = {"model": MODELS, "amp": AMP, "parallel": PARALLEL, "keep": KEEP}
        for name, expected in (choices | {"ablation": ABLATIONS}).items():
            got = getattr(self, name)
            if got not in expected:
                raise ValueError(f"{name}: expected one of {', '.join(expected)}, got {got!r}")
        for name in ("lr", "min_lr", "weight_decay", "clip_grad", "mixup", "cutmix"):
            value = _number(name, getattr(self, name))
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        for name in ("label_smoothing", "ema_decay", "random_erasing"):
            value = _number(name, getattr(self, name))
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
        if not self.min_lr < self.lr:
            raise ValueError(f"min_lr: expected less than lr ({self.lr}), got {self.min_lr}")
        if self.randaugment > 30:
            raise ValueError(f"randaugment: expected a magnitude up to 30, got {self.randaugment}")
        if self.freeze_bn and self.sync_bn:
            raise ValueError("sync_bn: expected without freeze_bn, got both")
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected without resume, got both")
        if self.data in BUNDLED:
            self._refuse_folder_options()

    def _refuse_folder_options(self) -> None:
        for name in ("image_size", "mixup", "cutmix", "randaugment", "random_erasing"):
            value = getattr(self, name)
            if value not in (None, 0):
                raise ValueError(
                    f"{name}: expected with an image folder only, "
                    f"got {value} with data {self.data!r}"
                )

    def as_saved(self) -> dict[str, Any]:
        """Return all options as a checkpoint keeps them: with whole paths."""
        options = asdict(self)
        if self.data not in BUNDLED:
            options["data"] = str(Path(self.data).resolve())
        if self.init is not None:
            options["init"] = str(Path(self.init).resolve())
        return options

    def course(self) -> dict[str, Any]:
        """Return the options that decide what is computed, which a continuation must repeat."""
        return {k: v for k, v in self.as_saved().items() if k not in FREE_ON_RESUME}


def _plain(value: Any) -> Any:
    """Return a path as text, a number of NumPy's as Python's, a list as a tuple.

    Those can be written to a checkpoint, read back and compared.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return value


def _integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
