"""What a run leaves in its output directory, and how it finds its way back in.

run.yaml                     the config that made the run; its presence says that a run lives here
checkpoints/step_00000120/   everything that resuming needs: weights and the optimizer's moments (safetensors, each
                             process its part), random state, data position (state.pt); and a manifest of its files'
                             SHA-256, by which damage is known
best/  final/                students, in the form of the checkpoint that the student was loaded from
logs/                        what the metric logger writes
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.history import CONFIG
from kd_recipes.storage import atomic_directory, damage, describe_files, explain_disk_errors, write_manifest
from kd_recipes.training.parallel import Parallel
from kd_recipes.training.sharded import Staging, is_writable, local_part, write_tensors

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

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any] | bytes, parallel: Parallel) -> None:
        """Write a checkpoint, each process its part of the tensors, the main process the rest.

        Only when it is whole are others deleted: older ones, and those of later steps: a run that went back to an
        earlier step takes another way from there, and later steps are not of it.

        Args:
            step: its number.
            tensors: by name; split over the processes, or alike in all of them.
            state: everything else, of the main process; a mapping, or what :func:`pack` made of it.
            parallel: the processes, in a group of their own if others of their threads talk meanwhile.
        """
        packed = state if isinstance(state, bytes) else pack(state)
        new = self.path / "checkpoints" / f"step_{step:08d}"
        with ExitStack() as stack:
            directory = parallel.on_main(lambda: stack.enter_context(atomic_directory(new)))
            written = describe_files(directory, write_tensors(directory, tensors, parallel.group))
            entries = {name: entry for part in parallel.each(written) for name, entry in part.items()}
            parallel.on_main(lambda: _write_state(directory, packed, entries))
            parallel.on_main(stack.pop_all().close)
        if parallel.is_main:
            self._delete_others(new)

    def _delete_others(self, new: Path) -> None:
        found = self.checkpoints()
        own = found[: found.index(new) + 1]
        for other in [*found[len(own) :], *own[: -self._keep_last_n]]:
            shutil.rmtree(other)

    def find(self, name: str | None = None, *, key: str = "resume_from_checkpoint") -> Path:
        """The newest checkpoint that is whole, or the one named: by its name, or a path, absolute or from here.

        Args:
            name: which one.
            key: the setting that asks for it, for the message.

        Raises:
            ConfigError: there is none, or the one named is damaged.
        """
        found = self.checkpoints()
        if name is None and not found:
            remedy = "Set resume_from_checkpoint=False to start anew"
            if self.is_occupied:
                remedy = f"The run stopped before it saved one: delete {self.path}, and start anew without resuming"
            raise ConfigError(Problem("resume_from_checkpoint", True, f"a checkpoint in {self.path}", remedy))
        by_name = {path.name: path for path in found}
        candidates = found[::-1] if name is None else [by_name.get(name, self.path / name)]
        if not candidates[0].is_dir():
            raise ConfigError(Problem(key, str(candidates[0]), f"a checkpoint that is there: {sorted(by_name)}"))
        damages: list[str] = []
        for directory in candidates:
            why = damage(directory)
            if why is None:
                if damages:
                    print(f"{candidates[0]} is damaged; going on from {directory.name}", file=sys.stderr)
                return directory
            damages.append(why)
        raise self._damaged(candidates[0], damages[0], key)

    def load(self, name: str | None = None) -> tuple[Path, dict[str, Any]]:
        """The checkpoint that :meth:`find` finds, and what is in it besides tensors.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        directory = self.find(name)
        try:
            return directory, torch.load(directory / _STATE, weights_only=True)
        except Exception as error:  # each library has its own exceptions for a file that is not its
            raise self._damaged(directory, one_line(error)) from error

    def _damaged(self, directory: Path, why: str, key: str = "resume_from_checkpoint") -> ConfigError:
        others = [path.name for path in self.checkpoints() if path != directory]
        remedy = f"Delete it, or name another; others here: {others or 'none'}"
        return ConfigError(Problem(key, str(directory), f"a checkpoint that is whole ({why})", remedy))


def pack(state: Mapping[str, Any]) -> bytes:
    """The state as it is now, whatever kinds of tensors are in it; to be read with ``weights_only``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write_state(directory: Path, packed: bytes, entries: Mapping[str, Any]) -> None:
    (directory / _STATE).write_bytes(packed)
    write_manifest(directory, entries)


class Background:
    """Saves checkpoints, one at a time, while the training goes on; or, if it is not ``enabled``, at once.

    Args:
        run: where they go.
        parallel: the processes, in a group of their own.
        enabled: whether to save beside the training.
    """

    def __init__(self, run: RunDirectory, parallel: Parallel, *, enabled: bool) -> None:
        self._run, self._parallel = run, parallel
        self._staging = Staging() if enabled else None
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._task: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """:meth:`RunDirectory.save`, when the one before is through.

        Raises:
            Exception: what the one before has raised.
        """
        self.wait()
        if self._staging is None:
            self._run.save(step, tensors, state, self._parallel)
        else:
            arguments = (step, self._staging.copy(tensors), pack(state), self._parallel)
            self._task = self._executor.submit(self._run.save, *arguments)

    def wait(self) -> None:
        """Until nothing is under way.

        Raises:
            Exception: what the task has raised.
        """
        task, self._task = self._task, None
        if task is not None:
            task.result()


# -------------------------------------------------------------------------------------------- optimizers, as tensors
WEIGHTS, _OPTIMIZER = "weights.", "optimizer."  # in a checkpoint, before the names of the parameters
_TAKEN = "keys of tensors"


def split_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors with names, and what is left of its ``state_dict``.

    Args:
        optimizer: of parameters with these names, in this order.
        names: of its parameters.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest, taken = {}, {}
    storages: set[int] = set()
    for index, entries in state["state"].items():
        taken[index] = [key for key, value in entries.items() if isinstance(key, str) and _is_own(value, storages)]
        tensors |= {f"{_OPTIMIZER}{names[index]}.{key}": entries[key] for key in taken[index]}
        rest[index] = {key: value for key, value in entries.items() if key not in taken[index]}
    return tensors, {**state, "state": rest, _TAKEN: taken}


def _is_own(value: Any, storages: set[int]) -> bool:
    """Whether a value is a tensor that can be written by itself: some optimizers share one among all parameters."""
    if not isinstance(value, Tensor) or not is_writable(value):
        return False
    storage = local_part(value).untyped_storage().data_ptr()
    is_own = storage == 0 or storage not in storages
    storages.add(storage)
    return is_own


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
        for key in rest[_TAKEN].get(index, ()):
            shape, dtype = shapes[f"{_OPTIMIZER}{name}.{key}"]
            is_alike = shape == parameter.shape
            tensor = torch.zeros_like(parameter, dtype=dtype) if is_alike else torch.zeros(shape, dtype=dtype)
            tensors[f"{_OPTIMIZER}{name}.{key}"] = state[index][key] = tensor.detach()
    return tensors, {"state": state, "param_groups": rest["param_groups"]}


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
