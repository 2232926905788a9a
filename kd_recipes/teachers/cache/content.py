"""What a teacher's word is kept under: the tokens that it has seen, whatever batch they came in.

A document ends where attention does, so that neither packing nor padding nor the order of a data set is part of it.
"""

# B sequences, S positions, n positions of a document that have a label

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """Tokens that attend to one another, up to the last that is a label.

    Args:
        ids: of its tokens, that last label included.
        start: its first position in the batch, counted over all sequences.
        positions_n: those that have a label, counted from its first.
    """

    ids: NDArray[np.int32]
    start: int
    positions_n: Positions

    @property
    def key(self) -> bytes:
        """16 bytes that say which tokens these are."""
        return hashlib.blake2b(self.ids.astype("<i4").tobytes(), digest_size=16).digest()


def documents(batch: Batch) -> list[Document]:
    """The documents of a batch that have a label, in order."""
    tokens_BS, labels_BS = (t.cpu().numpy() for t in (batch.tokens_BS, batch.labels_BS))
    length = tokens_BS.shape[1]
    starts_T = np.flatnonzero(_is_start(batch).cpu().numpy())
    labels_T, tokens_T = labels_BS.ravel(), tokens_BS.ravel()
    places_N = np.flatnonzero(labels_T != IGNORE_INDEX)
    owners_N = np.searchsorted(starts_T, places_N, side="right") - 1
    found = []
    for places in np.split(places_N, np.flatnonzero(np.diff(owners_N)) + 1) if len(places_N) else []:
        start = int(starts_T[owners_N[np.searchsorted(places_N, places[0])]])
        last = int(places[-1])
        assert start // length == last // length
        ids = np.append(tokens_T[start : last + 1], labels_T[last]).astype(np.int32)
        found.append(Document(ids, start, places - start))
    return found


def _is_start(batch: Batch) -> Tensor:
    """Where a document begins ``[B, S]``."""
    is_start_BS = torch.zeros(batch.tokens_BS.shape, dtype=torch.bool)
    if batch.input_pos_BS is not None:
        positions_BS = batch.input_pos_BS.cpu()
        is_start_BS = positions_BS == 0
        # torchtune counts a document that is longer than a pack modulo the pack's length; attention goes on there
        is_start_BS[:, 1:] &= positions_BS[:, :-1] != positions_BS.shape[1] - 1
    is_start_BS[:, 0] = True
    return is_start_BS.flatten()


def uniform(documents: Sequence[tuple[bytes, Positions]], num_draws: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1) for some positions of documents ``[n, num_draws]``, by their content alone.

    Args:
        documents: key and positions of each.
        num_draws: numbers for each position.
    """
    parts = [np.empty((0, num_draws))]
    for key, positions_n in documents:
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        parts.append(generator.random((int(positions_n[-1]) + 1, num_draws))[positions_n])
    return np.concatenate(parts)
