"""The student that a checkpoint holds, as one directory in the form of the checkpoint that it was loaded from.

A run writes its best and its last student by itself; this is for those between, and for a run that was given up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from kd_recipes.config import load_and_validate
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.history import CONFIG
from kd_recipes.parts import load_model
from kd_recipes.storage import atomic_directory, require_vacant
from kd_recipes.students import Student
from kd_recipes.training.checkpoint import WEIGHTS, RunDirectory
from kd_recipes.training.precision import DTYPES
from kd_recipes.training.sharded import read_tensors


def consolidate(run: Path, checkpoint: str | None, output: Path | None, *, trusts_all: bool = False) -> Path:
    """Write the student of a run's checkpoint, whichever number of processes saved it.

    Args:
        run: the ``output_dir`` of a distillation.
        checkpoint: a directory in its ``checkpoints``, by name; the newest that is whole if None.
        output: the directory to write; by default one of the checkpoint's name in ``students`` of the run.
        trusts_all: whether the run's config may name any code.

    Returns:
        The directory written.

    Raises:
        ConfigError: there is no such run or checkpoint, it is damaged, or ``output`` has something in it.
    """
    file = run / CONFIG
    if not file.is_file():
        raise ConfigError(Problem("RUN", str(run), f"the output_dir of a distillation, with its {file.name}"))
    cfg = load_and_validate(str(file), [], "distill", trusts_all=trusts_all)
    if not RunDirectory(run).checkpoints():
        raise ConfigError(Problem("RUN", str(run), "a run that has saved a checkpoint"))
    directory = RunDirectory(run).find(checkpoint, key="--checkpoint")
    output = output or run / "students" / directory.name
    require_vacant(output, key="--output")
    student = _student(cfg)
    parameters = student.trainable()
    try:
        read_tensors(directory, {f"{WEIGHTS}{name}": parameter for name, parameter in parameters.items()}, None)
    except (KeyError, ValueError) as error:
        raise ConfigError(Problem("RUN", str(run), "a checkpoint of the model in its run.yaml", str(error))) from error
    with atomic_directory(output) as temporary:
        student.export(student.model.state_dict(), temporary, adapter_only=cfg.save_adapter_weights_only)
    return output


def _student(cfg: DictConfig) -> Student:
    dtype = torch.float32 if cfg.master_weights else DTYPES[cfg.dtype]
    loaded = load_model("model", cfg.model, cfg.checkpointer, dtype=dtype, device=torch.device("cpu"))
    export_dtype = DTYPES.get(cfg.export_dtype, loaded.file_dtype)
    return Student(loaded.model, cfg.model, loaded.checkpointer, export_dtype=export_dtype)
