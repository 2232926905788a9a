"""Files and directories that are whole or absent: a run that is killed while it saves leaves what was there before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd_recipes.errors import ConfigError, Problem, RunError

_MANIFEST = "manifest.json"


class StorageError(RunError):
    """The disk is full, over quota, read-only or broken; what was whole before is whole still."""


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk's refusal to take what is written to ``path``, which each library words differently, into one error.

    Raises:
        StorageError: instead of what the block raised, where that came from the disk.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or not (reason := _disk_error(error)):
            raise
        raise StorageError(
            f"cannot write {path}: {reason}. What had been saved before is untouched. Make room and run it again; "
            "a distillation that has a checkpoint goes on from there with resume_from_checkpoint=True"
        ) from error


def _disk_error(error: BaseException | None) -> str | None:
    """What the operating system said, in this exception or one that led to it; None where it was not the disk."""
    text = str(error)
    while error is not None:
        # safetensors is written in Rust, and hands on the number in its text
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
        if number in _DISK_ERRORS:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    # torch.save, given a path, loses the number
    return "torch could not write all of a file (is the disk full?)" if "inline_container" in text else None


@contextmanager
def _unfinished(path: Path) -> Iterator[tuple[Path, Path]]:
    """Where ``path`` is, and a name beside it for this process alone; its parents are there, and no stale names."""
    path = Path(os.path.abspath(path))
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(path)
        yield path, path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that becomes ``path`` when the block succeeds.

    One writer per path and process. An existing ``path`` is replaced; after any exception it is as it was.
    What dead processes left beside it (``.<name>.tmp-<pid>``) is removed first.

    Args:
        path: the directory to make; its parents are created.

    Raises:
        StorageError: the disk refuses.
    """
    with _unfinished(path) as (target, temporary):
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _replace_directory(target, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that becomes ``path`` when the block succeeds; else it is as it was.

    Raises:
        StorageError: the disk refuses.
    """
    with _unfinished(path) as (target, temporary):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling of ``path`` for what is needed on the way to it; it is removed in any case.

    One user per path and process. What dead processes left beside it (``.<name>.scratch-<pid>``) is removed first.

    Raises:
        StorageError: the disk refuses.
    """
    path = Path(os.path.abspath(path))
    scratch = path.with_name(f".{path.name}.scratch-{os.getpid()}")
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(path, ("scratch",))
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _replace_directory(path: Path, new: Path) -> None:
    """Rename ``new`` to ``path``; a directory there is moved aside first and deleted last."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    has_old = path.exists()
    if has_old:
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if has_old:
            old.rename(path)
        raise
    _sync(path.parent)
    if has_old:
        shutil.rmtree(old)


def clean_stale(path: Path, kinds: Sequence[str] = ("tmp", "old")) -> None:
    """Remove what dead writers of ``path`` left beside it; put back a directory that one of them had moved aside.

    Args:
        path: a file or directory that is, or was to be, written.
        kinds: of what is removed: ``tmp`` and ``old``, and ``scratch`` where this process itself has none in use.
    """
    for stale in path.parent.glob(f".{path.name}.*-*"):
        kind, _, pid = stale.name.removeprefix(f".{path.name}.").partition("-")
        if kind not in kinds or not pid.isdecimal() or _is_another_live_process(int(pid)):
            continue
        if kind == "old" and not path.exists():
            stale.rename(path)
        elif stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def _is_another_live_process(pid: int) -> bool:
    # Our own id found in a name is a leftover too: in a container every run may have the same id.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_inside(name: str) -> bool:
    """Whether a file name that some file or config gives stays in the directory that it is looked for in."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def describe_files(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files below a directory, by their names there."""
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def write_manifest(directory: Path, described: Mapping[str, Any] | None = None) -> None:
    """Record size and SHA-256 of every file in a directory, for :func:`damage`.

    Args:
        directory: what is in it is whole.
        described: what :func:`describe_files` has said of some of its files already.
    """
    entries = dict(described or {})
    files = (path for path in directory.rglob("*") if path.is_file())
    entries |= describe_files(directory, (f for f in files if f.relative_to(directory).as_posix() not in entries))
    write_json(directory / _MANIFEST, {"files": dict(sorted(entries.items()))})


def damage(directory: Path) -> str | None:
    """What is wrong with a directory that has a manifest; None where every file is, bit for bit, what was written."""
    try:
        entries = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    return None


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)  # a checkpoint that is looked at before a run begins is not read once more when it is loaded
def _sha256_of(path: Path, *_status: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, obj: object) -> None:
    """Write ``obj`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_vacant(output_dir: Path, *, key: str = "output_dir") -> None:
    """Refuse to write over something.

    Args:
        output_dir: where something is to be written.
        key: the setting that names it, for the message.

    Raises:
        ConfigError: ``output_dir`` is a file, or a directory with something in it.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        remedy = "Choose another, or remove it first"
        raise ConfigError(Problem(key, str(output_dir), "a new or empty directory", remedy))


def require_free_space(path: Path, num_bytes: int, *, key: str) -> None:
    """Refuse to begin writing what the disk cannot hold.

    Args:
        path: where the result will be; it need not exist yet.
        num_bytes: size of the result.
        key: the setting that names ``path``, for the message.

    Raises:
        ConfigError: the nearest existing parent has less than ``num_bytes`` free.
    """
    path = Path(os.path.abspath(path))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        wanted = f"a place with {num_bytes:,} bytes free ({existing} has {free:,})"
        raise ConfigError(Problem(key, str(path), wanted, "Free some space or choose another disk."))
