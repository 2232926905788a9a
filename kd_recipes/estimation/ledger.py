"""What a process holds in memory, as it comes and goes, and the most of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocator:
    """What becomes of memory that is freed.

    Args:
        keeps_below: bytes of a piece that stays with the process when it is freed, to be used again; 0 for none.
        waste: holes that such pieces leave between others as they come and go, in shares of the most of them.
    """

    keeps_below: int = 0
    waste: float = 0.0


# glibc maps what is larger than 32 MiB for itself, and gives it back. What is smaller stays, and since torch wants
# addresses that are multiples of 64, a hole that a tensor has left is too small for the next one of its size. In the
# runs of docs/doctor.md the holes are between half as much as what comes and goes, and a third more.
GLIBC = Allocator(keeps_below=32 * 2**20, waste=1.0)
CUDA = Allocator()


class Ledger:
    """Bytes held.

    Args:
        allocator: of the process.

    Attributes:
        phase: what is being done.
        peaks: phase -> the most bytes that were held in it.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._small = self._most_small = self._large = 0
        self._moving = self._most_moving = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}

    @property
    def held(self) -> int:
        """Bytes now."""
        return self._large + self._most_small + round(self._most_moving * self._allocator.waste)

    def change(self, size: float, *, moves: bool = False) -> None:
        """A piece comes, or goes.

        Args:
            size: of it; negative where it goes.
            moves: whether it is one of those that come and go all the time, and leave holes.
        """
        is_small = abs(size) < self._allocator.keeps_below
        if is_small and moves:
            self._moving += round(size)
            self._most_moving = max(self._most_moving, self._moving)
        if is_small:
            self._small += round(size)
            self._most_small = max(self._most_small, self._small)
        else:
            self._large += round(size)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.held)

    def hold(self, sizes: Iterable[float]) -> None:
        """Pieces come, and stay."""
        for size in sizes:
            self.change(size)

    @contextmanager
    def during(self, phase: str, sizes: Iterable[float] = ()) -> Iterator[None]:
        """A phase, for which pieces come that go with it."""
        self.phase = phase
        pieces = list(sizes)
        self.hold(pieces)
        yield
        self.hold(-size for size in pieces)
