"""Trials for TensorBoard's HPARAMS page: a run each, with its held-out curves."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_recipes.history import History
from kd_recipes.searching.records import Record

_COLUMNS = ("perplexity", "kl", "agreement")


def write_hparams(directory: Path, records: Sequence[Record], trials: Path, metric: str) -> None:
    """Write them anew: what was searched, and under ``sweep/`` the held-out evaluation that a trial is compared by.

    Args:
        directory: for TensorBoard's ``--logdir``.
        records: of the trials.
        trials: where the trials are, with their histories.
        metric: that they are compared by.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    numbers = {key for key in records[0].values if all(_is_number(record.values[key]) for record in records)}
    for record in records:
        # every run has the same columns, of the same types: TensorBoard takes those of one for all
        values = {key: value if key in numbers else str(value) for key, value in record.values.items()}
        measured = {metric: record.metric, **{name: record.held_out.get(name) for name in _COLUMNS}}
        columns = {f"sweep/{name}": math.nan if value is None else value for name, value in measured.items()}
        with SummaryWriter(str(directory / record.name)) as writer:
            writer.add_hparams(values, columns, run_name=".", global_step=record.step)
            for entry in History(trials / record.name).read("held_out"):
                for name, value in entry.values.items():
                    if _is_number(value):
                        writer.add_scalar(f"held_out/{name}", value, entry.step)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
