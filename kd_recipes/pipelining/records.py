"""What is known of the steps that have run: ``pipeline.json`` in the pipeline's directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.storage import atomic_file, write_json

FILE = "pipeline.json"


@dataclass(frozen=True)
class Record:
    """One step.

    Args:
        key: of what it was begun with.
        recipe: its name.
        adds_to: of what it may be added to; nothing where it is made anew.
        is_done: whether it has come to its end.
        seconds: that its attempts took, but for those that were killed.
        finished: when it came to its end.
        place: what others take of it, in its directory.
        result: SHA-256 of that, by file.
    """

    key: str
    recipe: str
    adds_to: str = ""
    is_done: bool = False
    seconds: float = 0.0
    finished: str = ""
    place: str = "."
    result: Mapping[str, str] = field(default_factory=dict)


class Records:
    """All steps' records; each change is on disk when it is made.

    Args:
        directory: of the pipeline.

    Raises:
        ConfigError: what is there cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._records: dict[str, Record] = {}
        if self._file.is_file():
            try:
                content = json.loads(self._file.read_text(encoding="utf-8"))
                self._records = {name: Record(**record) for name, record in content["steps"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                wanted = "a record of a pipeline's steps"
                remedy = f"Delete it, and steps run again; their directories are kept ({one_line(error)})"
                raise ConfigError(Problem("output_dir", str(self._file), wanted, remedy)) from error

    def get(self, name: str) -> Record | None:
        """Of a step; None where it was never begun."""
        return self._records.get(name)

    def begin(self, name: str, record: Record) -> None:
        """A step is about to run; one that goes on keeps its time."""
        old = self.get(name)
        goes_on = old is not None and old.key == record.key and not old.is_done
        self._put(name, replace(record, seconds=old.seconds if old and goes_on else 0.0))

    def add_seconds(self, name: str, seconds: float) -> None:
        """An attempt has ended."""
        old = self._records[name]
        self._put(name, replace(old, seconds=round(old.seconds + seconds, 1)))

    def finish(self, name: str, place: str, result: Mapping[str, str]) -> None:
        """A step has come to its end."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = replace(self._records[name], is_done=True, finished=now, place=place, result=dict(result))
        self._put(name, record)

    def _put(self, name: str, record: Record) -> None:
        self._records[name] = record
        with atomic_file(self._file) as new:
            write_json(new, {"steps": {name: asdict(record) for name, record in self._records.items()}})
