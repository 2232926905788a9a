"""What an export's directory holds: the files that export has put there, what they are made of, how they compare.

What is not listed, or not as it was written, may be somebody's work: it is moved aside, never removed. What is of
another student stays until its successor is whole, or, where none is asked for, all that is asked for is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.exporting.formats import FORMATS, Format
from kd_recipes.storage import atomic_file, clean_stale, require_vacant, write_json

_TABLE = "export.md"
_RECORD = "export.json"
Stamps = dict[str, list[int]]


@dataclass
class Record:
    """The record of a directory; see :meth:`read`. It is changed by its methods alone.

    Args:
        output_dir: the directory.
        made_of: what decides what is in a file: the student and some settings.
        asked: what decides what is measured.
        files: format -> size and time of change (ns) of each file that was written.
        stale: the same of files that are made of something else.
        results: format, or ``student`` -> what was measured.
    """

    output_dir: Path
    made_of: Mapping[str, Any]
    asked: Mapping[str, Any]
    files: dict[str, Stamps]
    stale: dict[str, Stamps]
    results: dict[str, Any]

    @classmethod
    def read(cls, output_dir: Path, made_of: Mapping[str, Any], asked: Mapping[str, Any]) -> Record:
        """The record that lies in a directory, or of a new one; nothing is changed.

        Raises:
            ConfigError: the directory holds other things.
        """
        made_of, asked = json.loads(json.dumps([made_of, asked]))
        path = output_dir / _RECORD
        if not path.is_file():
            require_vacant(output_dir)
            return cls(output_dir, made_of, asked, {}, {}, {})
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            is_same, results = found["made_of"] == made_of, dict(found["formats"])
            # those of early versions do not list files, nor what was asked
            files, stale = (_known(found.get(key, {})) for key in ("files", "stale"))
            is_asked = found.get("asked") == asked
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "Choose another directory, or remove what is in this one"
            raise ConfigError(Problem("output_dir", str(path), "the record of an export", remedy)) from error
        if not is_same:
            return cls(output_dir, made_of, asked, {}, {**stale, **files}, {})
        return cls(output_dir, made_of, asked, files, stale, results if is_asked else {})

    def settle(self) -> None:
        """Remove what a killed export has left, and forget files that are not as they were written.

        The record of another student stays as it is until there is a file of this one: had somebody mistyped its
        directory, all is as it was.
        """
        for form in FORMATS.values():
            clean_stale(self._path(form), ("tmp", "old", "scratch"))
        for form in [FORMATS[name] for name in self.files]:
            if not self.holds(form):
                self.files.pop(form.name)
                self.results.pop(form.name, None)
        if self.files or not self.stale:
            self.save()  # so that what a first format has begun is known to be ours

    def holds(self, form: Format) -> bool:
        """Whether a format's file is there, as it was written."""
        return self._is(form, self.files)

    def make_room(self, form: Format) -> Path:
        """Where a format's file goes: over one of another student, while what somebody has put there is moved aside."""
        path = self._path(form)
        if os.path.lexists(path) and not self._is_to_go(form):
            free = (path.with_name(f"{path.name}.kept-{number}") for number in count(1))
            kept = next(other for other in free if not os.path.lexists(other))
            path.rename(kept)
            tqdm.write(f"{path} is not as export has written it: kept as {kept.name}")
        return path

    def add(self, form: Format) -> None:
        """List a format's file, which has just been written."""
        self.files[form.name] = _stamps(self._path(form))
        self.stale.pop(form.name, None)
        self.save()

    def measure(self, form: Format, found: Mapping[str, Any], student: Mapping[str, Any]) -> None:
        """Keep what was measured of a format's file, and of the student."""
        self.results |= {form.name: dict(found), "student": dict(student)}
        self.save()

    def finish(self, table: str) -> None:
        """Remove files of another student that none of this one has replaced, say which, and write the table."""
        for form in [FORMATS[name] for name in self.stale]:
            path = self.make_room(form)
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                tqdm.write(f"{path} removed: it is of another student, max_seq_len or version of kd_recipes")
            self.stale.pop(form.name)
        self.save()
        (self.output_dir / _TABLE).write_text(table + "\n", encoding="utf-8")

    def save(self) -> None:
        """Write the record; a table that is not of what it says goes."""
        if not self.results:
            (self.output_dir / _TABLE).unlink(missing_ok=True)
        written = {"files": self.files, "stale": self.stale, "formats": self.results}
        with atomic_file(self.output_dir / _RECORD) as new:
            write_json(new, {"made_of": self.made_of, "asked": self.asked, **written})

    def _path(self, form: Format) -> Path:
        return self.output_dir / form.path

    def _is(self, form: Format, listed: Mapping[str, Stamps]) -> bool:
        path = self._path(form)
        return path.exists() and listed.get(form.name) == _stamps(path)

    def _is_to_go(self, form: Format) -> bool:
        """Whether what is there is of another student, and where export has written it, not moved and linked to."""
        return self._is(form, self.stale) and not self._path(form).is_symlink()


def _known(files: Mapping[str, Stamps]) -> dict[str, Stamps]:
    return {name: dict(stamps) for name, stamps in files.items() if name in FORMATS}


def files_of(path: Path) -> list[Path]:
    """The files of a format: those in a directory, or the one that it is."""
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def _stamps(path: Path) -> Stamps:
    found = {file.relative_to(path).as_posix(): file.stat() for file in files_of(path)}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
