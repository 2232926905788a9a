"""What a run leaves in its output directory, and how it finds its way back in.

run.yaml                     the config that made the run; its presence says that a run lives here
checkpoints/step_00000120/   everything that resuming needs: weights and the optimizer's moments (safetensors, each
                             process its part), random state, data position (state.pt); and a manifest of its files'
                             SHA-256, by which damage is known
best/  final/                students, in the form of the checkpoint that the student was loaded from
logs/                        what the metric logger writes
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.storage import atomic_directory, damage, describe_files, explain_disk_errors, write_manifest
from kd_recipes.training.parallel import Parallel
from kd_recipes.training.sharded import Staging, is_writable, write_tensors

CONFIG = "run.yaml"
_STATE = "state.pt"
_RESULTS = ("checkpoints", "best", "final")


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
        """Whether a run lives here, or something that one would write over."""
        return any((self.path / name).exists() for name in (CONFIG, *_RESULTS))

    def goes_on(self, resume: bool | str) -> bool:
        """Whether a run with this ``resume_from_checkpoint`` goes on with the one that is here."""
        return bool(self.checkpoints()) if resume == "auto" else bool(resume)

    def may_begin_anew(self, resume: bool | str) -> bool:
        """Whether what is here is a run of which nothing has been saved, and which it is left to us to begin again."""
        return resume == "auto" and (self.path / CONFIG).is_file() and not self.checkpoints()

    @property
    def results(self) -> list[Path]:
        """The directories that a run writes anew as it goes on."""
        return [self.path / name for name in _RESULTS]

    def open(self, cfg: DictConfig) -> None:
        """Make the directory and record the config, interpolations unresolved."""
        with explain_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            new = self.path / f".{CONFIG}.new"
            OmegaConf.save(cfg, new)
            os.replace(new, self.path / CONFIG)  # a full disk must not empty the one of the run that goes on

    @property
    def recorded_dtype(self) -> str | None:
        """The ``dtype`` that the run computes in, as :meth:`open` recorded it."""
        file = self.path / CONFIG
        cfg = OmegaConf.load(file) if file.is_file() else None
        return cfg.get("dtype") if isinstance(cfg, DictConfig) else None

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], parallel: Parallel) -> None:
        """Write a checkpoint, each process its part of the tensors, the main process the rest.

        Only when it is whole are others deleted: older ones, and those of later steps: a run that went back to an
        earlier step takes another way from there, and later steps are not of it.

        Args:
            step: its number.
            tensors: by name; split over the processes, or alike in all of them.
            state: everything else, of the main process.
            parallel: the processes, in a group of their own if others of their threads talk meanwhile.
        """
        new = self.path / "checkpoints" / f"step_{step:08d}"
        with ExitStack() as stack:
            directory = parallel.on_main(lambda: stack.enter_context(atomic_directory(new)))
            written = describe_files(directory, write_tensors(directory, tensors, parallel.group))
            entries = {name: entry for part in parallel.each(written) for name, entry in part.items()}
            parallel.on_main(lambda: _write_state(directory, state, entries))
            parallel.on_main(stack.pop_all().close)
        if parallel.is_main:
            self._delete_others(new)

    def _delete_others(self, new: Path) -> None:
        found = self.checkpoints()
        own = found[: found.index(new) + 1]
        for other in [*found[len(own) :], *own[: -self._keep_last_n]]:
            shutil.rmtree(other)

    def find(self, name: str | None = None) -> Path:
        """The newest checkpoint that is whole, or the one named (a path, absolute or from this directory).

        Raises:
            ConfigError: there is none, or the one named is damaged.
        """
        found = self.checkpoints()
        if name is None and not found:
            remedy = "Set resume_from_checkpoint=False to start anew"
            if self.is_occupied:
                remedy = f"The run stopped before it saved one: delete {self.path}, and start anew without resuming"
            raise ConfigError(Problem("resume_from_checkpoint", True, f"a checkpoint in {self.path}", remedy))
        candidates = found[::-1] if name is None else [self.path / name]
        damages: list[str] = []
        for directory in candidates:
            why = damage(directory)
            if why is None:
                return directory
            damages.append(why)
        raise self._damaged(candidates[0], damages[0])

    def load(self, name: str | None = None) -> tuple[Path, dict[str, Any]]:
        """The checkpoint that :meth:`find` finds, and what is in it besides tensors.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        directory = self.find(name)
        newest = self.checkpoints()[-1:]
        if name is None and directory not in newest:
            print(f"{newest[0]} is damaged; going on from {directory.name}", file=sys.stderr)
        try:
            return directory, torch.load(directory / _STATE, weights_only=True)
        except Exception as error:  # each library has its own exceptions for a file that is not its
            raise self._damaged(directory, one_line(error)) from error

    def _damaged(self, directory: Path, why: str) -> ConfigError:
        others = [path.name for path in self.checkpoints() if path != directory]
        remedy = f"Delete it, or name another; others here: {others or 'none'}"
        return ConfigError(
            Problem("resume_from_checkpoint", str(directory), f"a checkpoint that is whole ({why})", remedy)
        )


