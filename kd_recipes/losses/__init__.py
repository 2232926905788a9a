"""Losses: pure functions of tensors, and the classes that hold their settings."""

from kd_recipes.losses.divergences import Distributions, Divergence, ForwardKL
from kd_recipes.losses.objective import LossSum, Objective
from kd_recipes.losses.torchtune_losses import TorchtuneObjective, choose_objective

__all__ = ["Distributions", "Divergence", "ForwardKL", "LossSum", "Objective", "TorchtuneObjective", "choose_objective"]
