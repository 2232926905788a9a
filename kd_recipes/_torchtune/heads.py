"""Decoders without their head: hidden states instead of logits, and a look at what goes on inside."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training import get_act_offloading_ctx_manager

from kd_recipes.batch import Batch
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import fake_quantize_activations
from kd_recipes.layers import LowRankEmbedding, LowRankLinear
from kd_recipes.signals import DenseSignal, LinearLogits, Tap


@dataclass(frozen=True)
class Head:
    """A model's output projection, taken off so that the loss can apply it to a few tokens at a time.

    Args:
        output: the projection, of one of torchtune's kinds; its weights are looked up whenever they are needed.
        soft_cap: of the logits; None for none.
    """

    output: Any
    soft_cap: float | None

    def logits(self, hidden_TD: Tensor) -> LinearLogits:
        """The logits of some hidden states, not computed yet."""
        output = self.output
        if isinstance(output, TiedLinear):  # which is no nn.Module
            output = output.tied_module
            if not isinstance(output, LowRankEmbedding):
                return LinearLogits((hidden_TD,), (output.weight,), None, self.soft_cap)
            return LinearLogits((hidden_TD @ output.v.T,), (output.u,), None, self.soft_cap)
        if hasattr(output, "rounding"):  # a hook, which is passed by here
            hidden_TD = fake_quantize_activations(hidden_TD)
        if isinstance(output, LowRankLinear):
            return LinearLogits((output.inner(hidden_TD),), (output.u,), output.bias, self.soft_cap)
        if isinstance(output, LoRALinear):
            adapted_TR = output.lora_a(output.dropout(hidden_TD)) * (output.alpha / output.rank)
            weights = (output.weight, output.lora_b.weight)
            return LinearLogits((hidden_TD, adapted_TR), weights, output.bias, self.soft_cap)
        if isinstance(output, DoRALinear):
            return self._dora_logits(hidden_TD)
        return LinearLogits((hidden_TD,), (output.weight,), output.bias, self.soft_cap)

    def _dora_logits(self, hidden_TD: Tensor) -> LinearLogits:
        """DoRA scales each row of the adapted weight; so does this, to the rows of both factors."""
        output = self.output
        adapted_TR = output.lora_a(output.dropout(hidden_TD)) * output.scaling
        with torch.no_grad():
            update_VD = output.scaling * (output.lora_b.weight @ output.lora_a.weight)
            norm_V = torch.linalg.norm(output.weight + update_VD, dim=1)
        scale_V1 = (output.magnitude / norm_V).unsqueeze(1)
        weights = (scale_V1 * output.weight, scale_V1 * output.lora_b.weight)
        return LinearLogits((hidden_TD, adapted_TR), weights, output.bias, self.soft_cap)


def take_head(model: TransformerDecoder) -> Head:
    """Make a model return its last hidden states ``[B, S, D]``, normed; return the head that it applied to them.

    torchtune's Gemma 2 caps the hidden states where the model caps the logits; here the logits are capped.

    Raises:
        ConfigError: a head of a kind that is not known.
    """
    norm, soft_cap = model.norm, None
    if isinstance(norm, Gemma2FinalNorm):
        norm, soft_cap = norm.rms_norm, norm.capping_value
    if not isinstance(model.output, (nn.Linear, TiedLinear, LoRALinear, DoRALinear, LowRankLinear)):
        wanted = "an output head that is linear, tied to the embedding or not, with or without an adapter"
        raise ConfigError(Problem("model", type(model.output).__name__, wanted))
    # unembed() is norm, then output. A function, since a module would be registered as a child and not be found first
    model.unembed = lambda hidden: norm(hidden)
    return Head(model.output, soft_cap)


class Headless:
    """A model whose head is left to the loss, and whose inner states are seen where ``taps`` ask for them.

    Args:
        model: a decoder, not compiled yet; it loses its head.
        taps: places that it has.
        compile_blocks: compile each block, but those whose attention is looked into.
        recompute_activations: in the backward pass, each block's.
        offload_activations: keep them in host memory (CUDA only).
    """

    def __init__(
        self,
        model: TransformerDecoder,
        taps: Collection[Tap] = (),
        *,
        compile_blocks: bool = False,
        recompute_activations: bool = False,
        offload_activations: bool = False,
    ) -> None:
        self._model = model
        self._seen: dict[Tap, Tensor] = {}
        self._is_watching = False
        last = len(model.layers)
        self._hidden = sorted(tap for tap in taps if tap.kind == "hidden" and tap.layer < last)
        model.output_hidden_states = [tap.layer for tap in self._hidden]  # what goes into the block of this index
        attention = [tap for tap in taps if tap.kind != "hidden"]
        if compile_blocks:
            training.compile_model(model, verbose=False)
            for tap in attention:  # a hook inside a compiled block is none
                model.layers[tap.layer - 1]._compiled_call_impl = None
        for tap in attention:
            projection = getattr(model.layers[tap.layer - 1].attn, f"{tap.kind[0]}_proj")
            projection.register_forward_hook(lambda _module, _inputs, output, tap=tap: self._see(tap, output))
        if recompute_activations:
            training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        self._offloading = get_act_offloading_ctx_manager(model, offload_activations)
        self._head = take_head(model)
        if Tap(last) in taps:
            model.unembed = self._see_last(last, model.unembed)

    def _see(self, tap: Tap, output_BSD: Tensor) -> None:
        if self._is_watching:  # and not computing it once more in the backward pass
            self._seen[tap] = output_BSD

    def _see_last(self, last: int, norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def see_then_norm(hidden_BSD: Tensor) -> Tensor:
            self._see(Tap(last), hidden_BSD)
            return norm(hidden_BSD)

        return see_then_norm

    def __call__(self, batch: Batch) -> DenseSignal:
        """The model's distribution at each position, and its features."""
        self._is_watching = True
        with self._offloading:
            output = self._model(batch.tokens_BS, mask=batch.mask_BSS, input_pos=batch.input_pos_BS)
        self._is_watching = False
        *states, hidden_BSD = output if isinstance(output, list) else [output]
        features = {**dict(zip(self._hidden, states, strict=True)), **self._seen}
        self._seen = {}
        return DenseSignal(self._head.logits(hidden_BSD.flatten(0, 1)), features)


@contextmanager
def without_head(model: TransformerDecoder) -> Iterator[None]:
    """Make a model stop after its last block: the head is half the work of a small model, and a vocabulary wide."""
    replaced = vars(model).get("unembed")  # an attribute of the instance hides the method
    model.unembed = lambda hidden_BSD: hidden_BSD
    try:
        yield
    finally:
        del model.unembed
        if replaced is not None:
            model.unembed = replaced
