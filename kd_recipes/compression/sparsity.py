"""Connections that are not there: which ones can go, in a finished model or little by little while it is trained.

A zero is a zero in the weights themselves: whoever loads them has it, and no mask has to be kept beside them. It makes
a model neither smaller on disk nor faster by itself; a CUDA device multiplies 2:4 patterns faster, and files compress.
"""

# O outputs, I inputs, G groups of four inputs

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from kd_recipes.compression.checkpoint import HFCheckpoint, write_checkpoint
from kd_recipes.compression.constraint import Constraint
from kd_recipes.compression.form import Form
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import INPUT_OF, Stream, Text
from kd_recipes.errors import ConfigError, Problem

Pattern = Literal["unstructured", "2:4"]


@torch.no_grad()
def zero_mask(scores_OI: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Which connections go: those of least score in each row; of equals, the earlier.

    Rows are compared with themselves alone, as in Wanda: each output keeps as many inputs. With ``2:4`` at most two of
    four neighbours go, the lower ones, and with a sparsity of less than a half those of them that score least.

    Args:
        scores_OI: of each connection, not negative.
        sparsity: share of a row that goes, in [0, 1); at most 0.5 with ``2:4``.
        pattern: where it may go.

    Returns:
        bool ``[O, I]``, True where a connection goes.
    """
    num_zeros = min(round(sparsity * scores_OI.shape[1]), scores_OI.shape[1] - 1)  # a row that is empty is dead
    if pattern == "2:4":
        groups_OG4 = scores_OI.unflatten(1, (-1, 4))
        rank_OG4 = groups_OG4.argsort(dim=-1, stable=True).argsort(dim=-1)
        scores_OI = torch.where(rank_OG4 < 2, groups_OG4, torch.inf).flatten(1)
    order_OI = scores_OI.argsort(dim=1, stable=True)
    mask_OI = torch.zeros_like(scores_OI, dtype=torch.bool)
    return mask_OI.scatter_(1, order_OI[:, :num_zeros], True)


def _check(sparsity: float, pattern: str) -> None:
    if pattern not in ("unstructured", "2:4"):
        raise ConfigError(Problem(".pattern", pattern, "unstructured or 2:4"))
    most = 0.5 if pattern == "2:4" else 1
    if not 0 < sparsity < 1 or sparsity > most:
        raise ConfigError(
            Problem(".sparsity", sparsity, f"a share of zeros above 0 and {'at most 0.5' if most < 1 else 'below 1'}")
        )


@dataclass(frozen=True)
class Sparsification(Step):
    """Take connections out of the linear layers of all blocks of a finished model.

    Args:
        sparsity: share of the inputs that each output loses.
        pattern: ``unstructured``, or ``2:4``, two of each four neighbours, which CUDA's sparse tensor cores multiply.
        importance: ``wanda``, the weight's magnitude times the norm of its input on the text
            (https://arxiv.org/abs/2306.11695), or ``magnitude`` alone.

    Raises:
        ConfigError: a sparsity that leaves nothing, or that the pattern does not allow.
    """

    sparsity: float = 0.5
    pattern: Pattern = "unstructured"
    importance: Literal["wanda", "magnitude"] = "wanda"

    def __post_init__(self) -> None:
        _check(self.sparsity, self.pattern)
        if self.importance not in ("wanda", "magnitude"):
            raise ConfigError(Problem(".importance", self.importance, "wanda or magnitude"))

    def check(self, form: Form) -> Form:
        """See :class:`Step`."""
        form.require("sparsification", zeros=form.zeros == "2:4" and self.pattern != "2:4")
        require_fours(form, self.pattern)
        return replace(form, zeros=self.pattern)

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`; prints the share of zeros."""
        counts = torch.zeros(2, dtype=torch.int64)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from source.tensors(source.names(None))
            for block in Stream(source, text, "sparsify"):
                grams = block.grams(list(INPUT_OF)) if self.importance == "wanda" else {}
                for name in INPUT_OF:
                    weight_OI = block.weight(name)
                    scores_OI = weight_OI.abs()
                    if grams:
                        scores_OI = scores_OI * grams[name].diagonal().sqrt()
                    mask_OI = zero_mask(scores_OI, self.sparsity, self.pattern) | (weight_OI == 0)
                    block.set_weight(name, weight_OI.masked_fill(mask_OI, 0.0))
                    counts.add_(torch.tensor([int(mask_OI.sum()), mask_OI.numel()]))
                yield from block.tensors(source.config)

        record = self.describe()
        written = write_checkpoint(source, destination_dir, tensors(), record=record)
        tqdm.write(f"Zeros in the blocks' linear layers: {counts[0]:,} of {counts[1]:,} ({counts[0] / counts[1]:.1%})")
        return written


def require_fours(form: Form, pattern: Pattern) -> None:
    """Refuse 2:4 where a row does not divide by four.

    Raises:
        ConfigError: it does not.
    """
    odd = sorted({columns for _, columns in form.shapes.values() if columns % 4})
    if pattern == "2:4" and odd:
        raise ConfigError(Problem(".pattern", "2:4", f"inputs in multiples of 4, not {odd}", "Use unstructured"))


@dataclass(frozen=True)
class KeepZeros(Constraint):
    """A student that has lost connections does not grow them again: what is zero stays zero in every update."""

    def check(self, form: Form) -> None:
        """See :class:`Constraint`."""
        if form.zeros == "none":
            raise ConfigError(Problem("._component_", "KeepZeros", "a student that has zeros to keep"))
        _require_whole(form)

    @contextmanager
    def update(self, parameters: Mapping[str, Tensor], step: int, num_steps: int) -> Iterator[None]:
        """See :class:`Constraint`."""
        zeros = {name: weight == 0 for name, weight in _linears(parameters).items()}
        yield
        with torch.no_grad():
            for name, mask in zeros.items():
                parameters[name].mul_(~mask)  # in place, and where the weights are split, each process its own part


@dataclass(frozen=True)
class GradualSparsity(KeepZeros):
    """Take connections out of a student while it is trained, and keep them out.

    The share of zeros rises as ``sparsity * (1 - (1 - t)^3)`` while t goes from 0 at ``begin`` to 1 at ``end``
    (Zhu and Gupta, https://arxiv.org/abs/1710.01878): fast at first, when what goes is of little use. In each row the
    connections of least magnitude go.

    Args:
        sparsity: share of each row in the end.
        pattern: as in :class:`Sparsification`.
        begin: share of the run at which it begins.
        end: at which it is reached; the rest of the run heals.
        every_n_steps: how often connections go.

    Raises:
        ConfigError: a sparsity that leaves nothing, or a schedule that does not fit into the run.
    """

    sparsity: float = 0.5
    pattern: Pattern = "unstructured"
    begin: float = 0.0
    end: float = 0.7
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        _check(self.sparsity, self.pattern)
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(Problem(".end", [self.begin, self.end], "0 <= begin < end <= 1, shares of the run"))
        if self.every_n_steps < 1:
            raise ConfigError(Problem(".every_n_steps", self.every_n_steps, "a whole number above 0"))

    def check(self, form: Form) -> None:
        """See :class:`Constraint`."""
        _require_whole(form)
        require_fours(form, self.pattern)
        if form.schemes and form.zeros == "none":  # weights whose code is 0 would be held there from the start
            got = f"a student in {', '.join(sorted(form.schemes))}"
            remedy = "Take connections out first, and quantize then"
            raise ConfigError(Problem("._component_", got, "one whose weights are not on a lattice yet", remedy))
        if form.zeros == "2:4" and self.pattern != "2:4":
            raise ConfigError(Problem(".pattern", self.pattern, "2:4, as the student's zeros are"))

    def at(self, step: int, num_steps: int) -> float:
        """The share of zeros after ``step`` steps of ``num_steps``."""
        progress = (step / num_steps - self.begin) / (self.end - self.begin)
        return self.sparsity * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)

    def is_reached(self, step: int, num_steps: int) -> bool:
        """See :class:`Constraint`."""
        return step / num_steps >= self.end

    @contextmanager
    def update(self, parameters: Mapping[str, Tensor], step: int, num_steps: int) -> Iterator[None]:
        """See :class:`Constraint`."""
        with super().update(parameters, step, num_steps):
            yield
        is_end = step / num_steps >= self.end > (step - 1) / num_steps
        if step % self.every_n_steps and not is_end and step < num_steps:  # should the end be a step that is left out
            return
        with torch.no_grad():
            for weight in _linears(parameters).values():
                local_OI = _local(weight)  # whole rows: what is split over processes is split by rows
                local_OI.masked_fill_(zero_mask(local_OI.abs(), self.at(step, num_steps), self.pattern), 0.0)

    def metrics(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """See :class:`Constraint`."""
        locals_ = [_local(weight) for weight in _linears(parameters).values()]
        zeros = sum(int((weight == 0).sum()) for weight in locals_)
        return {"sparsity": zeros / max(1, sum(weight.numel() for weight in locals_))}


def _require_whole(form: Form) -> None:
    form.require("sparse training", zeros=False, unquantized=False)


def _local(weight: Tensor) -> Tensor:
    """What this process has of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _linears(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the blocks' linear layers."""
    suffixes = tuple(f".{name}.weight" for name in INPUT_OF)
    return {name: p for name, p in parameters.items() if name.startswith("layers.") and name.endswith(suffixes)}
