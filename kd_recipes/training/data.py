"""From a ``dataset:`` section to micro-batches in an order that can be resumed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate as partial_sums
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtune.datasets import ConcatDataset
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes.batch import IGNORE_INDEX, Batch, shift_labels
from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.training.order import Rows, Stream
from kd_recipes.training.parallel import Parallel

_LOOKED_AT = 100  # rows of a stream


def build_dataset(
    cfg: DictConfig | ListConfig, tokenizer: Any, key: str, *, may_stream: bool = False
) -> tuple[Dataset[Any], bool]:
    """A data set, or several one after the other, and whether it is packed.

    Raises:
        ConfigError: it cannot be built, is empty, or none of its samples has a label; or it is a stream, and may not.
    """
    sections = list(cfg) if isinstance(cfg, ListConfig) else [cfg]
    try:
        parts = [_torchtune.instantiate(section, tokenizer) for section in sections]
        if any(_torchtune.stream_of(part) for part in parts) and (len(parts) > 1 or not may_stream):
            wanted = "one stream, or none" if may_stream else "a data set with a length"
            raise ConfigError(Problem(f"{key}.streaming", True, wanted, "Leave `streaming` out"))
        dataset = parts[0] if len(parts) == 1 else Sourced(parts)
        _require_labels(dataset, key)
    except ConfigError:
        raise
    except Exception as error:  # the component's own, of any kind: a file not found, a column that is not there
        got = ", ".join(section._component_ for section in sections)
        raise ConfigError(Problem(key, got, "a data set that can be read", one_line(error))) from error
    return dataset, any(section.get("packed", False) for section in sections)


class Sourced(Dataset[dict[str, Any]]):
    """Several data sets one after the other, whose samples say by ``source`` which of them they are of.

    Args:
        parts: all packed, or none.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._whole = ConcatDataset(datasets=list(parts))
        self._ends = list(partial_sums(map(len, parts)))

    def __len__(self) -> int:
        """Samples of all of them."""
        return len(self._whole)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample."""
        return {**self._whole[index], "source": bisect_right(self._ends, index)}


def _require_labels(dataset: Any, key: str) -> None:
    stream = _torchtune.stream_of(dataset)
    number: Any = f"the first {_LOOKED_AT}" if stream else len(dataset)
    if number == 0:
        raise ConfigError(Problem(key, "0 samples", "at least one sample", "Look at its source, split and filter"))
    if stream:
        source, prepare = stream
        samples = (prepare(row) for row in islice(source, _LOOKED_AT))
    else:  # the first is enough, but in the case of the error
        samples = (dataset[index] for index in range(len(dataset)))
    if all((torch.as_tensor(sample["labels"])[1:] == IGNORE_INDEX).all() for sample in samples):
        wanted = "at least one label that is not masked"
        remedy = (
            "Look at train_on_input, the masking strategy, and max_seq_len (a prompt that fills it leaves no answer)"
        )
        raise ConfigError(Problem(key, f"{number} samples, all labels masked", wanted, remedy))


def _collate(collate: Callable[[list[Any]], dict[str, Tensor]], samples: list[Any]) -> dict[str, Tensor]:
    collated = collate(samples)
    if "source" in samples[0]:
        collated["sources"] = torch.tensor([sample["source"] for sample in samples])
    return collated


class Loader:
    """Batches of the samples that a process has.

    Args:
        order: which samples, and in which order.
        packed: whether they are packed.
        batch_size: samples of a batch.
        padding_idx: id that short samples are filled up with.
        device: of the batches.
        max_seq_len: that the models' positions reach to.
    """

    def __init__(
        self,
        order: Rows | Stream,
        *,
        packed: bool,
        batch_size: int,
        padding_idx: int,
        device: torch.device,
        max_seq_len: int,
    ) -> None:
        self._order, self._batch_size = order, batch_size
        self._collate = partial(_collate, _torchtune.collate(padding_idx, packed))
        self._loader = StatefulDataLoader(
            order.dataset,
            batch_size=batch_size,
            sampler=order.sampler,
            collate_fn=self._collate,
            drop_last=order.drop_last,
            # each pass draws a seed for workers; from the global generator, a resumed run would draw one too many
            generator=torch.Generator(),
        )
        self._device, self._max_seq_len = device, max_seq_len

    def __len__(self) -> int:
        """Batches of an epoch; of a stream, more than anybody will ask for."""
        return self._order.num_batches(self._batch_size)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, labels shifted, on the device.

        Raises:
            ConfigError: a sequence that the models' positions do not reach.
        """
        position = self._order.begin(epoch)
        for collated in self._loader:
            num_rows, length = collated["tokens"].shape
            if length > self._max_seq_len:
                wanted = f"at most {self._max_seq_len}, the shorter max_seq_len of the models"
                remedy = f"Set tokenizer.max_seq_len={self._max_seq_len} to cut longer ones"
                raise ConfigError(Problem("dataset", f"a sequence of {length} tokens", wanted, remedy))
            is_repeated_B = self._order.is_repeated(position, num_rows)
            if is_repeated_B is not None:
                collated["labels"] = collated["labels"].masked_fill(is_repeated_B.unsqueeze(1), IGNORE_INDEX)
                position += self._order.world_size * num_rows
            yield shift_labels(collated).to(self._device)

    def rows_once(self) -> Iterator[Batch]:
        """This process's share of all rows, each once and alone, in host memory; of a stream, none."""
        for index in self._order.share():
            yield shift_labels(self._collate([self._order.dataset[index]]))

    def seek(self, num_samples: int, seed: int) -> None:
        """Begin the next pass behind so many samples, counted over all processes, of the order of a seed."""
        self._order.seek(num_samples, seed)

    def rows(self, epoch: int, start: int, stop: int) -> list[int]:
        """The rows of the data set that this process has in an epoch between two positions, counted in samples."""
        return self._order.rows(epoch, start, stop)


