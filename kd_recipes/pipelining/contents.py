"""What a step's result depends on, as one key: its recipe, its config, and the content of what the config names."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kd_recipes import __version__
from kd_recipes.storage import atomic_file, write_json

_WRITTEN = ("output_dir", "log_dir", "cache_dir")  # keys of what is written, and says nothing of what comes out
# Recipes of which a config has more than they look at: a teacher need not be asked again for another learning rate.
_LOOKED_AT = {
    "cache_teacher": (
        *("teacher", "teacher_model", "teacher_checkpointer", "teacher_dtype", "dtype", "tokenizer", "batch_size"),
        *("dataset", "eval_dataset", "temperature", "teacher_temperature", "check", "num_checked_batches"),
    )
}


class Contents:
    """SHA-256 of files; each is read once, and again when its size or time of change is another.

    Args:
        file: where they are remembered, in the pipeline's directory.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._pipeline = os.path.realpath(file.parent)
        try:
            self._known: dict[str, list[Any]] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> dict[str, str]:
        """Of a file, whatever its name, or of all files in a directory but hidden ones, by their names there.

        Of a directory that holds the pipeline's, the files that are not the pipeline's.
        """
        files = [path] if path.is_file() else sorted(self._inside(path))
        unread = [file for file in files if self._known.get(str(file.absolute()), [None])[:2] != _stamp(file)]
        if unread:
            with tqdm(desc="hash", total=_num_bytes(unread), unit="B", unit_scale=True, leave=False, delay=2) as bar:
                for file in unread:
                    self._known[str(file.absolute())] = [*_stamp(file), _sha256(file)]
                    bar.update(file.stat().st_size)
            self._save()
        return {file.relative_to(path).as_posix(): self._known[str(file.absolute())][2] for file in files}

    def named(self, text: str) -> list[Path]:
        """The files and directories that a text is the path of, or a pattern for; none where it is something else.

        A pattern finds what steps of this pipeline write only if it begins in a step's directory.
        """
        if os.path.exists(text):  # not Path.exists, which raises where a text is too long for a path
            return [Path(text)]
        if not glob.has_magic(text) or "\0" in text:
            return []
        found = map(Path, sorted(glob.glob(text, recursive=True)))
        finds_steps = _is_inside(_beginning(text), self._pipeline)
        return [path for path in found if finds_steps or not _is_inside(path, self._pipeline)]

    def _inside(self, directory: Path) -> Iterator[Path]:
        for root, names, files in os.walk(directory):
            if os.path.realpath(root) == self._pipeline:
                names.clear()
                continue
            names[:] = [name for name in names if not name.startswith(".")]
            found = (Path(root, name) for name in files if not name.startswith("."))
            yield from (file for file in found if file.is_file() and os.access(file, os.R_OK))

    def _save(self) -> None:
        self._known = {name: entry for name, entry in self._known.items() if os.path.exists(name)}
        with atomic_file(self._file) as new:
            write_json(new, self._known)


def _is_inside(path: Path, directory: str) -> bool:
    found = os.path.realpath(path)
    return found != directory and Path(found).is_relative_to(directory)


def _beginning(pattern: str) -> Path:
    return Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _num_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def step_key(recipe: str, config: Mapping[str, Any], directory: Path, contents: Contents) -> str:
    """Another one where a step's result would be another one.

    Args:
        recipe: its name.
        config: without references.
        directory: that it writes to; paths in it are its own.
        contents: of files.
    """
    seen = _LOOKED_AT.get(recipe, config)
    asked = _content({name: value for name, value in config.items() if name in seen}, directory, contents)
    described = json.dumps([__version__, recipe, asked], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _content(node: Any, directory: Path, contents: Contents) -> Any:
    """Settings with the content of files in the place of their paths."""
    if isinstance(node, dict):
        return {key: _content(value, directory, contents) for key, value in node.items() if key not in _WRITTEN}
    if isinstance(node, list):
        return [_content(value, directory, contents) for value in node]
    if not isinstance(node, str):
        return node
    path = Path(os.path.abspath(node))
    own = Path(os.path.abspath(directory))
    if path.is_relative_to(own):
        return ["own", path.relative_to(own).as_posix()]
    if path == Path(path.anchor):  # `separator: /` is not all that the machine has
        return node
    return [contents.of(found) for found in contents.named(node)] or node
