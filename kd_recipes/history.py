"""What a run has measured so far, one JSON object a line: for reports, searches and resumption, whatever logger it has.

A line is ``{"step": 15, "split": "held_out", "values": {"kl": 0.41, …}}``. ``split`` is ``train`` (of one step),
``held_out`` (of held-out text), ``health`` (of the student's behaviour beside the teacher's), ``alert`` (``values`` are
an alert's fields) or ``samples`` (texts).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE = "history.jsonl"
CONFIG = "run.yaml"  # beside it: the config that made the run
Split = Literal["train", "held_out", "health", "alert", "samples"]


@dataclass(frozen=True)
class Entry:
    """One line.

    Args:
        step: updates made when it was measured.
        split: what it is about.
        values: by name; numbers that are not finite are None.
    """

    step: int
    split: Split
    values: Mapping[str, Any]


class History:
    """The lines of a run's ``history.jsonl``.

    Args:
        directory: the run's ``output_dir``.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE

    def append(self, step: int, split: Split, values: Mapping[str, Any]) -> None:
        """Add a line; it is in the file when this returns."""
        line = json.dumps({"step": step, "split": split, "values": _finite(values)}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was measured after ``step`` updates, as a run that is resumed from there measures it again."""
        kept = [entry for entry in self.read() if entry.step <= step]
        if self.path.is_file():
            new = self.path.with_suffix(".part")
            new.write_text("".join(json.dumps(vars(e), ensure_ascii=False) + "\n" for e in kept), encoding="utf-8")
            new.replace(self.path)

    def read(self, *splits: Split) -> Iterator[Entry]:
        """The lines in order, of some splits or of all; a last one that was cut off is left out."""
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").split("\n"):  # splitlines() splits at U+2028 in a text, too
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):  # cut off in the middle
                continue
            if not splits or entry.split in splits:
                yield entry


def _finite(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
