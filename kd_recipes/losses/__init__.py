"""Losses: pure functions of tensors, and the classes that hold their settings."""

from kd_recipes.losses.build import build_divergence, build_feature_terms, choose_objective
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
from kd_recipes.losses.features import AttentionRelations, FeatureTerm, FeatureTerms, HiddenStates
from kd_recipes.losses.objective import QUALITIES, LossSum, Objective
from kd_recipes.losses.torchtune_losses import TorchtuneObjective

__all__ = [
    "QUALITIES",
    "AdaptiveKL",
    "AlphaBeta",
    "AttentionRelations",
    "Differentiated",
    "Distributions",
    "Divergence",
    "FeatureTerm",
    "FeatureTerms",
    "ForwardKL",
    "HiddenStates",
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
    "build_feature_terms",
    "choose_objective",
]
