"""Make models smaller: which parts can go, and checkpoints without them."""

from kd_recipes.compression.checkpoint import (
    HFCheckpoint,
    prune_depth_checkpoint,
    read_checkpoint,
    rewrite_checkpoint,
)
from kd_recipes.compression.depth import DepthPruning, block_influence, choose_blocks
from kd_recipes.compression.width import WidthPruning, choose_width, collect_moments
from kd_recipes.compression.width_checkpoint import prune_width_checkpoint

__all__ = [
    "DepthPruning",
    "HFCheckpoint",
    "WidthPruning",
    "block_influence",
    "choose_blocks",
    "choose_width",
    "collect_moments",
    "prune_depth_checkpoint",
    "prune_width_checkpoint",
    "read_checkpoint",
    "rewrite_checkpoint",
]
