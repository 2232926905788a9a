"""A teacher that has been asked before: its word is read from disk, and no model is in memory."""

# B sequences, S positions, T = B * S, n positions with a label, K ids kept

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.errors import ConfigError, Problem, RunError, within
from kd_recipes.parts import build, build_model
from kd_recipes.signals import Exact, SparseSignal
from kd_recipes.teachers.cache.content import Document, documents
from kd_recipes.teachers.cache.encodings import Encoding, encoding_of
from kd_recipes.teachers.cache.identity import Identity, differences
from kd_recipes.teachers.cache.record import NUM_FACTS, Kept, Layout, first_of_each, from_code
from kd_recipes.teachers.cache.store import Entry, Store, has_records, positions_checksum
from kd_recipes.teachers.limits import loss_problems, temperature_problems
from kd_recipes.teachers.online import OnlineTeacher
from kd_recipes.teachers.teacher import CacheableSource, Surroundings, TeacherSource


def layout(identity: Identity) -> Layout:
    """How a cache's records are laid out."""
    width = identity.encoding.get("k") or identity.encoding["num_draws"]
    is_drawn = "num_draws" in identity.encoding
    width = width if is_drawn else min(width, identity.num_ids)
    return Layout(identity.num_ids, width, is_drawn, 1 if identity.temperature == 1 else 2)


