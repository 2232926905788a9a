"""A teacher that runs beside the student."""

from __future__ import annotations

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.signals import DenseSignal


class OnlineTeacher:
    """A frozen model: in eval mode, without gradients, in its own dtype and on its own device.

    Args:
        model: with its weights; it loses its head to the signal.
    """

    def __init__(self, model: TransformerDecoder) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = _torchtune.take_head(model)
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states ``[B, S, D]``, on the teacher's device."""
        here = batch.to(self._device)
        return self.model(here.tokens_BS, mask=here.mask_BSS, input_pos=here.input_pos_BS)  # type: ignore[no-any-return]

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at each position, on the batch's own device."""
        there = batch.tokens_BS.device
        if there == self._device:
            return DenseSignal(self.hidden(batch), self.head.project)
        return DenseSignal(self.hidden(batch), lambda hidden: self.head.project(hidden).to(there))
