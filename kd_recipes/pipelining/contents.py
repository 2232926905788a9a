"""What a step's result depends on, as one key: its recipe, its config, and the content of what the config names."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
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
        file: where they are remembered.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._known: dict[str, list[Any]] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> dict[str, str]:
        """Of a file, whatever its name, or of all files in a directory but hidden ones, by their names there."""
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _counts(file, path))
        unread = [file for file in files if self._known.get(str(file.absolute()), [None])[:2] != _stamp(file)]
        if unread:
            with tqdm(desc="hash", total=_num_bytes(unread), unit="B", unit_scale=True, leave=False, delay=2) as bar:
                for file in unread:
                    self._known[str(file.absolute())] = [*_stamp(file), _sha256(file)]
                    bar.update(file.stat().st_size)
            self._save()
        return {file.relative_to(path).as_posix(): self._known[str(file.absolute())][2] for file in files}

    def _save(self) -> None:
        self._known = {name: entry for name, entry in self._known.items() if os.path.exists(name)}
        with atomic_file(self._file) as new:
            write_json(new, self._known)


def _counts(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


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
    if not isinstance(node, str) or not ("/" in node or Path(node).suffix):  # `source: json` is no directory
        return node
    path = Path(os.path.abspath(node))
    own = Path(os.path.abspath(directory))
    if path.is_relative_to(own):
        return ["own", path.relative_to(own).as_posix()]
    if own.is_relative_to(path):  # which holds what it writes
        return node
    found = sorted(glob.glob(node)) if "*" in node else [node] if path.exists() else []
    return [contents.of(Path(name)) for name in found] or node
