"""Models that are easier to quantize, and compute what they did: large input channels are made smaller, weights larger.

What a linear layer computes is the same when an input channel is divided by a scale and its column multiplied by it.
The division is folded into what comes before: the scale of a norm, the rows of a projection. So the result is a plain
dense model of the same architecture, and whatever quantizes it afterwards loses less.
"""

# T tokens, O outputs, I inputs of a layer, K channels before it (fewer than I where query heads share a value head)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from kd_recipes.compression.checkpoint import HFCheckpoint, write_checkpoint
from kd_recipes.compression.form import Form
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import Block, Stream, Text, require_finite
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import Scheme, quantize

_TINY = 1e-5  # of the largest channel: one that is smaller is dead, and its scale 1
_NUM_EXPONENTS = 20  # that awq tries, from 0 on
_ALPHA = 0.5


@dataclass(frozen=True)
class _Pair:
    """Layers that have one input, and the module of a block that each channel of it comes from.

    What lies between is linear in the channel: nothing, attention's mean over positions, the product with a gate.

    Args:
        before: the module.
        after: the layers.
        num_groups: key-value heads, where the channels before are theirs.
        num_sharing: query heads that share one.
    """

    before: str
    after: tuple[str, ...]
    num_groups: int = 1
    num_sharing: int = 1

    def pooled(self, values_I: Tensor) -> Tensor:
        """``[K]``, the largest of a value over the inputs that come from the same channel."""
        return values_I.view(self.num_groups, self.num_sharing, -1).amax(1).flatten()

    def spread(self, values_K: Tensor) -> Tensor:
        """``[I]``, for each input the value of the channel that it comes from."""
        return values_K.view(self.num_groups, 1, -1).expand(-1, self.num_sharing, -1).flatten()


