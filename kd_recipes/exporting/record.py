"""What an export's directory holds: the files that export has put there, what they are made of, how they compare.

What is not listed, or not as it was written, may be somebody's work: it is moved aside, never removed.
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

TABLE = "export.md"
_RECORD = "export.json"
Stamps = dict[str, list[int]]


@dataclass(frozen=True)
class Record:
    """The record of a directory; see :meth:`read`.

    Args:
        output_dir: the directory.
        made_of: what decides what is in a file: the student and some settings.
        asked: what decides what is measured.
        files: format -> size and time of change (ns) of each file that was written.
        results: format, or ``student`` -> what was measured.
        is_stale: whether ``files`` are made of something else.
    """

    output_dir: Path
    made_of: Mapping[str, Any]
    asked: Mapping[str, Any]
    files: dict[str, Stamps]
    results: dict[str, Any]
    is_stale: bool

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
            return cls(output_dir, made_of, asked, {}, {}, is_stale=False)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            files: dict[str, Stamps] = {name: found["files"][name] for name in found["files"] if name in FORMATS}
            is_stale, is_asked = found["made_of"] != made_of, found["asked"] == asked
            results = dict(found["formats"]) if is_asked and not is_stale else {}
        except (ValueError, KeyError, TypeError) as error:
            remedy = "Choose another directory, or remove what is in this one"
            raise ConfigError(Problem("output_dir", str(path), "the record of an export", remedy)) from error
        return cls(output_dir, made_of, asked, files, results, is_stale)

    def settle(self) -> None:
        """Remove files that are made of something else, and what a killed export has left; say what is removed."""
        for form in FORMATS.values():
            clean_stale(self._path(form), ("tmp", "old", "scratch"))
        for form in [FORMATS[name] for name in self.files]:
            if self.is_stale:
                self._remove(form)
            elif not self.holds(form):
                self.files.pop(form.name)
                self.results.pop(form.name, None)
        if not self.results:
            (self.output_dir / TABLE).unlink(missing_ok=True)
        self.save()  # so that what a first format has begun is known to be ours

    def holds(self, form: Format) -> bool:
        """Whether a format's file is there, as it was written."""
        path = self._path(form)
        return path.exists() and self.files.get(form.name) == _stamps(path)

    def make_room(self, form: Format) -> Path:
        """Where a format's file goes; what somebody else has put there is moved aside."""
        path = self._path(form)
        if os.path.lexists(path):
            free = (path.with_name(f"{path.name}.kept-{number}") for number in count(1))
            kept = next(other for other in free if not os.path.lexists(other))
            path.rename(kept)
            tqdm.write(f"{path} is not as export has written it: kept as {kept.name}")
        return path

    def add(self, form: Format) -> None:
        """List a format's file, which has just been written."""
        self.files[form.name] = _stamps(self._path(form))
        self.save()

    def save(self) -> None:
        """Write the record."""
        written = {"made_of": self.made_of, "asked": self.asked, "files": self.files, "formats": self.results}
        with atomic_file(self.output_dir / _RECORD) as new:
            write_json(new, written)

    def _path(self, form: Format) -> Path:
        return self.output_dir / form.path

    def _remove(self, form: Format) -> None:
        if self.holds(form):
            path = self._path(form)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            tqdm.write(f"{path} removed: it is of another student, max_seq_len or version of kd_recipes")
        else:
            self.make_room(form)
        self.files.pop(form.name)


def files_of(path: Path) -> list[Path]:
    """The files of a format: those in a directory, or the one that it is."""
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def _stamps(path: Path) -> Stamps:
    found = {file.relative_to(path).as_posix(): file.stat() for file in files_of(path)}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
