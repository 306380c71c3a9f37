"""Figures of receptive fields and feature maps; matplotlib is imported when one is drawn."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 12  # maps that a row holds before a picture grows in both directions


def new_figure(width: float, height: float) -> "Figure":
    """Create an empty figure that belongs to no window, in inches.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed, saying how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing needs matplotlib: pip install matplotlib", name=error.name
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def draw_receptive_fields(fields: Mapping[str, Tensor], title: str = "") -> "Figure":
    """Draw receptive fields side by side; pixels that are not reached at all stay white.

    Args:
        fields: the title of each panel and its ``[H, W]``, as :func:`smlp.receptive_field` returns.
        title: above all panels.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if there is no field, or one has negative values or not exactly two axes.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if not fields:
        raise ValueError("fields: expected at least one receptive field, got none")
    for name, field in fields.items():
        if field.dim() != 2 or field.min() < 0:
            raise ValueError(
                f"fields[{name!r}]: expected shape [H, W] and values of at least 0, "
                f"got shape {list(field.shape)} and minimum {field.min().item():.3g}"
            )
    # One scale for all panels, in decades below each panel's own maximum: the centre of a cross
    # is much stronger than its arms.
    decades = 4.0
    figure = new_figure(2.6 * len(fields) + 0.9, 3.3)
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    images = []
    for axis, (name, field) in zip(axes, fields.items(), strict=True):
        relative = field.detach().double().cpu() / field.max().clamp(min=1e-300).cpu()
        shown = relative.log10().clamp(min=-decades)
        shown[relative == 0] = float("nan")  # drawn in the background's colour
        images.append(axis.imshow(shown.numpy(), cmap="viridis", vmin=-decades, vmax=0))
        reached = (field > 0).double().mean().item()
        axis.set_title(f"{name}\n{reached:.0%} of {field.shape[0]} x {field.shape[1]}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    bar = figure.colorbar(images[0], ax=list(axes), shrink=0.75, ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_yticklabels(["1e-4", "1e-3", "1e-2", "0.1", "1"])
    bar.set_label("response, relative to the strongest", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def draw_feature_maps(
    image: Tensor, stages: Mapping[str, Tensor], *, channels: int = 6, title: str = ""
) -> "Figure":
    """Draw an image and, stage by stage, the channels that vary most over it.

    A stage's maps fill a row, or several if they do not fit side by side.

    Each map has its own scale, from its smallest value to its largest: the channels of a
    stage can differ a hundredfold.

    Args:
        image: ``[1 or 3, H, W]``, from 0 to 1.
        stages: the name of each row and its feature map, ``[C, h, w]``.
        channels: how many maps of a stage are shown at most.
        title: above all panels.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if a shape does not fit, there is no stage, or ``channels`` is less than 1.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: expected shape [1 or 3, H, W], got {list(image.shape)}")
    if not stages or channels < 1:
        raise ValueError(
            f"stages, channels: expected at least one of each, got {len(stages)} and {channels}"
        )
    for name, maps in stages.items():
        if maps.dim() != 3:
            raise ValueError(f"stages[{name!r}]: expected shape [C, h, w], got {list(maps.shape)}")
    shown = {name: min(channels, len(maps)) for name, maps in stages.items()}
    columns = min(max(shown.values()), max(COLUMNS, math.ceil(math.sqrt(sum(shown.values())))))
    first_row, rows = {}, 0
    for name, count in shown.items():
        first_row[name], rows = rows, rows + math.ceil(count / columns)
    side = 1.25  # of a panel, in inches
    figure = new_figure(side * (columns + 2.4), side * rows + (0.5 if title else 0.1))
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[2.0, *[1.0] * columns])
    picture = figure.add_subplot(grid[:, 0])
    pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0)
    picture.imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    picture.set_title("image", fontsize=10)
    picture.axis("off")
    for name, maps in stages.items():
        spread = maps.detach().float().flatten(1).std(dim=1, correction=0)
        strongest = spread.argsort(descending=True)[:channels]
        for index, channel in enumerate(strongest.tolist()):
            row, column = divmod(index, columns)
            axis = figure.add_subplot(grid[first_row[name] + row, column + 1])
            axis.imshow(maps[channel].detach().float().cpu().numpy(), cmap="viridis")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"channel {channel}", fontsize=7, labelpad=2)
            if index == 0:
                axis.set_ylabel(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure
