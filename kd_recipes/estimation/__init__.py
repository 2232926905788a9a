"""What a distillation will take, known before it runs: memory, disk, time, and whether its parts fit each other."""

from kd_recipes.estimation.report import Report, examine, render

__all__ = ["Report", "examine", "render"]
