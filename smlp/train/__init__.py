"""Training sMLP networks: one process or many, on bundled images or an image folder."""

from smlp.train.config import TrainConfig
from smlp.train.loop import Summary, train

__all__ = ["Summary", "TrainConfig", "train"]
