"""A teacher that runs beside the student."""

from __future__ import annotations

import torch
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
        self._head = _torchtune.take_head(model)
        self._device = next(model.parameters()).device
        self.num_rows = _torchtune.model_size(model).num_rows

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at each position; it stays on the teacher's device until the loss asks for it."""
        here = batch.to(self._device)
        hidden_BSD = self.model(here.tokens_BS, mask=here.mask_BSS, input_pos=here.input_pos_BS)
        return DenseSignal(self._head.logits(hidden_BSD.flatten(0, 1)))
