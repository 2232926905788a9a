"""Losses: pure functions of tensors, and the classes that hold their settings."""

from kd_recipes.losses.build import build_divergence, choose_objective
from kd_recipes.losses.divergences import (
    AdaptiveKL,
    AlphaBeta,
    Differentiated,
    Distributions,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from kd_recipes.losses.objective import LossSum, Objective
from kd_recipes.losses.torchtune_losses import TorchtuneObjective

__all__ = [
    "AdaptiveKL",
    "AlphaBeta",
    "Differentiated",
    "Distributions",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LossSum",
    "Objective",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TorchtuneObjective",
    "TotalVariation",
    "build_divergence",
    "choose_objective",
]
