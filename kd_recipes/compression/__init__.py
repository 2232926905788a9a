"""Make models smaller: which parts can go, and checkpoints without them."""

from kd_recipes.compression.checkpoint import HFCheckpoint, prune_depth_checkpoint, read_checkpoint
from kd_recipes.compression.depth import DepthPruning, block_influence, choose_blocks

__all__ = [
    "DepthPruning",
    "HFCheckpoint",
    "block_influence",
    "choose_blocks",
    "prune_depth_checkpoint",
    "read_checkpoint",
]
