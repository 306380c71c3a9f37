"""The demo's pictures: the loss curves and the receptive field."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smlp.pictures import draw_receptive_fields, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision.
REFERENCE_COLOUR = "#E69F00"
FUSED_COLOUR = "#0072B2"


def draw_losses(reference: Tensor, fused: Tensor, steps_per_epoch: int, title: str) -> "Figure":
    """Draw the loss of every step, faintly, and its running mean.

    Args:
        reference: ``[steps]``, with reference blocks.
        fused: ``[steps]``, with fused blocks.
        steps_per_epoch: what the horizontal axis is divided by; half of it is averaged over.
        title: above the axes.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.
    """
    figure = new_figure(7.0, 3.9)
    axis = figure.subplots()
    window = max(1, steps_per_epoch // 2)  # steps, centred
    # The second curve is thin and dashed, so that the first stays visible where they coincide.
    styles = (
        ("reference blocks", reference, REFERENCE_COLOUR, 4.0, "-"),
        ("fused blocks", fused, FUSED_COLOUR, 1.6, "--"),
    )
    for name, losses, colour, width, line in styles:
        epochs = torch.arange(1, len(losses) + 1) / steps_per_epoch
        axis.plot(epochs, losses, color=colour, alpha=0.25, linewidth=width / 3)
        means = losses.double().unfold(0, window, 1).mean(1)
        centres = epochs[(window - 1) // 2 :][: len(means)]
        axis.plot(centres, means, color=colour, linewidth=width, linestyle=line, label=name)
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss (smoothed labels)")
    axis.set_xlim(0, len(reference) / steps_per_epoch)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title(title, fontsize=11)
    return figure


def draw_fields(fields: Mapping[str, Tensor]) -> "Figure":
    """Draw what the centre depends on after one block and after two."""
    return draw_receptive_fields(fields, "What the centre pixel depends on")
