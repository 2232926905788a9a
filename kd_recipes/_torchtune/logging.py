"""What lies behind a metric logger's interface, which has words for numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtune.training.metric_logging import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard_writer(logger: Any) -> SummaryWriter | None:
    """The writer of torchtune's TensorBoard logger; None of any other logger, and of one that is closed."""
    return logger._writer if isinstance(logger, TensorBoardLogger) else None
