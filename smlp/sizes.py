"""Image and stage sizes: turning what a user passes into (height, width), with errors that help."""

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import cast

import torch
from torch import Tensor

Size = int | Sequence[int]
"""One number for a square, or a (height, width) pair as a tuple or list."""


def positive_int(name: str, value: object) -> int:
    """Return ``value``, which has to be an integer of at least 1, NumPy's included.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is smaller than 1.
    """
    number = _integer(value)
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number


def _integer(value: object) -> int | None:
    """``value`` if it is an integer, of Python or NumPy, else None."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # NumPy's arrays and booleans
        return None


def _is_sequence(values: object) -> bool:
    """Whether it is a tuple, a list or the like, as of NumPy or of a configuration file."""
    return hasattr(values, "__len__") and not isinstance(values, (str, bytes, Mapping, Set, Tensor))


def positive_ints(name: str, values: object) -> tuple[int, ...]:
    """Return a non-empty tuple or list of positive integers as a tuple.

    Raises:
        TypeError: if it is no tuple or list of integers.
        ValueError: if it is empty or an entry is smaller than 1.
    """
    if not _is_sequence(values):
        raise TypeError(f"{name}: expected a tuple or list of integers, got {values!r}")
    entries = tuple(cast(Iterable[object], values))
    if not entries:
        raise ValueError(f"{name}: expected at least one entry, got {values!r}")
    return tuple(positive_int(f"{name}[{i}]", value) for i, value in enumerate(entries))


def as_pair(name: str, value: Size) -> tuple[int, int]:
    """Return ``value`` as (height, width): a number stands for a square.

    Raises:
        TypeError: if it is neither an integer nor a tuple or list of integers.
        ValueError: if it does not have two entries, or one is smaller than 1.
    """
    if _integer(value) is not None or not _is_sequence(value):
        side = positive_int(name, value)
        return side, side
    sides = positive_ints(name, value)
    if len(sides) != 2:
        raise ValueError(f"{name}: expected one integer or (height, width), got {value!r}")
    return sides[0], sides[1]


def rate(name: str, value: float) -> float:
    """Return ``value``, a probability in [0, 1).

    Raises:
        ValueError: if it lies outside.
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def stage_sizes(image_size: Size, patch_size: Size, stages: int) -> list[tuple[int, int]]:
    """Return the (height, width) of every stage's feature map.

    The first stage has one pixel per patch; every further stage halves both axes.

    Raises:
        TypeError: if a size is no integer or pair of integers.
        ValueError: if a size is smaller than 1 or does not divide.
    """
    image, patch = as_pair("image_size", image_size), as_pair("patch_size", patch_size)
    step = 2 ** (stages - 1)
    for axis, size, cell in zip(("height", "width"), image, patch, strict=True):
        if size % (cell * step):
            raise ValueError(
                f"image_size: expected a {axis} divisible by {cell * step} "
                f"(patch {cell}, halved {stages - 1} times between {stages} stages), got {size}"
            )
    height, width = image[0] // patch[0], image[1] // patch[1]
    return [(height >> stage, width >> stage) for stage in range(stages)]


def check_images(
    x: Tensor, channels: int, size: tuple[int, int], weight: Tensor | None = None
) -> None:
    """Check a batch of images against what a network was built for.

    Args:
        x: the images.
        channels: of each.
        size: their height and width.
        weight: one of the network's weights, whose dtype they have to have; None for any dtype.

    Raises:
        TypeError: if ``x`` is no floating-point tensor of that dtype.
        ValueError: if its shape is not ``[B, channels, *size]``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, *size):
        expected = f"[B, {channels}, {size[0]}, {size[1]}]"
        hint = _shape_hint(tuple(x.shape), channels, size)
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}{hint}")
    if not torch.is_floating_point(x):
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if weight is None or x.dtype == weight.dtype or weight.dtype not in _COMPUTED:
        return
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # an error to ask on meta
    if not autocast or torch.float64 in (x.dtype, weight.dtype):  # which autocast leaves alone
        raise TypeError(
            f"x: expected images of the parameters' dtype {weight.dtype}, got {x.dtype}; convert "
            "one of them with .to()" + ("" if autocast else " or run under torch.autocast")
        )


_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape_hint(shape: tuple[int, ...], channels: int, size: tuple[int, int]) -> str:
    """What would make images of another shape fit."""
    if shape == (channels, *size):
        return "; x.unsqueeze(0) makes a batch of one image"
    if shape == (*size, channels):
        return "; x.permute(2, 0, 1).unsqueeze(0) makes a batch of one image with channels last"
    if len(shape) == 4 and shape[1:] == (*size, channels):
        return "; x.permute(0, 3, 1, 2) puts the channels first"
    if len(shape) == 4 and shape[1] == channels:
        return "; smlp.resize adapts a model to another image size"
    return ""
