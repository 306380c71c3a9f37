"""Image files as input of networks: of any mode and bit depth, turned upright, cut to size.

Pillow reads them; it and NumPy (both of the ``demo`` extra) are imported when a file is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_MODES = {1: "L", 3: "RGB"}


def image_files(folder: str | Path) -> list[Path]:
    """Return the image files in ``folder`` and below it, by name, without hidden ones.

    Links are followed; a folder that several lead to is read once, so that none leads in a circle.

    Raises:
        OSError: if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    read: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in read:
            folders.clear()
            continue
        read.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root, name)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def read_image(path: str | Path, in_channels: int) -> "Image":
    """Read an image file, turned upright as its EXIF orientation says, with 8 bits per channel.

    Pixels of 16 or 32 bits are scaled from the range of their type: 0 to 65535, 0 to 2**31 - 1
    (32-bit integers that all lie below 65536 count as 16-bit ones, which is how pillow returns
    those of some formats), or 0 to 1 for floating point.

    Args:
        path: any format that pillow reads.
        in_channels: 1 converts to grey, 3 to colour.

    Raises:
        ValueError: if the file is not an image, is damaged or has pixels outside the range of its
            type, or ``in_channels`` is another number.
        ImportError: if pillow is missing, with the command that installs it.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("image: reading one needs pillow: pip install pillow") from error
    if in_channels not in _MODES:
        raise ValueError(f"image: expected a network of 1 or 3 input channels, got {in_channels}")
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
        return _with_8_bits(upright).convert(_MODES[in_channels])
    except Exception as error:  # anything, where bytes are damaged
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"image: expected an image file, got {path}: {reason}") from None


def load_image(
    path: str | Path, in_channels: int, image_size: tuple[int, int], *, crop: float = 1.0
) -> Tensor:
    """Read an image file: cut its centre to the network's aspect ratio, then resize it.

    Args:
        path: any format that pillow reads.
        in_channels: 1 converts to grey, 3 to colour.
        image_size: (height, width) wanted.
        crop: share of the image's height and width that the centre crop is cut from.

    Returns:
        ``[in_channels, *image_size]``, float32, from 0 (black) to 1.

    Raises:
        ValueError: as :func:`read_image`.
        ImportError: if pillow is missing, with the command that installs it.
    """
    image = read_image(path, in_channels)
    from PIL import ImageOps
    from PIL.Image import Resampling

    height, width = image_size
    border = (1 - crop) / 2
    fitted = ImageOps.fit(image, (width, height), Resampling.BICUBIC, bleed=border)
    return to_tensor(fitted)


@dataclass(frozen=True)
class Preprocessing:
    """How image files become input of a network; called with a path, it returns ``[C, H, W]``.

    Attributes:
        in_channels: 1 for grey, 3 for colour.
        image_size: (height, width).
        mean: what is subtracted from each channel, on a scale from 0 to 1.
        std: what each channel is divided by after that.
        crop: share of the image's height and width that the centre crop is cut from.
    """

    in_channels: int
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    crop: float

    def load(self, path: str | Path) -> Tensor:
        """Read an image file without normalising it; see :func:`load_image`."""
        return load_image(path, self.in_channels, self.image_size, crop=self.crop)

    def normalise(self, images: Tensor) -> Tensor:
        """Return images ``[..., C, H, W]`` from 0 to 1, normalised for the network."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def __call__(self, path: str | Path) -> Tensor:
        return self.normalise(self.load(path))


def to_tensor(image: "Image") -> Tensor:
    """Return a grey or colour image of 8 bits as ``[C, H, W]``, float32, from 0 to 1."""
    import numpy as np

    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1)


def _with_8_bits(image: "Image") -> "Image":
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    top = 1 if image.mode == "F" else 2**16 - 1
    if image.mode == "I" and high > top:
        top = 2**31 - 1
    if not (low >= 0 and high <= top):  # NaN too
        raise ValueError(f"its {pixels.dtype} pixels go from {low} to {high}, not from 0 to {top}")
    return Image.fromarray((pixels * (255 / top)).round().astype(np.uint8))
