"""Evaluation: what a model is worth, alone and beside its teacher."""

from kd_recipes.evaluation.held_out import HeldOut, evaluate_held_out

__all__ = ["HeldOut", "evaluate_held_out"]
