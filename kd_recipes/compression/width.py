"""Which neurons, heads and channels of a model matter: what adds least to what comes after can go.

What is left is a dense model of the same family whose matrices are smaller. Feed-forward layers and attention make up
for what they have lost as far as a linear map can: the projection behind the cut is fitted to what it gave before.
"""

# L blocks, T tokens, F neurons, G key-value heads, Z attention outputs (heads * head_dim), D channels, K kept

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_recipes.compression.checkpoint import HFCheckpoint, write_checkpoint
from kd_recipes.compression.convert import has_place
from kd_recipes.compression.form import Form
from kd_recipes.compression.spill import spilled
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import Stream, Text
from kd_recipes.errors import ConfigError, Problem

# of the mean squared input of a projection, added to each: a fit to few tokens must not follow their noise
_RIDGE = 0.01
_TENSOR = re.compile(r"(?:model\.layers\.(\d+)\.)?(?:model\.)?([\w.]+?)\.(weight|bias)")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_FITTED = ("down_proj", "o_proj")


@dataclass(frozen=True)
class WidthPruning(Step):
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
            raise ConfigError(Problem("._component_", "WidthPruning", f"at least one of {', '.join(asked)}"))
        for name, value in asked.items():
            if value is not None and not (0 < value <= 1 or (1 < value < math.inf and value == int(value))):
                raise ConfigError(Problem(f".{name}", value, "a size (from 1) or a share (below 1)"))
        if self.multiple_of < 1:
            raise ConfigError(Problem(".multiple_of", self.multiple_of, "a whole number above 0"))

    def sizes(self, form: Form) -> tuple[int, int, int]:
        """Neurons, key-value heads and channels that are kept of a model.

        Raises:
            ConfigError: nothing, or more than there is.
        """
        return (
            self._size("intermediate_dim", form.intermediate_dim, self.multiple_of),
            self._size("num_kv_heads", form.num_kv_heads, 1),
            self._size("embed_dim", form.embed_dim, self.multiple_of),
        )

    def check(self, form: Form) -> Form:
        """See :class:`Step`."""
        form.require("pruning of widths")
        num_neurons, num_groups, num_channels = self.sizes(form)
        return replace(form, config=narrowed_config(form, num_neurons, num_groups, num_channels))

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`."""
        form = Form(source.config)
        config = narrowed_config(form, *self.sizes(form))
        num_bytes = Form(config).num_parameters * min(spec.dtype.itemsize for spec in source.specs)
        with spilled(destination_dir) as fitted:
            kept = choose_width(source, text, self, fitted)
            lists = {"kept_neurons": kept.neurons_LK, "kept_kv_heads": kept.groups_LK}
            record = {
                **self.describe(),
                **{name: [indices.tolist() for indices in kept_L] for name, kept_L in lists.items()},
                "kept_channels": kept.channels_K.tolist(),
            }
            settings: dict[str, Any] = {"record": record, "config": config, "num_bytes": num_bytes}
            return write_checkpoint(source, destination_dir, narrowed(source, kept), **settings)

    def _size(self, name: str, full: int, multiple_of: int) -> int:
        value = getattr(self, name)
        if value is None or value == full:
            return full
        size = round(value * full / multiple_of) * multiple_of if value < 1 else int(value)
        if not 0 < size < full or size % multiple_of:
            multiple = f", in multiples of {multiple_of} (multiple_of)" if multiple_of > 1 else ""
            raise ConfigError(Problem(f".{name}", value, f"from 1 to {full}, the model's{multiple}"))
        return size


@dataclass(frozen=True)
class Kept:
    """What stays of a model, and what changes in it.

    Args:
        neurons_LK: indices, ascending, for each block.
        groups_LK: of key-value heads.
        channels_K: of the residual stream, alike in all blocks.
        fitted: the projections behind the cuts, all channels, ``[D, K]``, by the names of their files' tensors.
        norm_factors: of each norm's scale, in the order two of each block, and the last: fewer channels have another
            root mean square.
    """

    neurons_LK: list[Tensor]
    groups_LK: list[Tensor]
    channels_K: Tensor
    fitted: Mapping[str, Tensor]
    norm_factors: list[float]


@torch.no_grad()
def choose_width(
    source: HFCheckpoint, text: Text, method: WidthPruning, fitted: MutableMapping[str, Tensor] | None = None
) -> Kept:
    """What to keep: the neurons and heads that add most to the residual stream, and its largest channels.

    A neuron adds ``E[a^2] * |w|^2``, with its activation ``a`` and its column ``w`` of the down projection: what the
    block's output loses, squared, when it goes alone. A key-value head adds the same for its heads' columns of the
    output projection together. A channel counts by its share of the squared norms' outputs, over all norms
    (as in Minitron, https://arxiv.org/abs/2407.14679).

    Args:
        source: the model.
        text: what it is measured on.
        method: how much to keep.
        fitted: what takes :attr:`Kept.fitted`, a block at a time; a dict in memory by default.

    Raises:
        ConfigError: no token counts, or what flows is not finite.
    """
    text.require_tokens()
    form = Form(source.config)
    num_neurons, num_groups, num_channels = method.sizes(form)
    width = form.num_heads // form.num_kv_heads * form.head_dim
    fitted = {} if fitted is None else fitted
    kept = Kept([], [], torch.arange(form.embed_dim), fitted, [])
    norms = _Norms()
    stream = Stream(source, text, "width")
    for block in stream:
        watched = {"sa_norm": norms.watcher(), "mlp_norm": norms.watcher()}
        grams = block.grams(["mlp.w2", "attn.output_proj"], watched)
        neurons_FF, attention_ZZ = grams["mlp.w2"], grams["attn.output_proj"]
        down_DF, output_DZ = block.weight("mlp.w2"), block.weight("attn.output_proj")
        chosen_K = _largest(neurons_FF.diagonal() * down_DF.square().sum(0), num_neurons)
        added_G = torch.stack(
            [
                torch.einsum("dz,zy,dy->", output_DZ[:, part], attention_ZZ[part, part], output_DZ[:, part])
                for part in (slice(group * width, (group + 1) * width) for group in range(form.num_kv_heads))
            ]
        )
        groups_K = _largest(added_G, num_groups)
        kept.neurons_LK.append(chosen_K.cpu())
        kept.groups_LK.append(groups_K.cpu())
        dtype = block.state["mlp.w2.weight"].dtype
        for name, weight, gram, columns in (
            ("mlp.down_proj", down_DF, neurons_FF, chosen_K),
            ("self_attn.o_proj", output_DZ, attention_ZZ, of_groups(groups_K, width)),
        ):
            if len(columns) < weight.shape[1]:
                new_DK = _refit(weight, gram, columns) if method.refit else weight[:, columns]
                fitted[f"model.layers.{block.index}.{name}.weight"] = new_DK.to(dtype).cpu()
    norms.add_last(stream)
    return norms.choose(kept, num_channels)


@dataclass
class _Norms:
    """Mean squares, over the tokens, of what enters and what leaves each norm, ``[D]`` each."""

    entering_D: list[Tensor] = field(default_factory=list)
    normed_D: list[Tensor] = field(default_factory=list)

    def watcher(self) -> Callable[[Tensor, Tensor], None]:
        """For the next norm; what it has seen is added up."""
        index = len(self.entering_D)
        self.entering_D.append(torch.zeros(()))
        self.normed_D.append(torch.zeros(()))

        def see(x_TD: Tensor, normed_TD: Tensor) -> None:
            self.entering_D[index] = self.entering_D[index] + x_TD.square().sum(0).cpu()
            self.normed_D[index] = self.normed_D[index] + normed_TD.square().sum(0).cpu()

        return see

    def add_last(self, stream: Stream) -> None:
        """The norm behind the last block."""
        norm, see = stream.final_norm(), self.watcher()
        for hidden_1SD, (_, valid_1S) in zip(stream.hidden, stream.text.windows, strict=True):
            x_TD = hidden_1SD[valid_1S.to(hidden_1SD.device)]
            see(x_TD.float(), norm(x_TD).float())

    def choose(self, kept: Kept, num_channels: int) -> Kept:
        """The channels that are largest behind the norms, and what makes up for the others in each norm."""
        shares_D = torch.stack([normed_D / normed_D.sum() for normed_D in self.normed_D]).sum(0)
        channels_K = _largest(shares_D, num_channels)
        factors = [float((square_D[channels_K].mean() / square_D.mean()).sqrt()) for square_D in self.entering_D]
        return replace(kept, channels_K=channels_K, norm_factors=factors)


def of_groups(groups_K: Tensor, width: int) -> Tensor:
    """Indices of all that belongs to some groups, where each group is so many in a row."""
    return (groups_K[:, None] * width + torch.arange(width, device=groups_K.device)).flatten()


def _largest(values: Tensor, number: int) -> Tensor:
    """Indices of the largest, ascending; of equals, the earlier."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def _refit(weight_DC: Tensor, moments_CC: Tensor, kept_K: Tensor) -> Tensor:
    """The weight ``[D, K]`` that gives from the kept inputs, by least squares, what the whole gave from all."""
    gram_KK = moments_CC[kept_K][:, kept_K]
    ridge = _RIDGE * gram_KK.diagonal().mean()
    # drawn towards the weights that were there, not towards zero: unlike a plain ridge it leaves what need not change
    target_KD = (weight_DC @ moments_CC[:, kept_K] + ridge * weight_DC[:, kept_K]).T
    fitted_KD: Tensor = torch.linalg.solve(gram_KK + ridge * torch.eye(len(kept_K), device=kept_K.device), target_KD)
    return fitted_KD.T


def narrowed_config(form: Form, num_neurons: int, num_groups: int, num_channels: int) -> dict[str, Any]:
    """A config.json for the model that has only so many neurons, key-value heads and channels."""
    return {
        **form.config,
        "hidden_size": num_channels,
        "intermediate_size": num_neurons,
        "num_attention_heads": num_groups * (form.num_heads // form.num_kv_heads),
        "num_key_value_heads": num_groups,
        "head_dim": form.head_dim,
    }


def narrowed(source: HFCheckpoint, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """What stays of a Llama's or Qwen2's tensors, by the names of Hugging Face's files.

    Raises:
        ConfigError: a tensor that no Llama or Qwen2 has.
    """
    form = Form(source.config)
    for name, tensor in source.tensors(spec.name for spec in source.specs if has_place(spec.name, source)):
        match = _TENSOR.fullmatch(name)
        cut = _cut(tensor, match, kept, form) if match else None
        if cut is None:
            raise ConfigError(Problem("checkpoint_dir", name, "the tensors of a Llama or Qwen2"))
        yield name, cut.to(tensor.dtype)


def _cut(tensor: Tensor, match: re.Match[str], kept: Kept, form: Form) -> Tensor | None:
    """What stays of a tensor; None for one that is not known."""
    module, channels = match[2].rpartition(".")[2], kept.channels_K
    if match[1] is None:
        if module == "norm":
            return tensor[channels] * kept.norm_factors[-1]
        return tensor[:, channels] if module in ("embed_tokens", "lm_head") else None
    block = int(match[1])
    if module in _NORMS:
        return tensor[channels] * kept.norm_factors[2 * block + _NORMS.index(module)]
    neurons_K, groups_K = kept.neurons_LK[block], kept.groups_LK[block]
    rows = {
        "gate_proj": neurons_K,
        "up_proj": neurons_K,
        "q_proj": of_groups(groups_K, form.num_heads // form.num_kv_heads * form.head_dim),
        "k_proj": of_groups(groups_K, form.head_dim),
        "v_proj": of_groups(groups_K, form.head_dim),
    }
    if module in rows:
        return tensor[rows[module]][:, channels] if tensor.ndim == 2 else tensor[rows[module]]
    return kept.fitted.get(match[0], tensor)[channels] if module in _FITTED else None
