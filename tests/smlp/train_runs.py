"""A short run on real digits that the tests of training start from, and how to read its log."""

import csv
from pathlib import Path

from smlp.train import TrainConfig

SMALL = TrainConfig(
    model="smlpnet_small",  # drops paths at random: an exact continuation has to draw the same
    d_model=8,
    depth=(2, 1),
    epochs=2,
    batch_size=128,
    ema_decay=0.9,
    label_smoothing=0.1,
    clip_grad=1.0,
    progress=False,
    device="cpu",
)

TINY = "--d-model 4 --depth 1,1 --batch-size 256 --epochs 2 --device cpu"  # five steps an epoch


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]