def _write_state(directory: Path, state: dict[str, Any], entries: Mapping[str, Any]) -> None:
    with (directory / _STATE).open("wb") as file:  # given a path, torch.save does not say that the disk is full
        torch.save(state, file)
    write_manifest(directory, entries)


class Background:
    """Lets one task at a time go on beside the training; or, if it is not ``enabled``, does it at once."""

    def __init__(self, *, enabled: bool) -> None:
        self._staging = Staging() if enabled else None
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._task: Future[None] | None = None

    def save(self, save: Callable[..., None], step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Call ``save(step, tensors, state)``, when the one before is through.

        Raises:
            Exception: what the one before has raised.
        """
        self.wait()
        if self._staging is None:
            save(step, tensors, state)
        else:
            copies = self._staging.copy(tensors), copy.deepcopy(state)
            self._task = self._executor.submit(save, step, *copies)

    def wait(self) -> None:
        """Until nothing is under way.

        Raises:
            Exception: what the task has raised.
        """
        task, self._task = self._task, None
        if task is not None:
            task.result()


# -------------------------------------------------------------------------------------------- optimizers, as tensors
_OPTIMIZER = "optimizer."


def split_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors with names, and what is left of its ``state_dict``.

    Args:
        optimizer: of parameters with these names, in this order.
        names: of its parameters.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest = {}
    for index, entries in state["state"].items():
        is_tensor = {key: isinstance(value, Tensor) and is_writable(value) for key, value in entries.items()}
        tensors |= {f"{_OPTIMIZER}{names[index]}.{key}": entries[key] for key in entries if is_tensor[key]}
        rest[index] = {key: value for key, value in entries.items() if not is_tensor[key]}
    return tensors, {**state, "state": rest}


def allocate_optimizer(
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]], parameters: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Room for what :func:`split_optimizer` took apart: the tensors, to be read into, and a ``state_dict`` with them.

    Args:
        shapes: of the tensors that were saved.
        parameters: of the optimizer; what has a parameter's shape is split as it is.
        rest: what was left of the ``state_dict``.
    """
    tensors: dict[str, Tensor] = {}
    state = {index: dict(entries) for index, entries in rest["state"].items()}
    for index, (name, parameter) in enumerate(parameters.items()):
        prefix = f"{_OPTIMIZER}{name}."
        for saved in (saved for saved in shapes if saved.startswith(prefix) and "." not in saved[len(prefix) :]):
            shape, dtype = shapes[saved]
            is_alike = shape == parameter.shape
            tensor = torch.zeros_like(parameter, dtype=dtype) if is_alike else torch.zeros(shape, dtype=dtype)
            tensors[saved] = state.setdefault(index, {})[saved[len(prefix) :]] = tensor.detach()
    return tensors, {**rest, "state": state}


def load_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, state: Mapping[str, Any]) -> None:
    """Take back what an optimizer had gathered; its settings stay the config's: a run can go on at another rate.

    Where the config is the one that was saved, this is ``load_state_dict`` of both.

    Args:
        optimizer: as the config builds it.
        scheduler: of the learning rate; None without.
        state: of a checkpoint: ``optimizer`` and ``scheduler``.

    Raises:
        ValueError: it is another optimizer's.
    """
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        if missing := settings.keys() - group.keys():
            raise ValueError(f"the optimizer that was saved has no {', '.join(sorted(missing))}")
        if scheduler is not None and settings["initial_lr"] == group["initial_lr"]:
            settings["lr"] = group["lr"]
        elif scheduler is not None:  # schedules multiply the initial rate by a factor, which is kept
            settings["lr"] = group["lr"] * (settings["initial_lr"] / group["initial_lr"])
        group.update(settings)
    if scheduler is not None:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def random_state() -> dict[str, Any]:
    """The state of every generator that a run draws from, on this process's devices."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Take :func:`random_state` back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
