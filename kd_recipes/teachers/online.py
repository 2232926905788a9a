"""A teacher that runs beside the student."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.signals import DenseSignal, Tap


class OnlineTeacher:
    """A frozen model: in eval mode, without gradients, in its own dtype and on its own device.

    Args:
        model: with its weights; it loses its head to the signal.
        device: that it computes on; its weights may be elsewhere until they are needed.
        taps: places inside it whose features its signal carries.
        compile_blocks: compile each block.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        device: torch.device,
        taps: Collection[Tap] = (),
        *,
        compile_blocks: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._headless = _torchtune.Headless(model, taps, compile_blocks=compile_blocks)
        self._device = device
        self.num_rows = _torchtune.model_size(model).num_rows

    @property
    def online(self) -> OnlineTeacher:
        """Itself: see :class:`~kd_recipes.teachers.Teacher`."""
        return self

    @property
    def models(self) -> Sequence[TransformerDecoder]:
        """The one."""
        return [self.model]

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's distribution at each position; it stays on the teacher's device until the loss asks for it."""
        return self._headless(batch.to(self._device))

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """As they are: it computes when it is asked."""
        return iter(batches)
