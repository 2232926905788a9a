"""What a student's weights are held to while it is trained."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from kd_recipes.compression.form import Form


class Constraint(ABC):  # noqa: B024 -- every hook has a default: a constraint needs but some of them
    """What a section of ``student_constraints:`` describes."""

    def check(self, form: Form) -> None:  # noqa: B027
        """Compare with the student, before its weights are loaded.

        Raises:
            ConfigError: the constraint does not fit it; keys begin with a dot.
        """

    def attach(self, model: nn.Module) -> Mapping[str, Any]:
        """Change how a model computes, once its weights are loaded and before they are split.

        Returns:
            Name of a parameter -> the scheme that it is written in, for those that become codes.
        """
        return {}

    @contextmanager
    def update(self, parameters: Mapping[str, Tensor], step: int, num_steps: int) -> Iterator[None]:
        """Wrap an update of the weights.

        Args:
            parameters: those that are trained, by name.
            step: the update's number, from 1.
            num_steps: of the whole run.
        """
        yield

    def is_reached(self, step: int, num_steps: int) -> bool:
        """Whether the student is after ``step`` updates what it is to be in the end: one before that is no result."""
        return True

    def describe(self) -> dict[str, Any]:
        """Its name and settings, as ``compression.json`` has them."""
        settings = OmegaConf.to_container(OmegaConf.create(vars(self)), resolve=True)
        return {"constraint": type(self).__name__, **settings}  # type: ignore[dict-item]

    def metrics(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """What a curve should show of it."""
        return {}
