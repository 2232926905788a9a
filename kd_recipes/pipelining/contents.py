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
# What a cache is known by: while these are the same it is added to, whatever the data.
_KNOWN_BY = (
    *("teacher", "teacher_model", "teacher_checkpointer", "teacher_dtype", "teacher_quantization", "dtype"),
    *("model", "tokenizer", "temperature", "teacher_temperature"),
)
_ADDS = {"cache_teacher": _KNOWN_BY}
# Recipes of which a config has more than they look at: a teacher need not be asked again for another learning rate.
_LOOKED_AT = {
    "cache_teacher": (*_KNOWN_BY, "dataset", "eval_dataset", "batch_size", "check", "num_checked_batches"),
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

        Of a directory that holds the pipeline's, the files that are not the pipeline's. Files that may not be read are
        left out: whoever needs one says so.
        """
        files = [path] if os.path.isfile(path) else sorted(self._inside(path))
        files = [file for file in files if os.access(file, os.R_OK)]
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

        A pattern finds what steps of this pipeline write only if it begins in a step's directory. `*`, `**` and `?` are
        settings, as is whatever pattern has neither a `/` nor a suffix; so are `.` and `..` where the pipeline's
        directory lies below: what else lies there (logs of this very run, say) is nobody's input.
        """
        if os.path.exists(text):  # not Path.exists, which raises where a text is too long for a path
            is_around = text in (".", "..") and Path(self._pipeline).is_relative_to(os.path.realpath(text))
            return [] if is_around else [Path(text)]
        is_pattern = glob.has_magic(text) and "\0" not in text and ("/" in text or Path(text).suffix)
        if not is_pattern:
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
            yield from filter(os.path.isfile, found)  # not Path.is_file, which raises where a directory is closed

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
    return _key(recipe, _looked_at(config, _LOOKED_AT[recipe]) if recipe in _LOOKED_AT else config, directory, contents)


def adding_key(recipe: str, config: Mapping[str, Any], directory: Path, contents: Contents) -> str:
    """The same while a recipe adds to what it has left; an empty one for a recipe that never does.

    Args: as of :func:`step_key`.
    """
    if recipe not in _ADDS:
        return ""
    return _key(recipe, _looked_at(config, _ADDS[recipe]), directory, contents)


def _key(recipe: str, config: Mapping[str, Any], directory: Path, contents: Contents) -> str:
    described = json.dumps([__version__, recipe, _content(dict(config), directory, contents)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _looked_at(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those settings that a cache depends on; of its student the number of ids alone."""
    seen = {name: config[name] for name in names if name in config}
    if isinstance(model := seen.get("model"), Mapping):  # adapters and layers are nothing to the teacher
        seen["model"] = model.get("vocab_size") or model  # a builder that is not told it has one of its own
    return seen


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