class CachedTeacher(TeacherSource):
    """A teacher's word as ``cache_teacher`` has written it to disk.

    Args:
        path: directory of the cache.
        encoding: what is kept of a distribution, for ``cache_teacher``: a section of a
            :class:`~kd_recipes.teachers.TopK` or :class:`~kd_recipes.teachers.RandomSampling`. A distillation takes
            what it finds; if this is given, it has to be the same.
        source: what ``cache_teacher`` asks in the place of ``teacher_model``: a section of a
            :class:`~kd_recipes.teachers.RemoteTeacher`. A distillation does not ask it.
    """

    def __init__(
        self, path: str, encoding: Mapping[str, Any] | None = None, source: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        self.source: CacheableSource | None = None
        if source is not None:
            self.source = within(".source", lambda: build("", DictConfig(source)))
            if not isinstance(self.source, CacheableSource):
                wanted = "a kd_recipes.teachers.RemoteTeacher"
                raise ConfigError(Problem(".source", source.get("_component_"), wanted))
        self.encoding: Encoding | None = None
        if encoding is not None:
            self.encoding = within(".encoding", lambda: build("", DictConfig(encoding)))
            if not isinstance(self.encoding, Encoding):
                wanted = "a kd_recipes.teachers.TopK or RandomSampling"
                raise ConfigError(Problem(".encoding", encoding.get("_component_"), wanted))

    def problems(self, cfg: DictConfig) -> Iterator[Problem]:
        """What of the config the cache does not suit."""
        identity = Identity.load(self.path)
        if identity is None:
            remedy = "tune run kd_recipes.cache_teacher with this config makes one"
            yield Problem(".path", str(self.path), "a directory that cache_teacher has written", remedy)
            return
        if self.encoding is not None and self.encoding.settings() != dict(identity.encoding):
            wanted = f"that of the cache, {dict(identity.encoding)}"
            yield Problem(".encoding", self.encoding.settings(), wanted, "Leave it out, or make another cache")
        yield from differences(identity, cfg, self.path, self.source.describe() if self.source else None)
        yield from temperature_problems(cfg, identity.temperature, "at which the cache was made")
        yield from loss_problems(cfg, is_drawn=self._layout.is_drawn)
        model = build_model("model", cfg.model, dtype=torch.bfloat16, device=torch.device("meta"))
        if (num_rows := _torchtune.model_size(model).num_rows) < identity.num_ids:
            wanted = f"a student with the {identity.num_ids} ids of the cache"
            yield Problem("model", f"{num_rows} rows", wanted, "Make the cache with this student in the config")

    def choose_encoding(self) -> Encoding:
        """What ``cache_teacher`` is to keep: what is given here, or what the cache that is there has.

        Raises:
            ConfigError: neither says, or the source does not tell as much.
        """
        there = Identity.load(self.path)
        encoding = self.encoding or (encoding_of(there.encoding) if there else None)
        if encoding is None:
            remedy = "kd_recipes.teachers.RandomSampling {num_draws: 50} needs the least room"
            raise ConfigError(Problem(".encoding", None, "a kd_recipes.teachers.TopK or RandomSampling", remedy))
        if self.source is not None and (encoding.is_drawn or encoding.width > self.source.k):
            wanted = f"a kd_recipes.teachers.TopK of at most {self.source.k}, the ids that the server is asked for"
            got = encoding.settings() if self.encoding else f"{encoding.settings()}, of the cache"
            raise ConfigError(Problem(".encoding", got, wanted))
        return encoding

    def recorded(self) -> Identity | None:
        """What the cache is of; None where none is there, or one without a record, which may be replaced."""
        return Identity.load(self.path) if has_records(self.path) else None

    def num_ids(self, num_rows: int) -> int:
        """Those of the cache, to which a student with more gives no mass."""
        identity = Identity.load(self.path)
        return num_rows if identity is None else min(num_rows, identity.num_ids)

    @property
    def _layout(self) -> Layout:
        identity = Identity.load(self.path)
        assert identity is not None
        return layout(identity)

    def num_missing(self, batches: Iterable[Batch]) -> int:
        """How many documents of the batches the cache does not have, or not at all their labels."""
        cache = self._cache
        return sum(not cache.covers(document) for batch in batches for document in documents(batch))

    def open_cache(self) -> Cache:
        """What is on disk now."""
        identity = Identity.load(self.path)
        assert identity is not None
        return Cache(Store(self.path), identity)

    def open(self, around: Surroundings) -> Cache:
        """The cache, ready to be asked."""
        return self._cache

    @cached_property
    def _cache(self) -> Cache:
        return self.open_cache()


class Cache:
    """A teacher that looks up what it has said.

    Args:
        store: of its records.
        identity: what they are of.
    """

    def __init__(self, store: Store, identity: Identity) -> None:
        self.store, self._identity = store, identity
        self._layout = layout(identity)

    @property
    def online(self) -> OnlineTeacher | None:
        """None: no model is here."""
        return None

    @property
    def models(self) -> Sequence[TransformerDecoder]:
        """None."""
        return ()

    def covers(self, document: Document) -> bool:
        """Whether the labels of a document can be looked up."""
        entry = self.store.find(document.key)
        if entry is None:
            return False
        if entry.positions == positions_checksum(document.positions_n):
            return True
        return bool(np.isin(document.positions_n, self.kept_positions(entry)).all())

    def kept_positions(self, entry: Entry) -> np.ndarray:
        """Which positions of a document are kept."""
        return self._layout.positions(self.store.read(entry))

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """As they are: reading takes no time worth mentioning."""
        return iter(batches)

    def signal(self, batch: Batch) -> SparseSignal:
        """What the teacher has said of a batch.

        Raises:
            RunError: it has never been asked.
            StorageError: what it said is damaged.
        """
        found = documents(batch)
        num_tokens = batch.tokens_BS.numel()
        places_n = np.concatenate(
            [np.empty(0, np.int64), *(document.start + document.positions_n for document in found)]
        )
        kept = Kept.join([Kept.of(self._num_facts), *map(self._look_up, found)])
        return self._signal(kept, torch.from_numpy(places_n), num_tokens).to(batch.tokens_BS.device)

    @property
    def num_ids(self) -> int:
        """That its distributions are over."""
        return self._identity.num_ids

    @property
    def _num_facts(self) -> int:
        return NUM_FACTS * self._layout.num_temperatures

    def _look_up(self, document: Document) -> Kept:
        entry = self.store.find(document.key)
        again = "run cache_teacher again, which adds what is missing"
        if entry is None:
            raise RunError(f"the cache has nothing on a document of {len(document.ids)} tokens: {again}")
        positions_n, kept = self._layout.decode(self.store.read(entry))
        if entry.positions == positions_checksum(document.positions_n):
            return kept
        is_wanted_n = np.isin(positions_n, document.positions_n)
        if is_wanted_n.sum() < len(document.positions_n):
            raise RunError(f"the cache has other labels of a document than are asked for (masking differs): {again}")
        return kept.at(is_wanted_n)

    def _signal(self, kept: Kept, places_n: Tensor, num_tokens: int) -> SparseSignal:
        """From ids one after the other to a row each."""
        num_rows, width = len(kept.num_n), self._layout.width
        rows_M = np.repeat(np.arange(num_rows), kept.num_n)
        columns_M = np.arange(len(kept.ids_M)) - np.repeat(first_of_each(kept.num_n), kept.num_n)

        def spread(values_M: np.ndarray, empty: float) -> Tensor:
            table_nK = np.full((num_rows, width), empty, values_M.dtype)
            table_nK[rows_M, columns_M] = values_M
            return torch.from_numpy(table_nK)

        def place(values_n: Tensor) -> Tensor:
            if num_rows == num_tokens:
                return values_n
            table_T = values_n.new_zeros(num_tokens, *values_n.shape[1:])
            table_T[places_n] = values_n
            return table_T

        log_p_nK = spread(from_code(kept.log_p_M), -np.inf)
        weights_TK, log_tail_n = None, torch.full((num_rows,), -torch.inf)
        if self._layout.is_drawn:
            weights_TK = place(spread(kept.counts_M.astype(np.float32) / self._layout.width, 0.0))
        else:  # rounded numbers of a distribution that sums to 1
            log_tail_n = torch.from_numpy(from_code(kept.tail_n))
            sum_n1 = torch.logaddexp(log_p_nK.logsumexp(-1), log_tail_n).unsqueeze(1)
            log_p_nK, log_tail_n = log_p_nK - sum_n1, log_tail_n - sum_n1[:, 0]
        likeliest_T = place(torch.from_numpy(kept.likeliest_n.astype(np.int64)))
        facts_nF = from_code(kept.facts_nF)
        facts_FT = place(torch.from_numpy(np.where(np.isneginf(facts_nF), np.nan, facts_nF))).T
        exact = [Exact(likeliest_T, top_T, label_T, -minus_T) for top_T, label_T, minus_T in facts_FT.split(NUM_FACTS)]
        ids_TK = place(spread(kept.ids_M.astype(np.int64), 0))
        known = exact[0] if self._identity.is_whole else None  # else the loss is told of the ids that are named
        rest = (place(log_tail_n), self._identity.temperature, weights_TK, known, exact[-1])
        return SparseSignal(ids_TK, place(log_p_nK), *rest)
