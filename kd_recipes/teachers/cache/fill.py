"""Ask a teacher about every document of some data, once, and write down what it says.

The batches are those of the data sets in their own order, whole, whatever has been done already and by however many
processes: what a teacher says of a document depends on the shape of its batch in the last bits.
"""

# n positions to be kept, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import tee

import numpy as np
import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import RunError
from kd_recipes.signals import DenseSignal, Exact, Signal, SparseSignal
from kd_recipes.teachers.cache.content import Document, Positions, documents, uniform
from kd_recipes.teachers.cache.encodings import Encoding, Named
from kd_recipes.teachers.cache.record import Kept, Layout, to_code
from kd_recipes.teachers.cache.source import Cache
from kd_recipes.teachers.cache.store import Writer

_LOGITS = 2**22  # that exist at a time, some of them in float64
_COMMIT_SECONDS = 5.0  # of work that a kill may cost


@dataclass
class Plan:
    """What is missing.

    Args:
        wanted: key of a document -> its positions that are to be kept.
        batches: keys of the documents that each batch is the first to have.
        counts: data set -> documents of it, and how many of them are missing.
    """

    wanted: dict[bytes, Positions] = field(default_factory=dict)
    batches: list[list[bytes]] = field(default_factory=list)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Positions that are to be kept."""
        return sum(map(len, self.wanted.values()))

    def tokens_of(self, keys: Iterable[bytes]) -> int:
        """Positions of some documents."""
        return sum(len(self.wanted[key]) for key in keys)


def plan(cache: Cache, data: Mapping[str, Iterable[Batch]]) -> Plan:
    """What a cache lacks of some data sets."""
    found = Plan()
    for name, batches in data.items():
        num_documents, num_missing = 0, 0
        for batch in batches:
            new: list[bytes] = []
            for document in documents(batch):
                num_documents += 1
                if cache.covers(document):
                    continue
                num_missing += 1
                key, positions_n = document.key, document.positions_n
                if key not in found.wanted:
                    new.append(key)
                    entry = cache.store.find(key)
                    found.wanted[key] = positions_n if entry is None else cache.kept_positions(entry)
                found.wanted[key] = np.union1d(found.wanted[key], positions_n)
            found.batches.append(new)
        found.counts[name] = (num_documents, num_missing)
    return found


@dataclass(frozen=True)
class Scribe:
    """Makes records of what a teacher says.

    Args:
        encoding: what is kept of a distribution.
        layout: of the records.
        temperature: of the distributions.
    """

    encoding: Encoding
    layout: Layout
    temperature: float

    @torch.no_grad()
    def records(
        self, signal: Signal, batch: Batch, wanted: Mapping[bytes, Positions]
    ) -> Iterator[tuple[bytes, Positions, bytes]]:
        """Key, positions and record of the documents that are wanted.

        Args:
            signal: of the teacher on the batch.
            batch: in which the documents are.
            wanted: key -> positions.

        Raises:
            RunError: what the teacher says somewhere is no distribution.
        """
        chosen: dict[bytes, Document] = {}
        for document in documents(batch):
            if document.key in wanted:
                chosen.setdefault(document.key, document)
        if not chosen:
            return
        places_n = np.concatenate([document.start + wanted[key] for key, document in chosen.items()])
        labels_n = np.concatenate([document.ids[wanted[key] + 1] for key, document in chosen.items()])
        draws = self.encoding.width if self.encoding.is_drawn else 0
        uniform_nD = uniform([(key, wanted[key]) for key in chosen], draws)
        tensors = [torch.from_numpy(values) for values in (places_n, labels_n.astype(np.int64), uniform_nD)]
        size = max(1, _LOGITS // self.layout.num_ids)
        kept_n = Kept.join([self._keep(signal, *part) for part in zip(*(t.split(size) for t in tensors), strict=True)])
        sizes = [len(wanted[key]) for key in chosen]
        for (key, document), kept in zip(chosen.items(), kept_n.split(sizes), strict=True):
            positions_n = wanted[key]
            yield key, positions_n, self.layout.encode(len(document.ids) - 1, positions_n, kept)

    def _keep(self, signal: Signal, places_n: Tensor, labels_n: Tensor, uniform_nD: Tensor) -> Kept:
        if isinstance(signal, SparseSignal):
            return self._code(*self._of_likeliest(signal[places_n.to(signal.ids_TK.device)]))
        assert isinstance(signal, DenseSignal), "a mixture is not cached"
        return self._code(*self._of_all(signal, places_n, labels_n, uniform_nD))

    def _of_all(
        self, signal: DenseSignal, places_n: Tensor, labels_n: Tensor, uniform_nD: Tensor
    ) -> tuple[Named, list[Exact]]:
        logits_nV = signal.logits.first(self.layout.num_ids).compute(places_n).float()
        labels_n, uniform_nD = labels_n.to(logits_nV.device), uniform_nD.to(logits_nV.device)
        log_p_nV = (logits_nV / self.temperature).log_softmax(-1)
        exact = [Exact.of(log_p_nV, labels_n)]
        if self.layout.num_temperatures == 2:
            exact.append(Exact.of(logits_nV.log_softmax(-1), labels_n))
        for known in exact:
            _require_numbers(known.log_p_likeliest_T, known.log_p_label_T, known.entropy_T)
        return self.encoding.name(log_p_nV, uniform_nD), exact

    def _of_likeliest(self, known: SparseSignal) -> tuple[Named, list[Exact]]:
        """Of a teacher that names its likeliest ids itself: as many as are kept, or more."""
        assert known.unsoftened is not None
        _require_numbers(known.unsoftened.log_p_likeliest_T)  # of label and entropy nan says that they are not told
        order_nK = known.log_p_TK.argsort(-1, descending=True)
        kept_nK, others_nK = order_nK[:, : self.layout.width], order_nK[:, self.layout.width :]
        log_tail_n = torch.logaddexp(known.log_tail_T, known.log_p_TK.gather(1, others_nK).logsumexp(-1))
        log_p_nK = known.log_p_TK.gather(1, kept_nK)
        return Named(known.ids_TK.gather(1, kept_nK), log_p_nK, log_tail_n=log_tail_n), [known.unsoftened]

    def _code(self, named: Named, exact: Sequence[Exact]) -> Kept:
        is_named_nK = named.log_p_nK > -torch.inf
        is_named_nK[:, 0] = True  # a row has one at least, if only with no probability

        def code(nats: Tensor) -> np.ndarray:
            return to_code(nats.cpu().numpy())

        def whole(numbers: Tensor) -> np.ndarray:
            return numbers.cpu().numpy().astype(np.uint32)

        nothing = np.empty(0, np.uint32)
        facts = [nats for e in exact for nats in (e.log_p_likeliest_T, e.log_p_label_T, -e.entropy_T)]
        tail_n = nothing
        if named.log_tail_n is not None:
            # a tail too small to be told from none would make reverse divergences infinite
            has_tail = self.layout.width < self.layout.num_ids
            tail_n = code(named.log_tail_n.clamp_min(-1e6) if has_tail else named.log_tail_n)
        return Kept(
            whole(is_named_nK.sum(-1)),
            whole(named.ids_nK[is_named_nK]),
            code(named.log_p_nK[is_named_nK]),
            nothing if named.counts_nK is None else whole(named.counts_nK[is_named_nK]),
            tail_n,
            whole(exact[0].likeliest_T),
            np.stack([code(nats.nan_to_num(nan=-torch.inf, neginf=-1e6)) for nats in facts], 1),
        )


def _require_numbers(*nats: Tensor) -> None:
    """Refuse a nan: as a code it would be a probability of 1.

    Raises:
        RunError: there is one.
    """
    for nats_n in nats:
        if num_lost := int(nats_n.isnan().sum()):
            raise RunError(
                f"the teacher's logits are nan or inf at {num_lost:,} of {len(nats_n):,} tokens: nothing of this batch "
                "is kept. Its weights are damaged, or its numbers too large for its dtype: teacher_dtype=fp32 tells"
            )


def rounds(
    batches: Iterable[Batch], plan: Plan, rank: int, world_size: int
) -> Iterator[tuple[Batch, Sequence[bytes], int]]:
    """The batches of a process that have something new, the documents that it is to keep, and the tokens of all.

    Every process has as many, since they may share the teacher: one that has run out gets another's, and keeps nothing.
    """
    group: list[tuple[Batch, list[bytes]]] = []
    news = ((batch, keys) for batch, keys in zip(batches, plan.batches, strict=True) if keys)

    def turn() -> tuple[Batch, Sequence[bytes], int]:
        batch, keys = group[min(rank, len(group) - 1)]
        return batch, keys if rank < len(group) else (), sum(plan.tokens_of(keys) for _, keys in group)

    for item in news:
        group.append(item)
        if len(group) == world_size:
            yield turn()
            group.clear()
    if group:
        yield turn()


def foreseen(
    turns: Iterable[tuple[Batch, Sequence[bytes], int]], ahead: Callable[[Iterable[Batch]], Iterator[Batch]]
) -> Iterator[tuple[Batch, Sequence[bytes], int]]:
    """The turns, which a teacher sees coming, with labels in the documents alone that are to be kept.

    Args:
        turns: of :func:`rounds`.
        ahead: of a teacher that is asked document by document.
    """
    seen, used = tee(turns)
    batches = ahead(_only(batch, keys) for batch, keys, _ in seen)
    for batch, (_, keys, num_tokens) in zip(batches, used, strict=False):
        yield batch, keys, num_tokens


def _only(batch: Batch, keys: Sequence[bytes]) -> Batch:
    labels_T = batch.labels_BS.flatten()
    kept_T = torch.full_like(labels_T, IGNORE_INDEX)
    for document in documents(batch):
        if document.key in keys:
            places_n = torch.from_numpy(document.start + document.positions_n).to(labels_T.device)
            kept_T[places_n] = labels_T[places_n]
    return replace(batch, labels_BS=kept_T.view_as(batch.labels_BS))


def fill(
    turns: Iterable[tuple[Batch, Sequence[bytes], int]],
    plan: Plan,
    ask: Callable[[Batch], Signal],
    scribe: Scribe,
    writer: Writer,
    begin: Callable[[int, int, float], None],
    progress: Callable[[int], object],
) -> None:
    """Ask and write down.

    Args:
        turns: of :func:`rounds`.
        plan: what is to be kept.
        ask: the teacher.
        scribe: makes records.
        writer: takes them.
        begin: called before anything is written, with the tokens, bytes and seconds of this process's first batch.
        progress: called with the tokens of all processes, turn by turn.
    """
    committed, is_begun = time.monotonic(), False
    try:
        for batch, keys, num_tokens in turns:
            started = time.monotonic()
            wanted = {key: plan.wanted[key] for key in keys}
            records = list(scribe.records(ask(batch), batch, wanted))
            if not is_begun:
                num_bytes = sum(len(record) for *_, record in records)
                begin(plan.tokens_of(keys), num_bytes, time.monotonic() - started)
                is_begun = True
            for key, positions_n, record in records:
                writer.add(key, positions_n, record)
            if time.monotonic() - committed > _COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()
            progress(num_tokens)
    finally:
        writer.close()
