"""What is kept of a document, as bytes: some 12 bits for a probability, and ids in the bits that they need.

A log-probability is a multiple of 1/128 nats, from 0 to -32 in 12 bits: rounding it moves the distribution by a KL
divergence of half its variance, (1/128)^2 / 24 = 2.5e-6 nats, a thousandth of what a distillation ends at. float16 has
as many digits near 0 and four times fewer at -10, for 16 bits. What is below -32 nats counts as that.
"""

# n positions, M ids kept at all of them together, F facts of a position

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow
from numpy.typing import NDArray

from kd_recipes.teachers.cache.bits import Numbers, pack, plane_sizes, unpack
from kd_recipes.teachers.cache.content import Positions

STEPS = 128  # of a log-probability, in a nat
NAT_BITS = 12
NOTHING = 2**NAT_BITS - 1  # stands for -inf
NUM_FACTS = 3  # of a position at a temperature, in nats: likeliest id, label, entropy
_CODEC = pyarrow.Codec("zstd", compression_level=9)
_HEAD = struct.Struct("<III")  # positions of the document, n, M


def to_code(nats: NDArray[np.floating]) -> Numbers:
    """Numbers up to 0 as their distance from 0 in steps; -inf keeps its own."""
    steps = np.rint(-nats * STEPS).clip(0, NOTHING - 1)
    codes: Numbers = np.where(np.isneginf(nats), NOTHING, steps).astype(np.uint32)
    return codes


def from_code(codes: NDArray[np.unsignedinteger]) -> NDArray[np.float32]:
    """The inverse of :func:`to_code`, up to half a step."""
    return np.where(codes == NOTHING, -np.inf, codes.astype(np.float32) / -STEPS).astype(np.float32)


def first_of_each(num_n: Numbers) -> Positions:
    """Where each of some groups begins, one after the other."""
    return np.cumsum(num_n, dtype=np.int64) - num_n


