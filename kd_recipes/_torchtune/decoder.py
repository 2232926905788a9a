"""A decoder of torchtune's components whose shapes are free of each other.

torchtune's builders make a head ``embed_dim / num_heads`` wide. A model that has lost heads, or channels of its
residual stream, has heads of another width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import DoRALinear, LoRALinear

Rope = Literal["llama", "qwen2"]


@dataclass(frozen=True)
class Adapters:
    """Where a model has low-rank adapters, and of which kind.

    Args:
        modules: names of attention projections, ``q_proj k_proj v_proj output_proj``.
        in_mlp: whether the feed-forward layers have them.
        use_dora: of which kind.
        settings: ``rank``, ``alpha`` and ``dropout``.
    """

    modules: Collection[str]
    in_mlp: bool
    use_dora: bool
    settings: dict[str, Any]

    def linear(self, name: str, in_dim: int, out_dim: int, bias: bool) -> nn.Module:
        """The layer of that name, with its adapter if it has one."""
        if name in self.modules or (self.in_mlp and name == "mlp"):
            kind: Any = DoRALinear if self.use_dora else LoRALinear
            adapted: nn.Module = kind(in_dim, out_dim, use_bias=bias, **self.settings)
            return adapted
        return nn.Linear(in_dim, out_dim, bias=bias)


def build_decoder(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_bias: bool,
    attn_dropout: float,
    rope: Rope,
    rope_base: int,
    rope_scale_factor: int,
    norm_eps: float,
    tie_word_embeddings: bool,
    adapters: Adapters,
) -> TransformerDecoder:
    """A Llama or Qwen2, with names and order of weights that torchtune's own have."""
    if rope == "qwen2":
        positions: nn.Module = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len=max_seq_len, base=rope_base)
    else:
        positions = Llama3ScaledRoPE(head_dim, max_seq_len=max_seq_len, base=rope_base, scale_factor=rope_scale_factor)

    def block() -> TransformerSelfAttentionLayer:
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        attention = MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=adapters.linear("q_proj", embed_dim, width, attn_bias),
            k_proj=adapters.linear("k_proj", embed_dim, kv_width, attn_bias),
            v_proj=adapters.linear("v_proj", embed_dim, kv_width, attn_bias),
            output_proj=adapters.linear("output_proj", width, embed_dim, False),
            pos_embeddings=positions,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        mlp = FeedForward(
            gate_proj=adapters.linear("mlp", embed_dim, intermediate_dim, False),
            down_proj=adapters.linear("mlp", intermediate_dim, embed_dim, False),
            up_proj=adapters.linear("mlp", embed_dim, intermediate_dim, False),
        )
        norms = [RMSNorm(embed_dim, eps=norm_eps) for _ in range(2)]
        return TransformerSelfAttentionLayer(attn=attention, mlp=mlp, sa_norm=norms[0], mlp_norm=norms[1])

    embedding = nn.Embedding(vocab_size, embed_dim)
    output = TiedLinear(embedding) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False)
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(block() for _ in range(num_layers)),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=output,
    )
