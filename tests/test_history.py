"""A run's history: lines that survive a kill, and are forgotten where the run goes back."""

from __future__ import annotations

import math
from pathlib import Path

from kd_recipes.history import History


def test_what_is_appended_is_read_in_order(tmp_path: Path) -> None:
    history = History(tmp_path / "run")
    history.append(1, "train", {"loss/total": 2.5, "bad": math.nan})
    history.append(2, "held_out", {"kl": 0.5})
    history.append(2, "samples", {"samples": [{"student": "á\n|"}]})
    steps = [(entry.step, entry.split) for entry in history.read()]
    assert steps == [(1, "train"), (2, "held_out"), (2, "samples")]
    assert next(history.read("train")).values == {"loss/total": 2.5, "bad": None}
    assert next(history.read("samples")).values == {"samples": [{"student": "á\n|"}]}


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.append(1, "train", {"loss/total": 2.5})
    history.append(2, "train", {"loss/total": 2.4})
    whole = history.path.read_text()
    history.path.write_text(whole[:-10])
    assert [entry.step for entry in history.read()] == [1]


def test_a_run_that_goes_back_forgets(tmp_path: Path) -> None:
    history = History(tmp_path)
    for step in (1, 2, 3):
        history.append(step, "train", {"loss/total": float(step)})
    history.rewind(2)
    history.append(3, "train", {"loss/total": 30.0})
    assert [entry.values["loss/total"] for entry in history.read("train")] == [1.0, 2.0, 30.0]


def test_no_history_is_an_empty_one(tmp_path: Path) -> None:
    history = History(tmp_path / "none")
    history.rewind(0)
    assert list(history.read()) == []
    assert not history.path.exists()
