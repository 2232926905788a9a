"""A model's blocks, one in memory at a time, with what flows into them on calibration text.

A block is read from the checkpoint, seen at work, changed, and written, before the next one is read; the next one is
fed with what the changed one gives, so that it can make up for what has gone before it. So a model of any depth needs
the memory of one block, and of the hidden states of the text.
"""

# T tokens that count, S positions, D channels, I inputs of a layer, O outputs, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import TiedLinear
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes.compression.checkpoint import HFCheckpoint, sections
from kd_recipes.compression.convert import as_tune, packed, to_file, tune_name
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import Quantized
from kd_recipes.layers import LowRankLinear
from kd_recipes.parts import build_model

# Linear layers of a block, by torchtune's names, and whose input each has: several share one.
INPUT_OF = {
    **{f"attn.{name}_proj": "attn.q_proj" for name in "qkv"},
    **{"attn.output_proj": "attn.output_proj", "mlp.w1": "mlp.w1", "mlp.w3": "mlp.w1", "mlp.w2": "mlp.w2"},
}
_HEAD_CHUNK = 512  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Text:
    """Calibration text, and how a model computes on it.

    Args:
        windows: ids ``[1, S]``, and which of them count (bool ``[1, S]``), in host memory.
        device: of the block in memory.
        dtype: of its computations.
    """

    windows: Sequence[tuple[Tensor, Tensor]]
    device: torch.device
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """How many count."""
        return sum(int(valid.sum()) for _, valid in self.windows)

    def require_tokens(self) -> None:
        """Refuse a text that nothing can be learnt from.

        Raises:
            ConfigError: no token counts.
        """
        if self.num_tokens == 0:
            raise ConfigError(Problem("dataset", "no token that counts", "calibration text"))


