"""Sparse MLP networks in plain PyTorch: the block, its two networks, checkpoints and training."""

import logging

from smlp.block import SMLPBlock
from smlp.checkpoint import CheckpointError, LoadReport, load_checkpoint, paper_state_dict
from smlp.network import FeaturePyramid
from smlp.receptive_field import receptive_field
from smlp.resize import resize, resize_block
from smlp.smlpnet import SMLPNet, smlpnet_base, smlpnet_small, smlpnet_tiny
from smlp.sparse_mlp import SparseMLP

__all__ = [
    "CheckpointError",
    "FeaturePyramid",
    "LoadReport",
    "SMLPBlock",
    "SMLPNet",
    "SparseMLP",
    "load_checkpoint",
    "paper_state_dict",
    "receptive_field",
    "resize",
    "resize_block",
    "smlpnet_base",
    "smlpnet_small",
    "smlpnet_tiny",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
