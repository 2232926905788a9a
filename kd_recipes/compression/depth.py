"""Which blocks of a model matter: the ones that turn the residual stream least can go.

Dropping whole blocks leaves a dense model of the same family, so everything that runs the original runs the result,
and it is faster by the share of the blocks dropped, on any device.
"""

# L blocks, B sequences, S positions, D hidden

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError, Problem

# Alone, the first block makes the embeddings into features and the last one features into predictions: a model
# without either is lost (SmolLM2-135M: influence 1.0 and 0.23, where the middle has 0.03).
FIRST_AND_LAST = (0, -1)


@dataclass(frozen=True)
class DepthPruning:
    """How many blocks to keep; exactly one of ``num_blocks`` and ``keep_ratio`` is given.

    Args:
        num_blocks: blocks to keep.
        keep_ratio: share of the blocks to keep, in (0, 1]; rounded to whole blocks.
        protected: blocks that are kept whatever their influence; negative indices count from the last.

    Raises:
        ConfigError: both or neither are given, or one that leaves nothing.
    """

    num_blocks: int | None = None
    keep_ratio: float | None = None
    protected: Sequence[int] = FIRST_AND_LAST

    def __post_init__(self) -> None:
        if (self.num_blocks is None) == (self.keep_ratio is None):
            got = {"num_blocks": self.num_blocks, "keep_ratio": self.keep_ratio}
            raise ConfigError(Problem("method", got, "exactly one of num_blocks and keep_ratio", "Remove or add one"))
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(Problem("method.num_blocks", self.num_blocks, "at least 1 block"))
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(Problem("method.keep_ratio", self.keep_ratio, "a number above 0 and at most 1"))

    def num_keep(self, num_layers: int) -> int:
        """Blocks to keep of ``num_layers``.

        Raises:
            ConfigError: none, more than there are, or fewer than are protected.
        """
        num_keep = self.num_blocks if self.keep_ratio is None else round(self.keep_ratio * num_layers)
        assert num_keep is not None
        _protected_blocks(self.protected, num_layers, num_keep)
        return num_keep


@torch.no_grad()
def block_influence(model: TransformerDecoder, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Block influence, ``BI_i = 1 - E[cos(h_i, h_i+1)]``: how far block i turns the hidden state that enters it.

    The mean is over the valid tokens of all batches. The output head is not computed. The slow equivalent, with all
    hidden states ``hidden_BSD[0] … hidden_BSD[L]`` in memory:

        cosines = [cosine_similarity(before, after, dim=-1) for before, after in pairwise(hidden_BSD)]
        influence_L = 1 - torch.stack([cosine[valid_BS].mean() for cosine in cosines])

    Args:
        model: in eval mode, with its weights.
        batches: ids ``[B, S]``, and which of them count (bool ``[B, S]``; None for all), on the model's device.

    Returns:
        ``[L]``, float32, on the CPU; each within [0, 2].

    Raises:
        ConfigError: no token counts, or a hidden state is not finite.

    ShortGPT, https://arxiv.org/abs/2403.03853.
    """
    cosine_sums_L = torch.zeros(len(model.layers), dtype=torch.float64)
    num_tokens = 0
    with _torchtune.without_head(model):
        for tokens_BS, valid_BS in batches:
            cosine_LBS = _block_cosines(model, tokens_BS)
            if valid_BS is None:
                valid_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
            cosine_sums_L += cosine_LBS[:, valid_BS].double().sum(dim=-1).cpu()
            num_tokens += int(valid_BS.sum())
    if num_tokens == 0:
        raise ConfigError(Problem("dataset", "no token that counts", "calibration text"))
    influence_L = 1 - cosine_sums_L / num_tokens
    if not influence_L.isfinite().all():
        remedy = "Damaged weights, or numbers beyond dtype's range: try dtype=fp32"
        raise ConfigError(Problem("model", "hidden states that are not finite", "finite ones", remedy))
    return influence_L.float()


def _block_cosines(model: TransformerDecoder, tokens_BS: Tensor) -> Tensor:
    """The cosine between what enters and what leaves each block, ``[L, B, S]`` float32."""
    cosines: list[Tensor] = []

    def record(_block: torch.nn.Module, args: tuple[Any, ...], output_BSD: Tensor) -> None:
        # float32: 1 - cos is some 0.03, of which bfloat16 would leave two bits
        cosines.append(F.cosine_similarity(args[0].float(), output_BSD.float(), dim=-1))

    handles = [block.register_forward_hook(record) for block in model.layers]
    try:
        model(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(cosines)


def choose_blocks(
    influence: Tensor | Sequence[float], num_keep: int, *, protected: Sequence[int] = FIRST_AND_LAST
) -> tuple[int, ...]:
    """The blocks to keep: the protected ones, then the most influential; of equals, the earlier.

    Args:
        influence: of each block, ``[L]``.
        num_keep: how many to keep.
        protected: indices of blocks to keep in any case; negative ones count from the last.

    Returns:
        Their indices, ascending.

    Raises:
        ConfigError: ``num_keep`` is less than 1 or than the protected blocks, or more than there are.
    """
    values = [float(value) for value in influence]
    kept = _protected_blocks(protected, len(values), num_keep)
    by_influence = sorted(set(range(len(values))) - kept, key=lambda index: (-values[index], index))
    return tuple(sorted([*kept, *by_influence[: num_keep - len(kept)]]))


def _protected_blocks(protected: Sequence[int], num_layers: int, num_keep: int) -> set[int]:
    if not 1 <= num_keep <= num_layers:
        raise ConfigError(Problem("method", f"{num_keep} blocks to keep", f"from 1 to {num_layers}, the model's"))
    outside = [index for index in protected if not -num_layers <= index < num_layers]
    if outside:
        raise ConfigError(Problem("method.protected", outside, f"indices of the model's {num_layers} blocks"))
    kept = {index % num_layers for index in protected}
    if len(kept) > num_keep:
        remedy = "Keep more blocks, or set method.protected=[]"
        wanted = f"at least {len(kept)}, the protected blocks {sorted(kept)}"
        raise ConfigError(Problem("method", f"{num_keep} blocks to keep", wanted, remedy))
    return kept
