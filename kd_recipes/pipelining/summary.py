"""What came of a pipeline's steps: a row for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_recipes.compression.checkpoint import lineage
from kd_recipes.errors import ConfigError
from kd_recipes.history import History
from kd_recipes.pipelining.plan import CONFIGS, Plan, Step
from kd_recipes.pipelining.records import Record, Records

_TEXTS = ("evaluation.md", "export.md", "sweep.md")  # what recipes say of their results
_PAGES = ("report.html", "sweep.html")
HEAD = ("step", "recipe", "", "time", "size", "what came of it")


@dataclass(frozen=True)
class Row:
    """One step.

    Args:
        name: of the step.
        recipe: its name; empty where it was left out.
        status: done, unchanged, cut off, not begun, or left out; earlier, where the pipeline did not get so far again.
        seconds: that it took.
        num_bytes: of what others take of it.
        said: its figures, in words.
        text: what it says of its result, in Markdown.
        page: what there is to look at, from the pipeline's directory.
        config: its config, as YAML.
        record: of the step.
    """

    name: str
    recipe: str = ""
    status: str = "left out"
    seconds: float = 0.0
    num_bytes: int = 0
    said: str = ""
    text: str = ""
    page: str = ""
    config: str = ""
    record: Record | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """As :data:`HEAD` names them."""
        minutes, seconds = divmod(round(self.seconds), 60)
        time = f"{minutes}:{seconds:02}" if self.seconds else ""
        size = f"{self.num_bytes / 1e6:,.1f} MB" if self.num_bytes else ""
        return self.name, self.recipe, self.status, time, size, self.said


def summarize(plan: Plan, records: Records, found: Mapping[str, str]) -> Sequence[Row]:
    """A row for each step, in order; those that were left out come last.

    Args:
        plan: the pipeline.
        records: of its steps.
        found: what has become of those that the pipeline got to.
    """
    rows = [_row(plan, step, records.get(step.name), found.get(step.name, "earlier")) for step in plan.steps]
    return [*rows, *(Row(name) for name in plan.left_out)]


def _row(plan: Plan, step: Step, record: Record | None, status: str) -> Row:
    if record is None:
        return Row(step.name, step.recipe, "not begun")
    config = plan.directory / CONFIGS / f"{step.name}.yaml"
    written = config.read_text(encoding="utf-8") if config.is_file() else ""
    if not record.is_done:
        return Row(step.name, step.recipe, "cut off", record.seconds, config=written, record=record)
    place = step.directory / record.place
    text = next((file for name in _TEXTS if (file := step.directory / name).is_file()), None)
    page = next((name for name in _PAGES if (step.directory / name).is_file()), "")
    return Row(
        step.name,
        step.recipe,
        status,
        record.seconds,
        sum(file.stat().st_size for name in record.result if (file := place / name).is_file()),
        _said(step, place),
        text.read_text(encoding="utf-8") if text else "",
        f"{step.name}/{page}" if page else "",
        written,
        record,
    )


def _said(step: Step, place: Path) -> str:
    """Perplexity of held-out text before and after, where the recipe has measured it."""
    try:
        if step.recipe == "compress":
            figures = (lineage(place) or [{}])[-1].get("figures", {})
            return _change(figures.get("perplexity_before"), figures.get("perplexity_after"))
        before = next((entry.values["perplexity"] for entry in History(step.directory).read("held_out")), None)
        last = json.loads((place / "held_out.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, ConfigError):
        return ""
    return _change(before, last.get("perplexity"))


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"perplexity {before:.4g} → {after:.4g}"
