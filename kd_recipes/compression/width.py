"""Which neurons, heads and channels of a model matter: what adds least to what comes after can go.

What is left is a dense model of the same family whose matrices are smaller. Feed-forward layers and attention make up
for what they have lost as far as a linear map can: the projection behind the cut is fitted to what it gave before.
"""

# L blocks, T tokens, F neurons, G key-value heads, Z attention outputs (heads * head_dim), D channels, K kept

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError, Problem

# of the mean squared input of a projection, added to each: a fit to few tokens must not follow their noise
_RIDGE = 0.01


@dataclass(frozen=True)
class WidthPruning:
    """How much to keep of each width: a whole number is a size, a number below 1 a share; None keeps all.

    Args:
        intermediate_dim: neurons of each feed-forward layer.
        num_kv_heads: key-value heads of each block; each goes with the query heads that share it.
        embed_dim: channels of the residual stream.
        multiple_of: neurons and channels are rounded to a multiple of this, for kernels and quantization groups.
        refit: fit the projections behind what was cut anew, on the calibration text.

    Raises:
        ConfigError: nothing is asked for, or a number that is neither a size nor a share.
    """

    intermediate_dim: float | None = None
    num_kv_heads: float | None = None
    embed_dim: float | None = None
    multiple_of: int = 32
    refit: bool = True

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in ("intermediate_dim", "num_kv_heads", "embed_dim")}
        if not any(value is not None for value in asked.values()):
            raise ConfigError(Problem("method", None, f"at least one of {', '.join(asked)}"))
        for name, value in asked.items():
            if value is not None and (value <= 0 or (value > 1 and value != int(value))):
                raise ConfigError(Problem(f"method.{name}", value, "a size (from 1) or a share (below 1)"))
        if self.multiple_of < 1:
            raise ConfigError(Problem("method.multiple_of", self.multiple_of, "a whole number above 0"))

    def sizes(self, intermediate_dim: int, num_kv_heads: int, embed_dim: int) -> tuple[int, int, int]:
        """What is kept of a model of these sizes.

        Raises:
            ConfigError: nothing, or more than there is.
        """
        return (
            self._size("intermediate_dim", intermediate_dim, self.multiple_of),
            self._size("num_kv_heads", num_kv_heads, 1),
            self._size("embed_dim", embed_dim, self.multiple_of),
        )

    def _size(self, name: str, full: int, multiple_of: int) -> int:
        value = getattr(self, name)
        if value is None or value == full:
            return full
        size = round(value * full / multiple_of) * multiple_of if value < 1 else int(value)
        if not 0 < size < full or size % multiple_of:
            multiple = f", in multiples of {multiple_of} (method.multiple_of)" if multiple_of > 1 else ""
            raise ConfigError(Problem(f"method.{name}", value, f"from 1 to {full}, the model's{multiple}"))
        return size


@dataclass
class Moments:
    """Second moments of what flows through a model, on calibration text: sums over tokens, float32, on the CPU.

    Args:
        neurons_LFF: of the inputs of each block's down projection.
        attention_LZZ: of those of its output projection.
        entering_D: of the inputs of each norm, in order: two of each block, and the last.
        normed_D: of their outputs.
        num_tokens: how many were summed.
    """

    neurons_LFF: list[Tensor] = field(default_factory=list)
    attention_LZZ: list[Tensor] = field(default_factory=list)
    entering_D: list[Tensor] = field(default_factory=list)
    normed_D: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0


