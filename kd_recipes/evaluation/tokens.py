"""What a model says of each token of a text, alone and beside a reference: the numbers that all others are made of."""

# B sequences, S positions, T = B * S, N tokens with a label, n some of them, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.signals import DenseSignal, Signal

MAX_LOGITS = 2**24  # of a model that exist at a time, in float32


@dataclass(frozen=True)
class TokenValues:
    """Of each token that has a label, in float32 on the host.

    Args:
        rows_N: the sequence of the batch that it is in.
        labels_N: its id.
        values: name -> ``[N]``. ``cross_entropy`` with the label and ``entropy`` in nats; ``accuracy``: 1 where the
            likeliest id is the label; ``confidence``: its probability. With a reference also ``kl`` (reference ||
            model) and ``reverse_kl`` in nats, ``agreement``: 1 where both have the same likeliest id,
            ``reference_cross_entropy``, ``reference_entropy``, ``reference_accuracy``, ``reference_confidence``.
    """

    rows_N: Tensor
    labels_N: Tensor
    values: Mapping[str, Tensor]


@torch.no_grad()
def token_values(model: DenseSignal, reference: Signal | None, batch: Batch, *, num_ids: int) -> TokenValues:
    """Compare a model with a batch's labels, and with a reference; logits exist for some tokens at a time.

    Args:
        model: on the batch.
        reference: on the same batch; may be on another device.
        batch: its labels say which tokens count.
        num_ids: ids that count: those beyond are padding of the vocabulary.
    """
    labels_T = batch.labels_BS.flatten()
    positions_N = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
    parts: list[dict[str, Tensor]] = []
    for positions_n in positions_N.split(max(1, MAX_LOGITS // num_ids)):
        log_q_nV = _log_softmax(model, positions_n, num_ids)
        labels_n = labels_T[positions_n].to(log_q_nV.device)
        values = _alone(log_q_nV, labels_n)
        if reference is not None:
            assert isinstance(reference, DenseSignal)
            log_p_nV = _log_softmax(reference, positions_n, num_ids).to(log_q_nV.device)
            values |= {f"reference_{name}": value for name, value in _alone(log_p_nV, labels_n).items()}
            values |= _beside(log_q_nV, log_p_nV)
        parts.append({name: value.cpu() for name, value in values.items()})
    names = parts[0] if parts else ()
    joined = {name: torch.cat([part[name] for part in parts]) for name in names}
    return TokenValues((positions_N // batch.labels_BS.shape[1]).cpu(), labels_T[positions_N].cpu(), joined)


def _log_softmax(signal: DenseSignal, positions_n: Tensor, num_ids: int) -> Tensor:
    return signal.logits.first(num_ids).compute(positions_n).float().log_softmax(-1)


def _alone(log_q_nV: Tensor, labels_n: Tensor) -> dict[str, Tensor]:
    highest_n, likeliest_n = log_q_nV.max(-1)
    return {
        "cross_entropy": -log_q_nV.gather(1, labels_n[:, None])[:, 0],
        "entropy": -_expectation(log_q_nV, log_q_nV),
        "accuracy": (likeliest_n == labels_n).float(),
        "confidence": highest_n.exp(),
    }


def _beside(log_q_nV: Tensor, log_p_nV: Tensor) -> dict[str, Tensor]:
    difference_nV = log_p_nV - log_q_nV
    return {
        "kl": _expectation(log_p_nV, difference_nV),
        "reverse_kl": -_expectation(log_q_nV, difference_nV),
        "agreement": (log_p_nV.argmax(-1) == log_q_nV.argmax(-1)).float(),
    }


def _expectation(log_p_nV: Tensor, values_nV: Tensor) -> Tensor:
    """Of values under a distribution; an id of no probability counts nothing, whatever its value."""
    return torch.where(log_p_nV == -torch.inf, 0.0, log_p_nV.exp() * values_nV).sum(-1)
