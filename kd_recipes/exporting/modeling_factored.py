"""Llamas and Qwen2s of which some weights are products of factors, for transformers.

This file lies beside such a model's weights, and needs torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
"""

# V vocabulary, O outputs, I inputs, D channels, R rank

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM


class FactoredLinear(nn.Module):
    """A linear layer whose weight ``[O, I]`` is ``u v``, or ``u s v``."""

    def __init__(self, layer: nn.Linear, ranks: list[int]) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(layer.out_features, ranks[0]))
        self.s = nn.Parameter(torch.empty(ranks[0], ranks[1])) if len(ranks) == 2 else None
        self.v = nn.Parameter(torch.empty(ranks[-1], layer.in_features))
        self.bias = nn.Parameter(torch.empty(layer.out_features)) if layer.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., O]`` of ``[..., I]``."""
        x = F.linear(x, self.v)
        return F.linear(x if self.s is None else F.linear(x, self.s), self.u, self.bias)


class FactoredEmbedding(nn.Module):
    """An embedding whose table ``[V, D]`` is ``u v``."""

    def __init__(self, layer: nn.Embedding, ranks: list[int]) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(layer.num_embeddings, ranks[0]))
        self.v = nn.Parameter(torch.empty(ranks[0], layer.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., D]`` of ``[...]``."""
        return F.embedding(ids, self.u) @ self.v


class TiedHead(nn.Module):
    """The head of a factored embedding, of which it has no copy."""

    def __init__(self, embedding: FactoredEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that its parameters are not this module's, too

    def forward(self, x: Tensor) -> Tensor:
        """``[..., V]`` of ``[..., D]``."""
        (embedding,) = self._embedding
        return F.linear(F.linear(x, embedding.v), embedding.u)


def _factorize(model: Any, config: Any) -> None:
    for name, ranks in config.ranks.items():
        layer = model.get_submodule(name)
        kind = FactoredEmbedding if isinstance(layer, nn.Embedding) else FactoredLinear
        model.set_submodule(name, kind(layer, ranks))
    if config.ties_factors:
        model.lm_head = TiedHead(model.model.embed_tokens)


class FactoredLlamaConfig(LlamaConfig):
    """A Llama's config.json, with ``ranks``: name of a module -> the sizes between its factors."""

    model_type = "factored_llama"

    def __init__(self, ranks: dict[str, list[int]] | None = None, ties_factors: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.ranks, self.ties_factors = ranks or {}, ties_factors


class FactoredLlamaForCausalLM(LlamaForCausalLM):
    """A Llama with factors."""

    config_class = FactoredLlamaConfig

    def __init__(self, config: FactoredLlamaConfig) -> None:
        super().__init__(config)
        _factorize(self, config)


class FactoredQwen2Config(Qwen2Config):
    """As :class:`FactoredLlamaConfig`."""

    model_type = "factored_qwen2"

    def __init__(self, ranks: dict[str, list[int]] | None = None, ties_factors: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.ranks, self.ties_factors = ranks or {}, ties_factors


class FactoredQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 with factors."""

    config_class = FactoredQwen2Config

    def __init__(self, config: FactoredQwen2Config) -> None:
        super().__init__(config)
        _factorize(self, config)
