"""Which samples a process gets, and in which order: of a data set with rows, or of a stream without an end.

The order depends on the seed and the epoch alone, and the processes' samples of a turn are together what a single
process has in it. Both kinds can be gone on with from the middle.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, IterableDataset
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from kd_recipes.errors import ConfigError, Problem

# samples that are sorted by length together, in steps: more save more padding, and shuffle less
_WINDOW_STEPS = 50


class _ByLength(DistributedSampler[Any]):
    """A random order in which the samples of a step are of about the same length; to be set before it is used.

    Args:
        lengths_N: tokens of each sample.
        samples_per_step: of all processes and micro-batches, so that no cut of a step into them changes the order.
    """

    lengths_N: Tensor
    samples_per_step: int

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order_N = torch.randperm(len(self.lengths_N), generator=generator)
        num_whole = len(order_N) // self.samples_per_step * self.samples_per_step
        steps: list[Tensor] = []
        for window in order_N[:num_whole].split(_WINDOW_STEPS * self.samples_per_step):
            by_length = window[self.lengths_N[window].argsort(descending=True, stable=True)]
            cut = by_length.view(-1, self.samples_per_step)
            steps += [cut[i] for i in torch.randperm(len(cut), generator=generator)]
        order_N = torch.cat([*steps, order_N[num_whole:]])[: self.total_size]
        return iter(order_N[self.rank :: self.num_replicas].tolist())


class _StatefulByLength(StatefulDistributedSampler, _ByLength):
    pass


class Rows:
    """The rows of a data set that a process has.

    Args:
        dataset: with a length, and samples by number.
        shuffle: draw a new order for each epoch, and drop what does not fill a batch. Rows that are not shuffled are
            seen to the last: processes that have run out get a row again, with its labels masked.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        lengths_N: tokens of each row, if a step is to have rows of about the same length.
        samples_per_step: then, of all processes and micro-batches.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lengths_N: Tensor | None = None,
        samples_per_step: int = 1,
    ) -> None:
        self.dataset, self.drop_last = dataset, shuffle
        settings: dict[str, Any] = {
            "num_replicas": world_size,
            "rank": rank,
            "shuffle": shuffle,
            "seed": seed,
            "drop_last": shuffle,
        }
        kind = StatefulDistributedSampler if lengths_N is None else _StatefulByLength
        self.sampler: Any = kind(dataset, **settings)
        self.sampler.lengths_N, self.sampler.samples_per_step = lengths_N, samples_per_step
        self._rank, self.world_size = rank, world_size
        self._start = 0  # of the next pass, in samples of this process

    def num_batches(self, batch_size: int) -> int:
        """Of an epoch."""
        whole, rest = divmod(len(self.sampler), batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def begin(self, epoch: int) -> int:
        """Set the epoch of the next pass; returns the position that it begins at, in samples of all processes."""
        self.sampler.set_epoch(epoch)
        position, self._start = self._rank + self.world_size * self._start, 0
        return position

    def seek(self, num_samples: int, seed: int) -> None:
        """Begin the next pass behind so many samples, counted over all processes, of the order of a seed."""
        self.sampler.seed = seed
        self._start = num_samples // self.world_size
        self.sampler.load_state_dict({self.sampler._YIELDED: self._start})

    def is_repeated(self, position: int, num_rows: int) -> Tensor | None:
        """Which samples of a batch that begins at a position somebody has already had; None for none of any."""
        if self.drop_last:
            return None
        return position + self.world_size * torch.arange(num_rows) >= len(self.dataset)

    def share(self) -> range:
        """Rows of this process, which together with the others' are all rows, each once."""
        return range(self._rank, len(self.dataset), self.world_size)

    def rows(self, epoch: int, start: int, stop: int) -> list[int]:
        """The rows that this process has in an epoch between two positions, counted in its samples."""
        self.sampler.set_epoch(epoch)
        # and not the stateful sampler's own iterator, which would lose its place
        order = super(StatefulDistributedSampler, self.sampler).__iter__()  # type: ignore[misc]
        return list(islice(order, start, stop))


class Stream(IterableDataset[Any]):
    """What a process has of rows that are read one after the other, and from the beginning again after the last.

    Args:
        source: a stream of rows of Hugging Face's datasets.
        prepare: makes a sample of a row.
        seed: of the order.
        buffer_size: rows that the next one is drawn from; None leaves the order as it is.
        rank: of this process; it reads all rows, and prepares its own.
        world_size: number of processes.
    """

    sampler = None
    drop_last = True

    def __init__(
        self,
        source: Any,
        prepare: Callable[[Mapping[str, Any]], dict[str, Any]],
        *,
        seed: int = 0,
        buffer_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._source, self._prepare = source, prepare
        self._seed, self._buffer_size = seed, buffer_size
        self._rank, self.world_size = rank, world_size
        self._start = 0

    @property
    def dataset(self) -> Stream:
        """Itself: rows and their order are one."""
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, 0
        source = self._source
        if self._buffer_size is not None:
            source = source.shuffle(seed=self._seed, buffer_size=self._buffer_size)
        position = 0
        for number in count():
            source.set_epoch(number)
            before = position
            for row in source:
                if position >= start and position % self.world_size == self._rank:
                    yield self._prepare(row)
                position += 1
            if position == before:
                raise ConfigError(Problem("dataset", "a stream without rows", "at least one row"))

    def num_batches(self, batch_size: int) -> int:
        """Without end."""
        return sys.maxsize

    def begin(self, epoch: int) -> int:
        """A stream has one epoch."""
        return 0

    def seek(self, num_samples: int, seed: int) -> None:
        """As :meth:`Rows.seek`."""
        self._start, self._seed = num_samples, seed

    def is_repeated(self, position: int, num_rows: int) -> Tensor | None:
        """As :meth:`Rows.is_repeated`."""
        return None

    def share(self) -> range:
        """None: a stream cannot be read twice."""
        return range(0)

    def rows(self, epoch: int, start: int, stop: int) -> list[int]:
        """As :meth:`Rows.rows`; the positions in the stream."""
        return [self._rank + self.world_size * index for index in range(start, stop)]
