"""Records on disk, by key: files that are added to, one pair a process, and read through a memory map.

A record counts once its line stands in the index, which is written after the record is on the disk. A process that is
killed leaves at most a record without a line, or half a line; the next one cuts both off. A line goes only where its
record is damaged: the index is then replaced by one without it. All this is done by whoever has the lock on the data.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.storage import StorageError, atomic_file, explain_disk_errors

_LINE = np.dtype(
    [
        ("key", "V16"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("num_positions", "<u4"),
        ("positions", "<u4"),
        ("checksum", "<u4"),
        ("line_checksum", "<u4"),
    ]
)
_LINE_BODY = _LINE.itemsize - 4


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a record is.

    Args:
        part: number of the file.
        offset: of its first byte.
        size: in bytes.
        num_positions: that it keeps.
        positions: a checksum of which they are.
        checksum: of its bytes.
    """

    part: int
    offset: int
    size: int
    num_positions: int
    positions: int
    checksum: int


def positions_checksum(positions_n: np.ndarray) -> int:
    """A number that says which positions these are."""
    return zlib.crc32(positions_n.astype("<i8").tobytes())


def _indexes(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"part-{'[0-9]' * 5}.index"))


def has_records(directory: Path) -> bool:
    """Whether a store has any, be they damaged."""
    return any(len(_read_index(index, max_lines=1)[0]) for index in _indexes(directory))


def is_part(file: Path) -> bool:
    """Whether it is a file of a store, by its name."""
    return re.fullmatch(r"part-\d{5}\.(data|index)", file.name) is not None


def _files(directory: Path, part: int) -> tuple[Path, Path]:
    return directory / f"part-{part:05}.data", directory / f"part-{part:05}.index"


def _read_index(file: Path, *, max_lines: int | None = None) -> tuple[np.ndarray, int]:
    """The lines that are whole, up to the first that is not, and how many bytes of the file they are.

    Args:
        file: an index; it need not be there.
        max_lines: to read at most; all if None.
    """
    size, content = _LINE.itemsize, b""
    if file.exists():
        with file.open("rb") as lines:
            content = lines.read(-1 if max_lines is None else max_lines * size)
    for start in range(0, len(content), size):
        line = content[start : start + size]
        if len(line) < size or zlib.crc32(line[:_LINE_BODY]) != int.from_bytes(line[_LINE_BODY:], "little"):
            content = content[:start]
            break
    return np.frombuffer(content, _LINE), len(content)


def in_use(directory: Path) -> Problem:
    """That another process adds to a store, or makes another one in its place."""
    wanted = "a cache that no other process is writing to"
    return Problem("teacher.path", str(directory), wanted, "Wait for it, or stop it")