@dataclass
class Block:
    """A block in memory; changes are seen by the blocks after it.

    Args:
        index: of the block, from 0.
        layer: torchtune's, with its weights.
        state: what the file has of it, by torchtune's names within the block; changes are made here and in ``layer``.
        inputs: hidden states ``[1, S, D]`` that enter it, a window each.
        text: the windows.
        schemes: of the parameters that have become codes, by name within the block.
    """

    index: int
    layer: nn.Module
    state: dict[str, Tensor]
    inputs: list[Tensor]
    text: Text
    schemes: dict[str, str] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The weight ``[O, I]`` of a linear layer, float32, as precise as the file has it, on the text's device."""
        return self.state[f"{name}.weight"].to(self.text.device, torch.float32)

    def set_weight(self, name: str, weight_OI: Tensor) -> None:
        """Give a linear layer other weights of the same shape."""
        key = f"{name}.weight"
        self.state[key] = weight_OI.to(self.state[key].dtype).cpu()
        self._load(key, self.state[key])

    def set_module(self, name: str, module: LowRankLinear) -> None:
        """Give a linear layer's place to one of factors."""
        dtype = self.state.pop(f"{name}.weight").dtype
        parent, _, child = name.rpartition(".")
        module.to(self.text.device, self.text.dtype)
        setattr(self.layer.get_submodule(parent), child, module)
        self.state |= {f"{name}.{key}": value.detach().to(dtype).cpu() for key, value in module.named_parameters()}

    def set_codes(self, key: str, quantized: Quantized) -> None:
        """Put a parameter, such as ``mlp.w1.weight``, on a lattice."""
        del self.state[key]
        self.state |= packed(key, quantized)
        self.schemes[key] = quantized.scheme.name
        self._load(key, quantized.dequantize())

    @torch.no_grad()
    def _load(self, key: str, value: Tensor) -> None:
        self.layer.get_parameter(key).copy_(value)

    @torch.no_grad()
    def run(self, watch: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None) -> list[Tensor]:
        """What leaves the block, a window each.

        Args:
            watch: name of a module -> is given its input and its output, ``[T, …]`` float32, a window after another.
        """
        valid_S = torch.empty(0)

        def hook(see: Callable[[Tensor, Tensor], None]) -> Any:
            def forward(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                see(args[0][0, valid_S].float(), output[0, valid_S].float())

            return forward

        modules = {name: self.layer.get_submodule(name) for name in watch or {}}
        handles = [modules[name].register_forward_hook(hook(see)) for name, see in (watch or {}).items()]
        outputs = []
        try:
            for hidden_1SD, (_, valid_1S) in zip(self.inputs, self.text.windows, strict=True):
                valid_S = valid_1S[0].to(self.text.device)
                outputs.append(self.layer(hidden_1SD))
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def grams(
        self, names: Sequence[str], watch: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None
    ) -> dict[str, Tensor]:
        """The sum of ``x x^T`` over the inputs x of linear layers, ``[I, I]`` float32; layers of one input share it.

        Args:
            names: of the layers.
            watch: other modules to look at on the way, as in :meth:`run`.

        Raises:
            ConfigError: no token counts, or an input is not finite.
        """
        self.text.require_tokens()
        sums: dict[str, Tensor] = {}

        def add(name: str) -> Callable[[Tensor, Tensor], None]:
            def see(x_TI: Tensor, _output: Tensor) -> None:
                gram_II = x_TI.T @ x_TI
                sums[name] = sums[name].add_(gram_II) if name in sums else gram_II

            return see

        self.run({**{name: add(name) for name in {INPUT_OF[name] for name in names}}, **(watch or {})})
        require_finite(sums.values(), f"block {self.index}")
        return {name: sums[INPUT_OF[name]] for name in names}

    def tensors(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """What it is now, by the names and in the order of rows of Hugging Face's files."""
        yield from to_file({f"layers.{self.index}.{key}": value for key, value in self.state.items()}, config)


class Stream:
    """The blocks of a checkpoint in order; see :class:`Block`.

    Args:
        source: the checkpoint.
        text: what flows through it.
        what: for the progress bar.
        blocks: some of them, in order; the others are left out, as if they were not there.
    """

    def __init__(self, source: HFCheckpoint, text: Text, what: str, blocks: Sequence[int] | None = None) -> None:
        self.source, self.text, self._what = source, text, what
        self._blocks = range(source.num_layers) if blocks is None else blocks
        section = sections(source.directory).model
        self.model = build_model("checkpoint_dir", section, dtype=text.dtype, device=torch.device("meta"))
        self.hidden: list[Tensor] = []

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        embedding = self._materialize("tok_embeddings")
        self.hidden = [embedding(tokens_1S.to(self.text.device)) for tokens_1S, _ in self.text.windows]
        embedding.to("meta")
        for index in tqdm(self._blocks, self._what, unit="block", leave=False):
            state = as_tune(self.source, self.source.names(index))
            prefix = f"layers.{index}."
            within = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            layer = self._materialize(f"layers.{index}", within)
            block = Block(index, layer, within, self.hidden, self.text)
            yield block
            self.hidden = block.run()
            self.model.layers[index] = nn.Identity()
            # whoever iterates still has the block while the next one is read; its memory is given back all the same
            layer.to("meta")
            within.clear()
            block.inputs = []
            del state

    def _materialize(self, name: str, state: dict[str, Tensor] | None = None) -> Any:
        module = self.model.get_submodule(name).to_empty(device=self.text.device)
        if state is None:
            prefix = f"{name}."
            outside = self.source.names(None)
            names = [file_name for file_name in outside if tune_name(file_name, self.source).startswith(prefix)]
            state = {k.removeprefix(prefix): v for k, v in as_tune(self.source, names).items()}
        module.load_state_dict(state)
        _torchtune.compute_positions(module, self.text.device)
        return module.eval()

    def final_norm(self) -> Any:
        """The norm behind the last block, with its weights."""
        return self._materialize("norm")

    @torch.no_grad()
    def final_gram(self) -> Tensor:
        """The sum of ``h h^T`` over what enters the head, ``[D, D]`` float32; all blocks have been passed through."""
        norm = self.final_norm()
        gram_DD = torch.zeros(())
        for hidden_1SD, (_, valid_1S) in zip(self.hidden, self.text.windows, strict=True):
            normed_TD = norm(hidden_1SD)[valid_1S.to(hidden_1SD.device)].float()
            gram_DD = normed_TD.T @ normed_TD + gram_DD.to(normed_TD.device)
        return gram_DD

    @torch.no_grad()
    def cross_entropy(self) -> float:
        """Of the model with the text, in nats a token; all blocks have been passed through."""
        norm = self.final_norm()
        tied = isinstance(self.model.output, TiedLinear)
        self._materialize("tok_embeddings" if tied else "output")
        total, num_tokens = 0.0, 0
        for hidden_1SD, (tokens_1S, valid_1S) in zip(self.hidden, self.text.windows, strict=True):
            counts_T = valid_1S[0, 1:].to(self.text.device)
            labels_T = tokens_1S[0, 1:].to(self.text.device)[counts_T]
            hidden_TD = norm(hidden_1SD)[0, :-1][counts_T]
            for chunk_TD, chunk_T in zip(hidden_TD.split(_HEAD_CHUNK), labels_T.split(_HEAD_CHUNK), strict=True):
                total += float(F.cross_entropy(self.model.output(chunk_TD).float(), chunk_T, reduction="sum"))
            num_tokens += len(labels_T)
        if num_tokens == 0:
            raise ConfigError(Problem("dataset", "no token that counts", "calibration text"))
        return total / num_tokens


def cross_entropy(source: HFCheckpoint, text: Text, blocks: Sequence[int] | None = None, what: str = "loss") -> float:
    """Of a checkpoint with a text, in nats a token, with one block in memory at a time.

    Args:
        source: the checkpoint.
        text: the text.
        blocks: those that are there; all by default.
        what: for the progress bar.
    """
    stream = Stream(source, text, what, blocks)
    for _ in stream:
        pass
    return stream.cross_entropy()


def require_finite(tensors: Any, where: str) -> None:
    """Refuse to choose by numbers that are none.

    Raises:
        ConfigError: a value that is not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        remedy = "Damaged weights, or numbers beyond dtype's range: try dtype=fp32"
        raise ConfigError(Problem("checkpoint_dir", f"activations in {where} that are not finite", "finite", remedy))