def build_loader(
    cfg: DictConfig, key: str, tokenizer: Any, parallel: Parallel, *, seed: int, max_seq_len: int
) -> Loader:
    """The batches of a ``dataset:`` section, or of ``eval_dataset:``, which is neither shuffled nor grouped.

    Args:
        cfg: of a distillation.
        key: of the section.
        tokenizer: of torchtune's protocol.
        parallel: the processes, which share the samples.
        seed: of the order.
        max_seq_len: that the models' positions reach to.

    Raises:
        ConfigError: the data set cannot be built or has no labels, or a setting does not suit it.
    """
    is_training = key == "dataset"
    settings: dict[str, Any] = {"rank": parallel.rank, "world_size": parallel.world_size}
    dataset, packed = build_dataset(cfg[key], tokenizer, key, may_stream=True)
    order: Rows | Stream
    if (stream := _torchtune.stream_of(dataset)) is not None:
        _check_stream(cfg, key, is_training)
        buffer_size = cfg.shuffle_buffer_size if is_training and cfg.shuffle else None
        order = Stream(*stream, seed=seed, buffer_size=buffer_size, **settings)
    else:
        if is_training and cfg.group_by_length:
            settings |= {"lengths_N": _lengths(dataset, parallel), "samples_per_step": samples_per_step(cfg, parallel)}
        order = Rows(dataset, shuffle=is_training and cfg.shuffle, seed=seed, **settings)
    return Loader(
        order,
        packed=packed,
        batch_size=cfg.batch_size,
        padding_idx=tokenizer.pad_id,
        device=parallel.device,
        max_seq_len=max_seq_len,
    )


def samples_per_step(cfg: DictConfig, parallel: Parallel) -> int:
    """Of all processes and micro-batches."""
    return int(cfg.batch_size * cfg.gradient_accumulation_steps) * parallel.world_size


def _check_stream(cfg: DictConfig, key: str, is_training: bool) -> None:
    """Refuse settings that ask for a stream's end, or for all of its rows."""
    if not is_training and cfg.max_eval_batches is None:
        raise ConfigError(Problem("max_eval_batches", None, f"a number: {key} is a stream, and has no end"))
    if is_training and (cfg.max_steps is None or cfg.max_steps_per_epoch is not None):
        got = f"max_steps {cfg.max_steps}, max_steps_per_epoch {cfg.max_steps_per_epoch}"
        raise ConfigError(Problem("max_steps", got, f"max_steps alone: {key} is a stream, and has no end"))


def _lengths(dataset: Any, parallel: Parallel) -> Tensor:
    """Tokens of each sample; each process counts its part."""
    mine = tqdm(range(parallel.rank, len(dataset), parallel.world_size), "lengths", disable=not parallel.is_main)
    parts = parallel.each([len(dataset[index]["tokens"]) for index in mine])
    lengths_N = torch.zeros(len(dataset), dtype=torch.long)
    for rank, part in enumerate(parts):
        lengths_N[rank :: parallel.world_size] = torch.tensor(part, dtype=torch.long)
    return lengths_N


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
