"""Which blocks of a model matter: the ones that turn the residual stream least, or are missed least, can go.

Dropping whole blocks leaves a dense model of the same family, so everything that runs the original runs the result,
and it is faster by the share of the blocks dropped, on any device.
"""

# L blocks, S positions, D hidden

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from kd_recipes.compression.checkpoint import HFCheckpoint, block_of, write_checkpoint
from kd_recipes.compression.form import Form
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import Stream, Text, cross_entropy, require_finite
from kd_recipes.errors import ConfigError, Problem

# Alone, the first block makes the embeddings into features and the last one features into predictions: a model
# without either is lost (SmolLM2-135M: influence 1.0 and 0.23, where the middle has 0.03).
FIRST_AND_LAST = (0, -1)
_PER_BLOCK_LISTS = ("layer_types", "no_rope_layers")  # in config.json: an entry for each block
_BAR_WIDTH = 24

T = TypeVar("T")


@dataclass(frozen=True)
class DepthPruning(Step):
    """Keep some blocks, the same bit for bit; exactly one of ``num_blocks`` and ``keep_ratio`` is given.

    Args:
        num_blocks: blocks to keep.
        keep_ratio: share of the blocks to keep, in (0, 1]; rounded to whole blocks.
        protected: blocks that are kept whatever their influence; negative indices count from the last.
        criterion: ``influence`` drops the blocks of least influence, measured once; ``loss`` drops one after another,
            each the one that is missed least, by the loss on the text, among the ``shortlist`` of least influence.
        shortlist: blocks whose absence is tried before each removal.

    Raises:
        ConfigError: both or neither are given, or one that leaves nothing.
    """

    num_blocks: int | None = None
    keep_ratio: float | None = None
    protected: Sequence[int] = FIRST_AND_LAST
    criterion: Literal["influence", "loss"] = "influence"
    shortlist: int = 4

    def __post_init__(self) -> None:
        if (self.num_blocks is None) == (self.keep_ratio is None):
            got = {"num_blocks": self.num_blocks, "keep_ratio": self.keep_ratio}
            raise ConfigError(Problem(".num_blocks", got, "exactly one of num_blocks and keep_ratio"))
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(Problem(".num_blocks", self.num_blocks, "at least 1 block"))
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(Problem(".keep_ratio", self.keep_ratio, "a number above 0 and at most 1"))
        if self.criterion not in ("influence", "loss"):
            raise ConfigError(Problem(".criterion", self.criterion, "influence or loss"))
        if self.shortlist < 1:
            raise ConfigError(Problem(".shortlist", self.shortlist, "a whole number above 0"))

    def num_keep(self, num_layers: int) -> int:
        """Blocks to keep of ``num_layers``.

        Raises:
            ConfigError: none, more than there are, or fewer than are protected.
        """
        num_keep = self.num_blocks if self.keep_ratio is None else round(self.keep_ratio * num_layers)
        assert num_keep is not None
        _protected_blocks(self.protected, num_layers, num_keep)
        return num_keep

    def check(self, form: Form) -> Form:
        """See :class:`Step`; blocks go whatever they are made of."""
        return replace(form, config={**form.config, "num_hidden_layers": self.num_keep(form.num_layers)})

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`; prints which blocks stay."""
        num_keep = self.num_keep(source.num_layers)
        influence = block_influence(source, text)
        if self.criterion == "loss":
            keep = self._choose_by_loss(source, text, influence, num_keep)
        else:
            keep = choose_blocks(influence, num_keep, protected=self.protected)
        tqdm.write(report(influence.tolist(), keep))
        record = {
            **self.describe(),
            "kept_blocks": list(keep),
            "block_influence": [round(value, 6) for value in influence.tolist()],
        }
        return keep_blocks(source, destination_dir, keep, record=record)

    def _choose_by_loss(self, source: HFCheckpoint, text: Text, influence: Tensor, num_keep: int) -> tuple[int, ...]:
        keep = list(range(source.num_layers))
        protected = _protected_blocks(self.protected, source.num_layers, num_keep)
        for _ in tqdm(range(source.num_layers - num_keep), "drop blocks", unit="block"):
            by_influence = sorted(set(keep) - protected, key=lambda block: float(influence[keep.index(block)]))
            losses = {
                block: cross_entropy(
                    source, text, [other for other in keep if other != block], f"without block {block}"
                )
                for block in by_influence[: self.shortlist]
            }
            keep.remove(min(losses, key=losses.__getitem__))
            tqdm.write(f"{len(keep)} blocks: loss {min(losses.values()):.4f}")
            if len(keep) > num_keep:
                influence = block_influence(source, text, keep)
        return tuple(keep)


def block_influence(source: HFCheckpoint, text: Text, blocks: Sequence[int] | None = None) -> Tensor:
    """Block influence, ``BI_i = 1 - E[cos(h_i, h_i+1)]``: how far block i turns the hidden state that enters it.

    The mean is over the tokens that count. The slow equivalent, with all hidden states ``hidden_BSD[0] … [L]`` in
    memory:

        cosines = [cosine_similarity(before, after, dim=-1) for before, after in pairwise(hidden_BSD)]
        influence_L = 1 - torch.stack([cosine[valid_BS].mean() for cosine in cosines])

    Args:
        source: the checkpoint.
        text: the text.
        blocks: those that are there, in order; all by default.

    Returns:
        ``[L]``, float32, on the CPU; each within [0, 2].

    Raises:
        ConfigError: no token counts, or a hidden state is not finite.

    ShortGPT, https://arxiv.org/abs/2403.03853.
    """
    text.require_tokens()
    stream = Stream(source, text, "influence", blocks)
    entering: list[Tensor] = []
    sums: list[float] = []
    for _ in stream:
        if entering:
            sums.append(_cosine_sum(entering, stream.hidden, text))
        entering = stream.hidden
    sums.append(_cosine_sum(entering, stream.hidden, text))
    influence_L = 1 - torch.tensor(sums, dtype=torch.float64) / text.num_tokens
    require_finite([influence_L], "some block")
    return influence_L.float()


def _cosine_sum(before: Sequence[Tensor], after: Sequence[Tensor], text: Text) -> float:
    """Summed over the tokens that count; in float32, since 1 - cos is some 0.03, of which bfloat16 leaves two bits."""
    return sum(
        float(F.cosine_similarity(x_1SD.float(), y_1SD.float(), dim=-1)[valid_1S.to(x_1SD.device)].double().sum())
        for x_1SD, y_1SD, (_, valid_1S) in zip(before, after, text.windows, strict=True)
    )


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
        raise ConfigError(Problem(".num_blocks", f"{num_keep} blocks to keep", f"from 1 to {num_layers}, the model's"))
    outside = [index for index in protected if not -num_layers <= index < num_layers]
    if outside:
        raise ConfigError(Problem(".protected", outside, f"indices of the model's {num_layers} blocks"))
    kept = {index % num_layers for index in protected}
    if len(kept) > num_keep:
        remedy = "Keep more blocks, or set protected: []"
        wanted = f"at least {len(kept)}, the protected blocks {sorted(kept)}"
        raise ConfigError(Problem(".num_blocks", f"{num_keep} blocks to keep", wanted, remedy))
    return kept


def keep_blocks(
    source: HFCheckpoint, destination_dir: Path, keep: Sequence[int], *, record: Mapping[str, object], **settings: Any
) -> HFCheckpoint:
    """Write a checkpoint that has only some blocks of another; everything else in it is the same, bit for bit.

    Args:
        source: the checkpoint.
        destination_dir: the directory to make.
        keep: blocks to keep, ascending; they are numbered anew.
        record: what ``compression.json`` should say.
        settings: as of :func:`write_checkpoint`.

    Raises:
        ConfigError: ``keep`` names no block or one that is not there, or the disk is full.
    """
    if not keep or sorted(set(keep) & set(range(source.num_layers))) != list(keep):
        raise ConfigError(Problem("keep", list(keep), f"ascending indices of {source.num_layers} blocks"))

    kept = [spec for spec in source.specs if block_of(spec.name) in (None, *keep)]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.tensors(spec.name for spec in kept):
            yield _renumbered(name, "model.layers.", keep), tensor

    return write_checkpoint(
        source,
        destination_dir,
        tensors(),
        record=record,
        config=pruned_config(source.config, keep),
        ranks=_kept(source.ranks, keep),
        schemes=_kept(source.schemes, keep),
        num_bytes=sum(spec.num_bytes for spec in kept),
        **settings,
    )


def _kept(by_layer: Mapping[str, T], keep: Sequence[int]) -> dict[str, T]:
    """What is known of the layers that stay, by their new names."""
    named = {name: value for name, value in by_layer.items() if block_of(f"model.{name}") in (None, *keep)}
    return {_renumbered(name, "layers.", keep): value for name, value in named.items()}


def _renumbered(name: str, prefix: str, keep: Sequence[int]) -> str:
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{keep.index(int(number))}.{rest}"


def pruned_config(config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """A config.json for the model that has only the blocks ``keep``."""
    pruned = {**config, "num_hidden_layers": len(keep)}
    for name in _PER_BLOCK_LISTS:
        if config.get(name):
            pruned[name] = [config[name][index] for index in keep]
    if config.get("max_window_layers") is not None:  # blocks from this one on attend to a sliding window
        pruned["max_window_layers"] = sum(index < config["max_window_layers"] for index in keep)
    return pruned


def report(influence: Sequence[float], keep: Sequence[int]) -> str:
    """A table of the blocks: index, influence as a number and a bar, kept or dropped.

    A full bar is three times the median: the first and the last block tower over the rest, whose differences decide.
    """
    full = 3 * median(influence) or 1.0
    lines = ["block  influence"]
    for index, value in enumerate(influence):
        length = round(_BAR_WIDTH * value / full)
        bar = "#" * min(length, _BAR_WIDTH) + (">" if length > _BAR_WIDTH else "")
        lines.append(f"{index:5}  {value:9.4f}  {bar:{_BAR_WIDTH + 1}}  {'kept' if index in keep else 'dropped'}")
    return "\n".join(lines)
