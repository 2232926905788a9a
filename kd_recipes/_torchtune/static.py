"""A decoder with a key-value cache of fixed size, without control flow: what torch.export can trace for a runtime."""

# S positions that are given, L positions of the cache, H query heads, G key-value heads, E channels of a head,
# D hidden, V vocabulary

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import TiedLinear, TransformerDecoder

from kd_recipes.layers import LowRankEmbedding


class Attention(Protocol):
    """Attention of new positions to a cache, which it writes them to first."""

    def __call__(
        self, query: Tensor, new: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], start: int, /
    ) -> Tensor:
        """``[1, S, H, E]``.

        Args:
            query: of the new positions.
            new: their keys and values, ``[1, S, G, E]`` each.
            cached: those of all positions, ``[1, L, G, E]`` each, changed in place.
            start: the first new position.
        """


class StaticDecoder(nn.Module):
    """What follows a text that goes on from ``input_pos[0]``, by a decoder of torchtune's.

    Layers are the model's own, so what has been done to these (factors, other weights) stays. Only the embedding and
    the head may be replaced afterwards: a head that is tied has become a linear layer with the same parameter.

    Args:
        model: a Llama or Qwen2 of torchtune's components.
        max_seq_len: L.
        attend: what writes to the cache and reads it.
    """

    def __init__(self, model: TransformerDecoder, max_seq_len: int, attend: Attention) -> None:
        super().__init__()
        self.tok_embeddings, self.layers, self.norm = model.tok_embeddings, model.layers, model.norm
        self.output = _head(model.output)
        self._attend, self.max_seq_len = attend, max_seq_len
        for index, block in enumerate(model.layers):
            shape = (1, max_seq_len, block.attn.num_kv_heads, block.attn.head_dim)
            self.register_buffer(f"keys_{index}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values_{index}", torch.zeros(shape), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """The logits after the last of the tokens, ``[1, V]``.

        Args:
            tokens: ids ``[1, S]``.
            input_pos: the first one's position ``[1]``.
        """
        start: Any = input_pos[0].item()  # a symbol, when it is traced
        torch._check(start >= 0)
        torch._check(start < self.max_seq_len)
        positions_1S = (input_pos + torch.arange(tokens.shape[1]))[None]
        hidden_1SD = self.tok_embeddings(tokens)
        for index, block in enumerate(self.layers):
            cached = (getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"))
            hidden_1SD = hidden_1SD + self._attention(
                block.attn, block.sa_norm(hidden_1SD), positions_1S, cached, start
            )
            hidden_1SD = hidden_1SD + block.mlp(block.mlp_norm(hidden_1SD))
        logits_1V: Tensor = self.output(self.norm(hidden_1SD[:, -1]))
        return logits_1V

    def _attention(self, attn: Any, x_1SD: Tensor, positions_1S: Tensor, cached: Any, start: int) -> Tensor:
        shape = (1, x_1SD.shape[1], -1, attn.head_dim)
        query, key, value = (layer(x_1SD).view(shape) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        query, key = (attn.pos_embeddings(part, input_pos=positions_1S) for part in (query, key))
        attended_1SHE = self._attend(query, (key, value), cached, start)
        output_1SD: Tensor = attn.output_proj(attended_1SHE.flatten(2))
        return output_1SD


class _FactoredHead(nn.Module):
    """A head that is tied to an embedding of two factors, which it applies one after the other."""

    def __init__(self, embedding: LowRankEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., D]``."""
        return F.linear(F.linear(hidden, self.embedding.v), self.embedding.u)


def _head(output: Any) -> nn.Module:
    if not isinstance(output, TiedLinear):  # which is no nn.Module
        head: nn.Module = output
        return head
    embedding = output.tied_module
    if isinstance(embedding, LowRankEmbedding):
        return _FactoredHead(embedding)
    linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    linear.weight = embedding.weight
    return linear