class Writer:
    """Adds records to a part of a store.

    Args:
        directory: of the store.
        part: number of the file, one for each process.

    Raises:
        ConfigError: another process adds to it, or has just made another store in the place of this one.
        StorageError: its data is shorter than its index says.
    """

    def __init__(self, directory: Path, part: int) -> None:
        self._directory = directory
        data, index = _files(directory, part)
        self._data = data.open("ab")
        self._lock(data)
        self._index = index.open("ab")  # not before: who had the lock may have replaced it
        lines, num_bytes = _read_index(index)
        self._offset = int(lines[-1]["offset"]) + int(lines[-1]["size"]) if len(lines) else 0
        if data.stat().st_size < self._offset:
            self._index.close()
            self._data.close()
            raise StorageError(f"{data} is shorter than {index} says: remove both, and run cache_teacher again")
        self._data.truncate(self._offset)
        self._index.truncate(num_bytes)
        self._waiting: list[bytes] = []

    def _lock(self, data: Path) -> None:
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._data.fileno()), data.stat()):
                raise OSError(f"{data} has been replaced")
        except OSError as error:
            self._data.close()
            raise ConfigError(in_use(self._directory)) from error

    def add(self, key: bytes, positions_n: np.ndarray, record: bytes) -> None:
        """Add a record, which counts after the next :meth:`commit`."""
        with explain_disk_errors(self._directory):
            self._data.write(record)
        numbers = (self._offset, len(record), len(positions_n), positions_checksum(positions_n), zlib.crc32(record), 0)
        line = np.array((key, *numbers), _LINE).tobytes()
        self._waiting.append(line[:_LINE_BODY] + zlib.crc32(line[:_LINE_BODY]).to_bytes(4, "little"))
        self._offset += len(record)

    def commit(self) -> None:
        """Make what has been added count."""
        with explain_disk_errors(self._directory):
            _sync(self._data)
            self._index.write(b"".join(self._waiting))
            self._waiting = []
            _sync(self._index)

    def close(self) -> None:
        """Commit, and let others write."""
        self.commit()
        self._index.close()
        self._data.close()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Store:
    """Records by key.

    Args:
        directory: of its files; it may have none yet.

    Raises:
        StorageError: a file is shorter than its index says.
    """

    def __init__(self, directory: Path) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._entries: dict[bytes, Entry] = {}
        self._directory = directory
        for index in _indexes(directory):
            self._add_part(index)

    def _add_part(self, index: Path) -> None:
        part = int(index.stem.removeprefix("part-"))
        lines, _ = _read_index(index)
        if not len(lines):
            return
        data, _ = _files(self._directory, part)
        num_bytes = int(lines[-1]["offset"]) + int(lines[-1]["size"])
        if (data.stat().st_size if data.is_file() else 0) < num_bytes:
            remedy = "remove both, and run cache_teacher again, which computes only what is missing"
            raise StorageError(f"{data} is shorter than {index} says: {remedy}")
        with data.open("rb") as file:
            self._maps[part] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for line in lines:
            key, *numbers, _ = line.tolist()
            entry = Entry(part, *numbers)
            known = self._entries.get(key)
            if known is None or known.num_positions <= entry.num_positions:
                self._entries[key] = entry

    def __len__(self) -> int:
        """How many keys."""
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Of all records and their lines."""
        return sum(entry.size + _LINE.itemsize for entry in self._entries.values())

    @property
    def num_positions(self) -> int:
        """Of all records."""
        return sum(entry.num_positions for entry in self._entries.values())

    def __iter__(self) -> Iterator[bytes]:
        """The keys, in no order."""
        return iter(self._entries)

    def find(self, key: bytes) -> Entry | None:
        """Where the record of a key is; None where there is none."""
        return self._entries.get(key)

    def read(self, entry: Entry) -> memoryview:
        """A record.

        Raises:
            StorageError: it is not what was written.
        """
        record = memoryview(self._maps[entry.part])[entry.offset : entry.offset + entry.size]
        if zlib.crc32(record) != entry.checksum:
            data, _ = _files(self._directory, entry.part)
            remedy = "Run cache_teacher again, without check, which asks about what is damaged or missing"
            raise StorageError(f"{data} is damaged at byte {entry.offset}: its checksum differs. {remedy}")
        return record

    def share(self, rank: int, world_size: int) -> list[bytes]:
        """The keys that are a process's to look after: by the key alone, so that each is somebody's.

        Args:
            rank: of the process, from 0.
            world_size: how many there are.
        """
        return [key for key in self._entries if int.from_bytes(key, "little") % world_size == rank]

    def damage(self, keys: Iterable[bytes] | None = None) -> dict[bytes, str]:
        """What is wrong with records, by key.

        Args:
            keys: of the records that are read; all of them if None.
        """
        found = {}
        for key in self._entries if keys is None else keys:
            try:
                self.read(self._entries[key])
            except StorageError as error:
                found[key] = str(error)
        return found

    def forget(self, keys: Iterable[bytes]) -> None:
        """Take the damaged records of some keys out of the index; this store is not to be read afterwards.

        Of a key with several records all that are damaged go, and the newest that is whole is what is found from then
        on. They are looked at under the lock: another process may have mended them since this store was opened.

        Args:
            keys: as :meth:`damage` has them.

        Raises:
            ConfigError: another process adds to a part.
        """
        doubtful = frozenset(keys)
        for part in sorted(self._maps):
            data, index = _files(self._directory, part)
            if doubtful.isdisjoint(_read_index(index)[0]["key"].tolist()):
                continue
            with closing(Writer(self._directory, part)), data.open("rb") as file, atomic_file(index) as new:
                lines, _ = _read_index(index)
                is_kept = [key not in doubtful or _is_whole(file, *rest) for key, *rest in lines.tolist()]
                new.write_bytes(lines[np.array(is_kept, bool)].tobytes())


def _is_whole(data: BinaryIO, offset: int, size: int, _num: int, _positions: int, checksum: int, _line: int) -> bool:
    """Whether a record is what was written, by the numbers of its line."""
    data.seek(offset)
    return zlib.crc32(data.read(size)) == checksum
