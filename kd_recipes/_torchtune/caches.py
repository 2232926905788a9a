"""Decoders that go on where they stopped, so that a continuation costs one token a step.

torchtune's cache has its full length from the start: every step attends to all of it, after copying keys and values
for each query head that shares them, and each block asks the device where the cache ends. Here a step attends to what
is filled, nothing is copied, and nothing waits for the device.
"""

# B sequences, S positions that are given, L positions that are cached, H query heads, G key-value heads, E channels of
# a head, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchtune.generation import get_causal_mask_from_padding_mask, get_position_ids_from_padding_mask
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from kd_recipes._torchtune.heads import Head, take_head, without_head
from kd_recipes._torchtune.rotations import fast_rotations, replaced
from kd_recipes.errors import ConfigError, Problem


class _Cache:
    """The keys and values of one block, in the place of torchtune's KVCache.

    Args:
        window: positions after which torchtune's Gemma 2 would look at the wrong ones; None elsewhere.
    """

    def __init__(self, window: int | None) -> None:
        self._window = window
        self.clear(0, is_padded=False)

    def clear(self, capacity: int, *, is_padded: bool) -> None:
        """Forget all, and make room for ``capacity`` positions when the first come."""
        if self._window is not None and capacity > self._window:
            wanted = f"at most {self._window}, the window of the model's attention"
            raise ConfigError(Problem("max_new_tokens", f"{capacity} positions with the longest prompt", wanted))
        self._capacity, self._is_padded, self._end = capacity, is_padded, 0
        self._both: tuple[Tensor, ...] = ()

    def update(self, keys_BGSE: Tensor, values_BGSE: Tensor) -> tuple[Tensor, ...]:
        """Append; returns all keys and values so far, ``[B, G, L, E]``."""
        batch, heads, length, width = keys_BGSE.shape
        if not self._both:
            shape = (batch, heads, self._capacity, width)
            self._both = (keys_BGSE.new_empty(shape), values_BGSE.new_empty(shape))
        start, self._end = self._end, self._end + length
        for cached_BGLE, new_BGSE in zip(self._both, (keys_BGSE, values_BGSE), strict=True):
            cached_BGLE[:, :, start : self._end] = new_BGSE
        return tuple(cached_BGLE[:, :, : self._end] for cached_BGLE in self._both)

    def attend(self, query_BHSE: Tensor, keys_BGLE: Tensor, values_BGLE: Tensor, *, mask: Tensor, **_: Any) -> Tensor:
        """In the place of MultiHeadAttention's attention, for keys that heads share: ``[B, H, S, E]``."""
        mask_B1SL = mask[:, None] if self._is_padded else None
        batch, heads, length, width = query_BHSE.shape
        if length > 1:
            return F.scaled_dot_product_attention(
                query_BHSE,
                keys_BGLE,
                values_BGLE,
                attn_mask=mask_B1SL,
                is_causal=mask_B1SL is None,
                enable_gqa=heads != keys_BGLE.shape[1],
            )
        # all heads of a group see the same keys, so that they may as well be the queries of one head
        query_BGRE = query_BHSE.reshape(batch, keys_BGLE.shape[1], -1, width)
        output_BGRE = F.scaled_dot_product_attention(query_BGRE, keys_BGLE, values_BGLE, attn_mask=mask_B1SL)
        return output_BGRE.reshape(batch, heads, 1, width)


class Decoding:
    """A batch of sequences that grow together; :func:`decoding` makes it.

    Args:
        model: whose blocks have ``caches``, and whose head is off.
        head: what was taken off.
        caches: one for each block.
    """

    def __init__(self, model: TransformerDecoder, head: Head, caches: Sequence[_Cache]) -> None:
        self._model, self._head, self._caches = model, head, caches
        self._device = next(model.parameters()).device

    def start(self, prompts: Sequence[Sequence[int]], num_steps: int) -> Tensor:
        """Read the prompts, whatever came before; the logits ``[B, V]`` of what follows them, in float32.

        Args:
            prompts: ids, of any lengths.
            num_steps: how often :meth:`step` may be called.

        Raises:
            ConfigError: more positions than the window of a Gemma 2.
        """
        longest = max(map(len, prompts))
        padding_B = torch.tensor([longest - len(prompt) for prompt in prompts])
        # on the left, so that all sequences end together
        tokens_BS = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
        valid_BL = (torch.arange(longest + num_steps) >= padding_B[:, None]).to(self._device)
        for cache in self._caches:
            cache.clear(longest + num_steps, is_padded=bool(padding_B.any()))
        self._valid_BL, self._end = valid_BL, longest
        valid_BS = valid_BL[:, :longest]
        positions_BS = get_position_ids_from_padding_mask(valid_BS)
        self._positions_B1 = positions_BS[:, -1:]
        return self._logits(tokens_BS.to(self._device), get_causal_mask_from_padding_mask(valid_BS), positions_BS)

    def step(self, ids_B: Tensor) -> Tensor:
        """Append an id to each sequence; the logits ``[B, V]`` of what follows it, in float32."""
        self._end += 1
        self._positions_B1 = self._positions_B1 + 1
        return self._logits(ids_B[:, None], self._valid_BL[:, None, : self._end], self._positions_B1)

    def _logits(self, tokens_BS: Tensor, mask_BSL: Tensor, positions_BS: Tensor) -> Tensor:
        hidden_BSD = self._model(tokens_BS, mask=mask_BSL, input_pos=positions_BS)
        return self._head.logits(hidden_BSD[:, -1]).compute().float()


@contextmanager
def decoding(model: TransformerDecoder) -> Iterator[Decoding]:
    """Make a model generate; afterwards it is what it was.

    It computes as in evaluation, without gradients, uncompiled; what its weights are computed from (a lattice's
    rounding, say) is computed once.

    Args:
        model: with its head or without.

    Raises:
        ConfigError: attention of a kind that is not known, or a head.
    """
    attentions = [attention for block in model.layers for attention in _attentions(block)]
    if len(attentions) != len(model.layers):
        wanted = "blocks with one MultiHeadAttention or Gemma2Attention each"
        raise ConfigError(Problem("model", f"{len(attentions)} in {len(model.layers)} blocks", wanted))
    caches = [_Cache(getattr(attention, "sliding_window_size", None)) for attention in attentions]
    with ExitStack() as stack:
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # FSDP goes on using what it gathers first; it cannot train with that if it was in inference mode
        stack.enter_context(torch.no_grad() if parts else torch.inference_mode())
        stack.enter_context(parametrize.cached())
        stack.enter_context(fast_rotations(model))
        stack.enter_context(_evaluating(model))
        if any(module._compiled_call_impl is not None for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # each length would be compiled anew
        stack.enter_context(without_head(model))
        head = take_head(model)
        stack.enter_context(replaced(model, output_hidden_states=[]))
        for attention, cache in zip(attentions, caches, strict=True):
            others: dict[str, Any] = {"kv_cache": cache, "cache_enabled": True}
            if isinstance(attention, MultiHeadAttention):
                # a head of keys for each of queries, as it were: then it does not copy them, and `attend` shares them
                others |= {"num_kv_heads": attention.num_heads, "_attention_call": cache.attend}
            stack.enter_context(replaced(attention, **others))
        for part in parts:
            stack.callback(part.reshard)  # the outermost would stay gathered until a backward pass
        yield Decoding(model, head, caches)


def _attentions(block: nn.Module) -> list[Any]:
    return [module for module in block.modules() if isinstance(module, (MultiHeadAttention, Gemma2Attention))]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then for each module what it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