@dataclass(frozen=True)
class Kept:
    """What is kept of some positions; log-probabilities and entropies as codes.

    Args:
        num_n: ids of each position.
        ids_M: those of all positions, one after the other, likeliest first.
        log_p_M: their log-probabilities.
        counts_M: how often each was drawn; nothing for likeliest ids.
        tail_n: the probability of all others; nothing for ids that were drawn.
        likeliest_n: ids.
        facts_nF: at the cache's temperature and, if that is another one, at temperature 1: log-probability of the
            likeliest id, of the label, and minus the entropy.
    """

    num_n: Numbers
    ids_M: Numbers
    log_p_M: Numbers
    counts_M: Numbers
    tail_n: Numbers
    likeliest_n: Numbers
    facts_nF: Numbers

    @classmethod
    def of(cls, num_facts: int) -> Kept:
        """Of no positions."""
        return cls(*(np.empty(0, np.uint32) for _ in fields(cls)[:-1]), np.empty((0, num_facts), np.uint32))  # type: ignore[call-arg]

    def at(self, is_wanted_n: NDArray[np.bool_]) -> Kept:
        """Some of the positions."""
        is_named_M = np.repeat(is_wanted_n, self.num_n)
        return Kept(
            self.num_n[is_wanted_n],
            self.ids_M[is_named_M],
            self.log_p_M[is_named_M],
            self.counts_M[is_named_M[: len(self.counts_M)]],
            self.tail_n[is_wanted_n[: len(self.tail_n)]],
            self.likeliest_n[is_wanted_n],
            self.facts_nF[is_wanted_n],
        )

    def split(self, sizes: Sequence[int]) -> Iterator[Kept]:
        """The parts of so many positions each."""
        stops = np.cumsum(sizes)
        ends = np.append(first_of_each(self.num_n), len(self.ids_M))
        for start, stop in zip(stops - sizes, stops, strict=True):
            rows, names = slice(start, stop), slice(ends[start], ends[stop])
            yield Kept(
                self.num_n[rows],
                self.ids_M[names],
                self.log_p_M[names],
                self.counts_M[names],
                self.tail_n[rows],
                self.likeliest_n[rows],
                self.facts_nF[rows],
            )

    @classmethod
    def join(cls, parts: Sequence[Kept]) -> Kept:
        """The inverse of :meth:`split`."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Layout:
    """How the numbers of a cache are laid out.

    Args:
        num_ids: of the vocabulary.
        width: most ids of a position.
        is_drawn: whether they were drawn.
        num_temperatures: at which the facts are known.
    """

    num_ids: int
    width: int
    is_drawn: bool
    num_temperatures: int

    def encode(self, num_positions: int, positions_n: Positions, kept: Kept) -> bytes:
        """A record.

        Args:
            num_positions: of the document.
            positions_n: which of them.
            kept: at these.
        """
        is_kept = np.zeros(num_positions, np.uint8)
        is_kept[positions_n] = 1
        firsts_n = first_of_each(kept.num_n)
        falls_M = np.diff(kept.log_p_M, prepend=np.uint32(0))  # from one id to the next, small numbers
        falls_M[firsts_n] = kept.log_p_M[firsts_n]
        columns = (
            is_kept.astype(np.uint32),
            kept.num_n,
            kept.ids_M,
            falls_M,
            kept.counts_M,
            kept.tail_n,
            kept.likeliest_n ^ kept.ids_M[firsts_n],  # mostly 0: it is the first of those kept
            *kept.facts_nF.T,
        )
        bits = self._columns(num_positions, len(kept.num_n), len(kept.ids_M))
        planes = [p for column, (_, num_bits) in zip(columns, bits, strict=True) for p in pack(column, num_bits)]
        packed = [min(plane.tobytes(), _CODEC.compress(plane.tobytes(), asbytes=True), key=len) for plane in planes]
        head = _HEAD.pack(num_positions, len(kept.num_n), len(kept.ids_M))
        return head + struct.pack(f"<{len(packed)}I", *map(len, packed)) + b"".join(packed)

    def decode(self, record: memoryview) -> tuple[Positions, Kept]:
        """The inverse of :meth:`encode`."""
        num_positions, num_rows, num_names = _HEAD.unpack_from(record)
        columns = self._columns(num_positions, num_rows, num_names)
        wanted = [plane_sizes(count, num_bits) for count, num_bits in columns]
        num_planes = sum(map(len, wanted))
        sizes = iter(struct.unpack_from(f"<{num_planes}I", record, _HEAD.size))
        place, values = _HEAD.size + 4 * num_planes, []
        for (count, num_bits), full in zip(columns, wanted, strict=True):
            planes = []
            for whole in full:
                size = next(sizes)
                planes.append(_expand(record[place : place + size], whole))
                place += size
            values.append(unpack(planes, count, num_bits))
        is_kept, num_n, ids_M, falls_M, counts_M, tail_n, likeliest_n, *facts = values
        firsts_n = first_of_each(num_n)
        sums_M = np.cumsum(falls_M, dtype=np.int64)
        before_n = sums_M[firsts_n] - falls_M[firsts_n]
        log_p_M = (sums_M - np.repeat(before_n, num_n)).astype(np.uint32)
        kept = Kept(num_n, ids_M, log_p_M, counts_M, tail_n, likeliest_n ^ ids_M[firsts_n], np.stack(facts, 1))
        return np.flatnonzero(is_kept), kept

    def positions(self, record: memoryview) -> Positions:
        """Of the document, those that are kept."""
        num_positions, num_rows, num_names = _HEAD.unpack_from(record)
        columns = self._columns(num_positions, num_rows, num_names)
        num_planes = sum(len(plane_sizes(*column)) for column in columns)
        (size,) = struct.unpack_from("<I", record, _HEAD.size)
        place = _HEAD.size + 4 * num_planes
        plane = _expand(record[place : place + size], *plane_sizes(*columns[0]))
        return np.flatnonzero(unpack([plane], *columns[0]))

    def _columns(self, num_positions: int, num_rows: int, num_names: int) -> list[tuple[int, int]]:
        """Numbers, and bits of each, of every column."""
        id_bits, width_bits = max(1, (self.num_ids - 1).bit_length()), self.width.bit_length()
        drawn, likeliest = (num_names, 0) if self.is_drawn else (0, num_rows)
        return [
            (num_positions, 1),
            (num_rows, width_bits),
            (num_names, id_bits),
            (num_names, NAT_BITS),
            (drawn, width_bits),
            (likeliest, NAT_BITS),
            (num_rows, id_bits),
            *[(num_rows, NAT_BITS)] * (NUM_FACTS * self.num_temperatures),
        ]


def _expand(packed: memoryview, size: int) -> NDArray[np.uint8]:
    if len(packed) == size:
        return np.frombuffer(packed, np.uint8)
    return np.frombuffer(_CODEC.decompress(packed, decompressed_size=size, asbytes=True), np.uint8)
