"""One way of making a model smaller: from a checkpoint to a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.compression.form import Form
from kd_recipes.compression.stream import Text


class Step(ABC):
    """What a section of ``compress:`` describes."""

    @abstractmethod
    def check(self, form: Form) -> Form:
        """What the step leaves of a model of this form.

        Raises:
            ConfigError: it cannot do what it is asked for; keys begin with a dot.
        """

    @abstractmethod
    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """Do it.

        Args:
            source: the checkpoint to make smaller; it stays as it is.
            destination_dir: the directory to make.
            text: what the model is meant for.
        """

    def describe(self) -> dict[str, Any]:
        """Its name and settings, as ``compression.json`` has them."""
        settings = OmegaConf.to_container(OmegaConf.create(vars(self)), resolve=True)
        return {"step": type(self).__name__, **settings}  # type: ignore[dict-item]
