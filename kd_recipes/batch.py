"""A batch as the models and losses see it: labels stand where their predictions do."""

# B sequences, S positions

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a label that stands for no token; torch's and torchtune's value


@dataclass(frozen=True)
class Batch:
    """Some sequences.

    Args:
        tokens_BS: ids.
        labels_BS: the id of the *next* token at each position, or ``IGNORE_INDEX``.
        mask_BSS: which positions attend to which, for packed sequences; None is causal.
        input_pos_BS: positions within each document, for packed sequences.
        weights_BS: what each position's part of the objective is multiplied by; None is 1.
        sources_B: which of several data sets each sequence is of, from 0; None where there is one.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    mask_BSS: Tensor | None = None
    input_pos_BS: Tensor | None = None
    weights_BS: Tensor | None = None
    sources_B: Tensor | None = None

    @property
    def num_valid_tokens(self) -> int:
        """How many positions have a label."""
        return int((self.labels_BS != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        tensors = (
            *(self.tokens_BS, self.labels_BS, self.mask_BSS, self.input_pos_BS, self.weights_BS),
            self.sources_B,
        )
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))  # type: ignore[arg-type]


def shift_labels(collated: dict[str, Tensor]) -> Batch:
    """A batch from what torchtune's collate functions return, in which labels stand beside their own tokens.

    ``sources`` may be among it.

    The last token of each packed document gets no label: its successor is another document's first.
    """
    labels_BS = torch.full_like(collated["labels"], IGNORE_INDEX)
    labels_BS[:, :-1] = collated["labels"][:, 1:]
    input_pos_BS = collated.get("input_pos")
    if input_pos_BS is not None:
        labels_BS[:, :-1].masked_fill_(input_pos_BS[:, 1:] == 0, IGNORE_INDEX)
    return Batch(collated["tokens"], labels_BS, collated.get("mask"), input_pos_BS, sources_B=collated.get("sources"))
