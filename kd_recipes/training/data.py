"""From a ``dataset:`` section to micro-batches in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune.datasets import ConcatDataset

from kd_recipes import _torchtune
from kd_recipes.batch import IGNORE_INDEX, Batch, shift_labels
from kd_recipes.errors import ConfigError, Problem, one_line


def build_dataset(cfg: DictConfig | ListConfig, tokenizer: Any, key: str) -> tuple[Dataset[Any], bool]:
    """A data set, or several one after the other, and whether it is packed.

    Raises:
        ConfigError: it cannot be built, is empty, or none of its samples has a label.
    """
    sections = list(cfg) if isinstance(cfg, ListConfig) else [cfg]
    try:
        parts = [_torchtune.instantiate(section, tokenizer) for section in sections]
        dataset = parts[0] if len(parts) == 1 else ConcatDataset(datasets=parts)
        _require_labels(dataset, key)
    except ConfigError:
        raise
    except Exception as error:  # the component's own, of any kind: a file not found, a column that is not there
        got = ", ".join(section._component_ for section in sections)
        raise ConfigError(Problem(key, got, "a data set that can be read", one_line(error))) from error
    return dataset, any(section.get("packed", False) for section in sections)


def _require_labels(dataset: Any, key: str) -> None:
    if len(dataset) == 0:
        raise ConfigError(Problem(key, "0 samples", "at least one sample", "Look at its source, split and filter"))
    samples = (dataset[index] for index in range(len(dataset)))  # the first is enough, but in the case of the error
    if all((torch.as_tensor(sample["labels"])[1:] == IGNORE_INDEX).all() for sample in samples):
        wanted = "at least one label that is not masked"
        remedy = (
            "Look at train_on_input, the masking strategy, and max_seq_len (a prompt that fills it leaves no answer)"
        )
        raise ConfigError(Problem(key, f"{len(dataset)} samples, all labels masked", wanted, remedy))


class Loader:
    """Batches in an order that depends on the seed and the epoch alone.

    The processes' batches of a turn are together what a single process has in it with batches as large as all theirs.

    Args:
        dataset: of torchtune's samples.
        packed: whether they are packed.
        batch_size: samples of a batch.
        shuffle: draw a new order for each epoch, and drop what does not fill a batch. Text that is not shuffled is
            seen to its last token: processes that have run out get a sample again, with its labels masked.
        seed: of the order.
        padding_idx: id that short samples are filled up with.
        device: of the batches.
        max_seq_len: that the models' positions reach to.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        packed: bool,
        batch_size: int,
        shuffle: bool,
        seed: int,
        padding_idx: int,
        device: torch.device,
        max_seq_len: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler: StatefulDistributedSampler = StatefulDistributedSampler(
            dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=shuffle
        )
        self._loader = StatefulDataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self._sampler,
            collate_fn=_torchtune.collate(padding_idx, packed),
            drop_last=shuffle,
            # each pass draws a seed for workers; from the global generator, a resumed run would draw one too many
            generator=torch.Generator(),
        )
        self._device, self._max_seq_len = device, max_seq_len
        self._start = 0  # of the next pass, in samples of this process

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._loader)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, labels shifted, on the device.

        Raises:
            ConfigError: a sequence that the models' positions do not reach.
        """
        self._sampler.set_epoch(epoch)
        num_replicas = self._sampler.num_replicas
        position, self._start = self._sampler.rank + num_replicas * self._start, 0
        for collated in self._loader:
            num_rows, length = collated["tokens"].shape
            if length > self._max_seq_len:
                wanted = f"at most {self._max_seq_len}, the shorter max_seq_len of the models"
                remedy = f"Set tokenizer.max_seq_len={self._max_seq_len} to cut longer ones"
                raise ConfigError(Problem("dataset", f"a sequence of {length} tokens", wanted, remedy))
            if not self._sampler.shuffle:
                is_repeated_B = position + num_replicas * torch.arange(num_rows) >= len(self._loader.dataset)
                collated["labels"] = collated["labels"].masked_fill(is_repeated_B.unsqueeze(1), IGNORE_INDEX)
            position += num_replicas * num_rows
            yield shift_labels(collated).to(self._device)

    def seek(self, num_samples: int, seed: int) -> None:
        """Begin the next pass behind so many samples, counted over all processes, of the order of a seed."""
        self._sampler.seed = seed
        self._start = num_samples // self._sampler.num_replicas
        self._sampler.load_state_dict({self._sampler._YIELDED: self._start})

    def rows(self, epoch: int, start: int, stop: int) -> list[int]:
        """The rows of the data set that this process has in an epoch between two positions, counted in samples."""
        self._sampler.set_epoch(epoch)
        order = DistributedSampler.__iter__(self._sampler)  # and not the stateful one's, which would lose its place
        return list(islice(order, start, stop))


def count_steps(num_micro_batches: int, num_accumulated: int, limit: int | None) -> int:
    """Steps of an epoch.

    Raises:
        ConfigError: there is none.
    """
    steps = num_micro_batches // num_accumulated
    if steps == 0:
        wanted = f"at least {num_accumulated}, the gradient_accumulation_steps"
        remedy = "Lower batch_size or gradient_accumulation_steps"
        raise ConfigError(Problem("dataset", f"{num_micro_batches} micro-batches", wanted, remedy))
    return min(steps, limit or steps)


def weigh(batches: Iterable[Batch], token_weights: Callable[[Batch], Any] | None) -> Iterator[Batch]:
    """The batches with weights of their tokens.

    Raises:
        ConfigError: the function returns no such weights.
    """
    for batch in batches:
        if token_weights is not None:
            batch = replace(batch, weights_BS=_weights(batch, token_weights))
        yield batch


def _weights(batch: Batch, token_weights: Callable[[Batch], Any]) -> Tensor:
    try:
        weights_BS = token_weights(batch)
    except Exception as error:  # the user's own code
        raise ConfigError(Problem("token_weights", one_line(error), "a function of a Batch that returns")) from error
    shape = list(batch.labels_BS.shape)
    if not isinstance(weights_BS, Tensor) or list(weights_BS.shape) != shape:
        got = list(weights_BS.shape) if isinstance(weights_BS, Tensor) else type(weights_BS).__name__
        raise ConfigError(Problem("token_weights", got, f"a tensor {shape}, a weight for each position"))
    weights_BS = weights_BS.detach().to(batch.labels_BS.device, torch.float32)
    of_valid = weights_BS[batch.labels_BS != IGNORE_INDEX]
    if not bool((of_valid.isfinite() & (of_valid >= 0)).all()):
        raise ConfigError(Problem("token_weights", "a weight that is negative or not finite", "numbers from 0"))
    return weights_BS


def accumulate(batches: Iterable[Batch], num_micro_batches: int) -> Iterator[list[Batch]]:
    """Groups of micro-batches, one a step; what is left over at the end of an epoch is dropped, as torchtune does."""
    micros = []
    for micro in batches:
        micros.append(micro)
        if len(micros) == num_micro_batches:
            yield micros
            micros = []