def _pairs(form: Form) -> list[_Pair]:
    return [
        _Pair("sa_norm", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        _Pair("attn.v_proj", ("attn.output_proj",), form.num_kv_heads, form.num_heads // form.num_kv_heads),
        _Pair("mlp_norm", ("mlp.w1", "mlp.w3")),
        _Pair("mlp.w3", ("mlp.w2",)),
    ]


@dataclass
class _Inputs:
    """What is known of a layer's inputs x; sums are over the tokens."""

    needs_gram: bool
    largest_I: Tensor = field(default_factory=lambda: torch.zeros(()))  # max |x|
    sum_I: Tensor = field(default_factory=lambda: torch.zeros(()))  # of |x|
    gram_II: Tensor = field(default_factory=lambda: torch.zeros(()))  # of x x^T

    def see(self, x_TI: Tensor, _output: Tensor) -> None:
        """Take more of them in."""
        if not len(x_TI):  # a window in which no token counts
            return
        magnitude_TI = x_TI.abs()
        self.largest_I = torch.maximum(magnitude_TI.amax(0), self.largest_I.to(x_TI.device))
        self.sum_I = magnitude_TI.sum(0) + self.sum_I.to(x_TI.device)
        if self.needs_gram:
            self.gram_II = x_TI.T @ x_TI + self.gram_II.to(x_TI.device)


@dataclass(frozen=True)
class _Outcome:
    """Of one pair: whether it got scales, and what the method makes smaller, before and after."""

    is_scaled: bool
    before: float
    after: float


@dataclass(frozen=True)
class Smoothing(Step):
    """Rescale the inputs of the blocks' linear layers for a quantization that follows.

    Args:
        method: ``smoothquant`` balances the largest input and the largest weight of each channel,
            ``s = max|x|^alpha / max|w|^(1 - alpha)`` (https://arxiv.org/abs/2211.10438), for schemes that round inputs
            too; ``awq`` protects the columns of large inputs, ``s = mean|x|^a``, with the ``a`` whose error is least
            when the weights are rounded to ``scheme`` (https://arxiv.org/abs/2306.00978).
        alpha: of ``smoothquant``: how much of the inputs' range goes into the weights; 0.5 by default.
        scheme: of ``awq``: the one of the quantization that follows.

    Raises:
        ConfigError: a method or scheme that there is not, or a setting of the other method.
    """

    method: Literal["smoothquant", "awq"]
    alpha: float | None = None
    scheme: str | None = None

    def __post_init__(self) -> None:
        unused = {"smoothquant": "scheme", "awq": "alpha"}.get(self.method)
        if unused is None:
            raise ConfigError(Problem(".method", self.method, "smoothquant or awq"))
        if (got := getattr(self, unused)) is not None:
            raise ConfigError(Problem(f".{unused}", got, f"no {unused} with {self.method}, which does not use it"))
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(Problem(".alpha", self.alpha, "a number from 0 to 1"))
        if self.method == "awq":
            if self.scheme is None:
                wanted = "the scheme of the quantization that follows, such as gguf_q4_0"
                raise ConfigError(Problem(".scheme", None, wanted, "awq looks for the scales that it gains most by"))
            Scheme.parse(self.scheme, key=".scheme")

    def check(self, form: Form) -> Form:
        """See :class:`Step`; what is left has the form that there was."""
        form.require("smoothing", zeros=False)
        if self.scheme is not None:
            for _, in_dim in form.shapes.values():
                Scheme.parse(self.scheme).check(in_dim, ".scheme")
        return form

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`; prints how many scales there are, and what they gain."""
        text.require_tokens()
        pairs, outcomes = _pairs(Form(source.config)), list[_Outcome]()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from source.tensors(source.names(None))
            for block in Stream(source, text, "smooth"):
                outcomes.extend(self._smooth(block, pairs))
                yield from block.tensors(source.config)

        record = {**self.describe(), **({"alpha": self._alpha} if self.method == "smoothquant" else {})}
        written = write_checkpoint(source, destination_dir, tensors(), record=record)
        tqdm.write(self._report(outcomes))
        return written

    @property
    def _alpha(self) -> float:
        return _ALPHA if self.alpha is None else self.alpha

    @torch.no_grad()
    def _smooth(self, block: Block, pairs: Sequence[_Pair]) -> list[_Outcome]:
        inputs = {pair: _Inputs(self.method == "awq") for pair in pairs}
        block.run({pair.after[0]: seen.see for pair, seen in inputs.items()})
        require_finite((seen.sum_I for seen in inputs.values()), f"block {block.index}")
        device = block.text.device
        state = {key: value.to(device, torch.float32) for key, value in block.state.items()}  # rounded once, at the end
        outcomes = []
        for pair, seen in inputs.items():
            weights = [state[f"{name}.weight"] for name in pair.after]
            if self.method == "awq":
                scales_K, outcome = _search(pair, seen, weights, Scheme.parse(str(self.scheme)))
            else:
                scales_K, outcome = _balance(pair, seen, weights, self._alpha)
            _fold(pair, scales_K, state, {key: value.dtype for key, value in block.state.items()})
            outcomes.append(outcome)
        for key, value in state.items():  # the layer itself may stay as it was: what it gives is the same
            block.state[key] = value.to(block.state[key].dtype).cpu()
        return outcomes

    def _report(self, outcomes: Sequence[_Outcome]) -> str:
        count, total = sum(outcome.is_scaled for outcome in outcomes), len(outcomes)
        text = f"Scales for {count} of {total} inputs ({count / total:.1%}); "
        if self.method == "awq":
            gain = sum(1 - outcome.after / outcome.before for outcome in outcomes if outcome.before) / total
            return f"{text}error of the outputs in {self.scheme}: {gain:.1%} less on average"
        means = (sum(getattr(outcome, name) for outcome in outcomes) / total for name in ("before", "after"))
        return f"{text}largest channel over the mean one: {' -> '.join(f'{mean:.1f}' for mean in means)} on average"


def _balance(pair: _Pair, seen: _Inputs, weights: Sequence[Tensor], alpha: float) -> tuple[Tensor, _Outcome]:
    """SmoothQuant's scales; its outcome is the largest channel over the mean one."""
    largest_K = pair.pooled(seen.largest_I)
    weight_K = pair.pooled(torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0))
    is_alive_K = _is_alive(largest_K) & _is_alive(weight_K)
    scales_K = torch.where(is_alive_K, largest_K.pow(alpha) / weight_K.pow(1 - alpha), 1.0)
    before, after = (
        float(values_I.max() / values_I.mean().clamp_min(torch.finfo(torch.float32).tiny))
        for values_I in (seen.largest_I, seen.largest_I / pair.spread(scales_K))
    )
    return scales_K, _Outcome(bool((scales_K != 1).any()), before, after)


def _search(pair: _Pair, seen: _Inputs, weights: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, _Outcome]:
    """AWQ's scales; its outcome is the squared error of the outputs.

    With ``W`` in its rounded form ``V = quantize(W s) / s`` the error is ``sum_t |(W - V) x_t|^2``, which is the trace
    of ``(W - V) G (W - V)^T`` with the Gram matrix ``G`` of the inputs.
    """

    def error(scales_I: Tensor) -> float:
        total = 0.0
        for weight_OI in weights:
            rounded_OI = quantize(weight_OI * scales_I, scheme).dequantize() / scales_I
            off_OI = weight_OI - rounded_OI
            total += float(((off_OI @ seen.gram_II) * off_OI).sum(dtype=torch.float64))
        return total

    scales_K = torch.ones_like(pair.pooled(seen.sum_I))
    before = least = error(pair.spread(scales_K))
    for index in range(1, _NUM_EXPONENTS):
        tried_K = _powers(pair.pooled(seen.sum_I), index / _NUM_EXPONENTS)
        if (tried := error(pair.spread(tried_K))) < least:
            scales_K, least = tried_K, tried
    return scales_K, _Outcome(least < before, before, least)


def _powers(sum_K: Tensor, exponent: float) -> Tensor:
    """``mean|x|^exponent``, over the geometric mean of its extremes, so that scales lie around 1; 1 where it is dead.

    A sum does for a mean: the number of tokens cancels out.
    """
    is_alive_K = _is_alive(sum_K)
    powers_K = torch.where(is_alive_K, sum_K, sum_K.max()).pow(exponent)
    return torch.where(is_alive_K, powers_K / (powers_K.max() * powers_K.min()).sqrt(), 1.0)


def _is_alive(values: Tensor) -> Tensor:
    return values > _TINY * values.max()


def _fold(pair: _Pair, scales_K: Tensor, state: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Divide what comes before by scales, and multiply the columns after it.

    Args:
        pair: of them.
        scales_K: the scales.
        state: a block's parameters, float32; these are replaced.
        dtypes: that they will be written in.
    """
    for key in [key for key in state if key.startswith(f"{pair.before}.")]:
        old, dtype = state[key], dtypes[key]
        new = old / scales_K.view(-1, *[1] * (old.ndim - 1))
        if key.endswith(".scale"):
            # a norm's scale is one number for a whole channel: what its rounding leaves goes into the columns
            new = new.to(dtype).float()
            is_fit_K = new.isfinite() & (new != 0)
            scales_K, new = torch.where(is_fit_K, old / new, 1.0), torch.where(is_fit_K, new, old)
        state[key] = new
    for name in pair.after:
        state[f"{name}.weight"] = state[f"{name}.weight"] * pair.spread(scales_K)
