"""A model on held-out text, with how sure that is; sequences are what was drawn, so sequences are what varies."""

# N tokens, D sequences

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.evaluation.calibration import Reliability
from kd_recipes.evaluation.results import TextFigures
from kd_recipes.evaluation.tokens import token_values
from kd_recipes.evaluation.uncertainty import Estimate, paired_difference, percentiles, ratio_with_interval
from kd_recipes.signals import DenseSignal

_SUMS = ("cross_entropy", "accuracy", "entropy", "kl", "agreement")
Numbered = tuple[int, Batch]


def measure_text(
    model: Callable[[int, Batch], DenseSignal],
    reference: Callable[[int, Batch], DenseSignal],
    batches: Iterable[Numbered],
    *,
    num_ids: int,
    count_bytes: Callable[[Sequence[int]], int],
    gather: Callable[[Any], list[Any]] = lambda part: [part],
) -> TextFigures:
    """Run a model over held-out text.

    Args:
        model: number of a batch, batch -> its distribution at each position.
        reference: the same of the model that it is measured against, which may be itself.
        batches: this process's, each with its number.
        num_ids: ids that both have.
        count_bytes: ids -> bytes of UTF-8 that they stand for.
        gather: an object -> those of all processes.
    """
    reliability = Reliability()
    rows: list[tuple[int, int, dict[str, float]]] = []
    divergences: list[Tensor] = []
    for number, batch in batches:
        tokens = token_values(model(number, batch), reference(number, batch), batch, num_ids=num_ids)
        if not tokens.values:  # every label of the batch is masked
            continue
        reliability.add(tokens.values["confidence"], tokens.values["accuracy"])
        divergences.append(tokens.values["kl"])
        for row in tokens.rows_N.unique().tolist():
            here_N = tokens.rows_N == row
            sums = {name: float(tokens.values[name][here_N].double().sum()) for name in _SUMS}
            counts = {"num_tokens": int(here_N.sum()), "num_bytes": count_bytes(tokens.labels_N[here_N].tolist())}
            rows.append((number, row, {**counts, **sums}))
    parts = gather((rows, torch.cat(divergences) if divergences else torch.empty(0), reliability))
    ordered = sorted(chain(*(part[0] for part in parts)), key=lambda row: row[:2])
    by_sequence = {name: [sums[name] for _, _, sums in ordered] for name in ("num_tokens", "num_bytes", *_SUMS)}
    return _figures(by_sequence, torch.cat([part[1] for part in parts]), sum((p[2] for p in parts[1:]), parts[0][2]))


def _figures(by_sequence: dict[str, list[float]], divergences_N: Tensor, reliability: Reliability) -> TextFigures:
    columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in by_sequence.items()}
    bits_D = columns["cross_entropy"] / math.log(2)
    tokens_D = columns["num_tokens"]
    median, p99 = percentiles(divergences_N, (0.5, 0.99))
    return TextFigures(
        num_tokens=int(tokens_D.sum()),
        num_bytes=int(columns["num_bytes"].sum()),
        bits_per_byte=ratio_with_interval(bits_D, columns["num_bytes"]),
        **{
            name: ratio_with_interval(columns[name], tokens_D)
            for name in ("cross_entropy", "accuracy", "kl", "agreement")
        },
        kl_median=median,
        kl_p99=p99,
        entropy=float(columns["entropy"].sum() / tokens_D.sum()),
        calibration_error=reliability.expected_calibration_error,
        reliability=reliability.bins,
        by_sequence=by_sequence,
    )


def change(text: TextFigures, reference: TextFigures) -> Estimate:
    """Bits a byte of a model less the reference's, on the same sequences."""
    ours_D, theirs_D = (torch.tensor(t.by_sequence["cross_entropy"]).double() / math.log(2) for t in (text, reference))
    return paired_difference(ours_D, theirs_D, torch.tensor(text.by_sequence["num_bytes"]))


def bytes_counter(tokenizer: Any) -> Callable[[Sequence[int]], int]:
    """Of a tokenizer of torchtune's protocol: ids -> bytes of the text that they stand for, special tokens none."""
    special = set((getattr(tokenizer, "special_tokens", None) or {}).values()) | {tokenizer.eos_id, tokenizer.pad_id}

    def count(ids: Sequence[int]) -> int:
        return len(str(tokenizer.decode([i for i in ids if i not in special and i != IGNORE_INDEX])).encode())

    return count
