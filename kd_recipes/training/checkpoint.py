"""What a run leaves in its output directory, and how it finds its way back in.

run.yaml                     the config that made the run; its presence says that a run lives here
checkpoints/step_00000120/   everything that resuming needs: weights, optimizer, random state, data position
best/  final/                students, in the form of the checkpoint that the student was loaded from
logs/                        what the metric logger writes
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.storage import atomic_directory

_WEIGHTS, _STATE, _CONFIG = "weights.safetensors", "state.pt", "run.yaml"


class RunDirectory:
    """The output directory of a run.

    Args:
        path: where it is, or will be.
        keep_last_n: how many checkpoints to keep.
    """

    def __init__(self, path: Path, keep_last_n: int = 2) -> None:
        self.path = path
        self._keep_last_n = keep_last_n

    @property
    def is_occupied(self) -> bool:
        """Whether a run lives here."""
        return (self.path / _CONFIG).exists()

    def open(self, cfg: DictConfig) -> None:
        """Make the directory and record the config, interpolations unresolved."""
        self.path.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, self.path / _CONFIG)

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    def save(self, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; only when it is whole are older ones deleted."""
        with atomic_directory(self.path / "checkpoints" / f"step_{step:08d}") as directory:
            save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, directory / _WEIGHTS)
            torch.save(state, directory / _STATE)
        for old in self.checkpoints()[: -self._keep_last_n]:
            shutil.rmtree(old)

    def load(self, name: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read a checkpoint: the newest, or the one named (a path, absolute or from this directory).

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        found = self.checkpoints()
        if name is None and not found:
            remedy = "Set resume_from_checkpoint: False to start anew, or save_every_n_steps to have checkpoints"
            raise ConfigError(Problem("resume_from_checkpoint", True, f"a checkpoint in {self.path}", remedy))
        directory = self.path / name if name is not None else found[-1]
        try:
            return load_file(directory / _WEIGHTS), torch.load(directory / _STATE, weights_only=True)
        except Exception as error:  # truncated, missing, not a checkpoint: each library has its own exceptions
            remedy = f"Delete it to resume from the one before: {[path.name for path in found]}"
            raise ConfigError(
                Problem("resume_from_checkpoint", str(directory), f"readable ({error})", remedy)
            ) from error


def random_state() -> dict[str, Any]:
    """The state of every generator that a run draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Take :func:`random_state` back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