@torch.no_grad()
def collect_moments(model: TransformerDecoder, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Moments:
    """Second moments of all that width pruning looks at.

    They take ``num_layers * (intermediate_dim^2 + (num_heads * head_dim)^2) * 4`` bytes.

    Args:
        model: in eval mode, with its weights.
        batches: ids ``[B, S]``, and which of them count (bool ``[B, S]``; None for all), on the model's device.

    Raises:
        ConfigError: no token counts, or what flows is not finite.
    """
    moments, valid = Moments(), torch.empty(0)
    handles: list[Any] = []

    def tokens(values: Tensor) -> Tensor:
        return values.reshape(-1, values.shape[-1])[valid].float()

    def watch(module: nn.Module, sums: list[Tensor], size: int, *, is_square: bool, of_output: bool = False) -> None:
        index = len(sums)
        sums.append(torch.zeros(size, size) if is_square else torch.zeros(size))

        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x_TC = tokens(output if of_output else args[0])
            sums[index] += (x_TC.T @ x_TC if is_square else x_TC.square().sum(0)).cpu()

        handles.append(module.register_forward_hook(add))

    for block in model.layers:
        watch(block.mlp.w2, moments.neurons_LFF, block.mlp.w2.weight.shape[1], is_square=True)
        projection = block.attn.output_proj
        watch(projection, moments.attention_LZZ, projection.weight.shape[1], is_square=True)
    norms = [norm for block in model.layers for norm in (block.sa_norm, block.mlp_norm)]
    for norm in (*norms, model.norm):
        watch(norm, moments.entering_D, norm.scale.shape[0], is_square=False)
        watch(norm, moments.normed_D, norm.scale.shape[0], is_square=False, of_output=True)
    try:
        with _torchtune.without_head(model):
            for tokens_BS, valid_BS in batches:
                valid = torch.ones_like(tokens_BS, dtype=torch.bool) if valid_BS is None else valid_BS
                valid = valid.reshape(-1)
                moments.num_tokens += int(valid.sum())
                model.norm(model(tokens_BS))
    finally:
        for handle in handles:
            handle.remove()
    if moments.num_tokens == 0:
        raise ConfigError(Problem("dataset", "no token that counts", "calibration text"))
    if not all(bool(m.isfinite().all()) for m in (*moments.neurons_LFF, *moments.attention_LZZ, *moments.normed_D)):
        remedy = "Damaged weights, or numbers beyond dtype's range: try dtype=fp32"
        raise ConfigError(Problem("model", "activations that are not finite", "finite ones", remedy))
    return moments


@dataclass(frozen=True)
class Kept:
    """What stays of a model, and what changes in it.

    Args:
        neurons_LK: indices, ascending, for each block.
        groups_LK: of key-value heads.
        channels_K: of the residual stream, alike in all blocks.
        down_LDK: the down projections behind the cut, all channels, ``[D, K]``; None where nothing was cut.
        output_LDK: the attention's output projections, likewise.
        norm_factors: of each norm's scale, in the order of :attr:`Moments.entering_D`: fewer channels have another root
            mean square.
    """

    neurons_LK: list[Tensor]
    groups_LK: list[Tensor]
    channels_K: Tensor
    down_LDK: list[Tensor | None]
    output_LDK: list[Tensor | None]
    norm_factors: list[float]


@torch.no_grad()
def choose_width(model: TransformerDecoder, moments: Moments, method: WidthPruning) -> Kept:
    """What to keep: the neurons and heads that add most to the residual stream, and its largest channels.

    A neuron adds ``E[a^2] * |w|^2``, with its activation ``a`` and its column ``w`` of the down projection: what the
    block's output loses, squared, when it goes alone. A key-value head adds the same for its heads' columns of the
    output projection together. A channel counts by its share of the squared norms' outputs, over all norms
    (as in Minitron, https://arxiv.org/abs/2407.14679).

    Args:
        model: the one that the moments are of.
        moments: of calibration text.
        method: how much to keep.
    """
    attention = model.layers[0].attn
    num_groups, width = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads * attention.head_dim
    embed_dim = model.tok_embeddings.embedding_dim
    num_neurons, num_kept_groups, num_channels = method.sizes(moments.neurons_LFF[0].shape[0], num_groups, embed_dim)
    kept = Kept([], [], torch.arange(embed_dim), [], [], [])
    for block, neurons_FF, attention_ZZ in zip(model.layers, moments.neurons_LFF, moments.attention_LZZ, strict=True):
        down_DF, output_DZ = (layer.weight.float().cpu() for layer in (block.mlp.w2, block.attn.output_proj))
        chosen_K = _largest(neurons_FF.diagonal() * down_DF.square().sum(0), num_neurons)
        added_G = torch.stack(
            [
                torch.einsum("dz,zy,dy->", output_DZ[:, part], attention_ZZ[part, part], output_DZ[:, part])
                for part in (slice(group * width, (group + 1) * width) for group in range(num_groups))
            ]
        )
        groups_K = _largest(added_G, num_kept_groups)
        columns_K = of_groups(groups_K, width)
        kept.neurons_LK.append(chosen_K)
        kept.groups_LK.append(groups_K)
        kept.down_LDK.append(_refit(down_DF, neurons_FF, chosen_K, method.refit))
        kept.output_LDK.append(_refit(output_DZ, attention_ZZ, columns_K, method.refit))
    shares_D = sum((normed_D / normed_D.sum() for normed_D in moments.normed_D), torch.zeros(embed_dim))
    channels_K = _largest(shares_D, num_channels)
    factors = [float((entering_D[channels_K].mean() / entering_D.mean()).sqrt()) for entering_D in moments.entering_D]
    return Kept(kept.neurons_LK, kept.groups_LK, channels_K, kept.down_LDK, kept.output_LDK, factors)


def of_groups(groups_K: Tensor, width: int) -> Tensor:
    """Indices of all that belongs to some groups, where each group is so many in a row."""
    return (groups_K[:, None] * width + torch.arange(width)).flatten()


def _largest(values: Tensor, number: int) -> Tensor:
    """Indices of the largest, ascending; of equals, the earlier."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def _refit(weight_DC: Tensor, moments_CC: Tensor, kept_K: Tensor, is_asked: bool) -> Tensor | None:
    """The weight ``[D, K]`` that gives from the kept inputs, by least squares, what the whole gave from all."""
    if len(kept_K) == weight_DC.shape[1]:
        return None
    if not is_asked:
        return weight_DC[:, kept_K]
    gram_KK = moments_CC[kept_K][:, kept_K]
    ridge = _RIDGE * gram_KK.diagonal().mean()
    # drawn towards the weights that were there, not towards zero: unlike a plain ridge it leaves what need not change
    target_KD = (weight_DC @ moments_CC[:, kept_K] + ridge * weight_DC[:, kept_K]).T
    fitted_KD: Tensor = torch.linalg.solve(gram_KK + ridge * torch.eye(len(kept_K)), target_KD)
    return fitted_KD.T
