"""What has to be known of a model before a step of compression, and is known of it after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import Scheme

_FEW = 0.05  # share of zeros below which they are there by chance
_PLAIN_BITS = 16  # of a weight that is not on a lattice, at least

Zeros = Literal["none", "unstructured", "2:4"]


@dataclass(frozen=True)
class Form:
    """What a model is made of, known before its weights are: what one step leaves is what the next one takes.

    Args:
        config: config.json of the dense model.
        zeros: the pattern of connections that are not there.
        rank_multiple: what divides the ranks of all products of factors in the blocks; 0 where there are none.
        table_rank: likewise of the embedding, and of a head of its own.
        schemes: lattices that weights are on, by name.
        alternatives: what it may be instead, where a step chooses only when it has seen the weights; a step is asked
            about one after another, see :func:`~kd_recipes.compression.step.check_steps`.
    """

    config: Mapping[str, Any]
    zeros: Zeros = "none"
    rank_multiple: int = 0
    table_rank: int = 0
    schemes: frozenset[str] = field(default_factory=frozenset)
    alternatives: tuple[Form, ...] = ()

    @property
    def outcomes(self) -> tuple[Form, ...]:
        """All that it may be, each by itself."""
        return (replace(self, alternatives=()), *self.alternatives)

    @property
    def has_factors(self) -> bool:
        """Whether some matrix is a product of factors."""
        return bool(self.rank_multiple or self.table_rank)

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads."""
        return int(self.config.get("num_key_value_heads") or self.num_heads)

    @property
    def embed_dim(self) -> int:
        """Channels of the residual stream."""
        return int(self.config["hidden_size"])

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return int(self.config.get("head_dim") or self.embed_dim // self.num_heads)

    @property
    def intermediate_dim(self) -> int:
        """Neurons of a feed-forward layer."""
        return int(self.config["intermediate_size"])

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the linear layers of a block, by torchtune's names."""
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        up = (self.intermediate_dim, self.embed_dim)
        return {
            "attn.q_proj": (width, self.embed_dim),
            "attn.k_proj": (kv_width, self.embed_dim),
            "attn.v_proj": (kv_width, self.embed_dim),
            "attn.output_proj": (self.embed_dim, width),
            "mlp.w1": up,
            "mlp.w3": up,
            "mlp.w2": up[::-1],
        }

    @property
    def num_parameters(self) -> int:
        """Of the dense model; a tied head is counted once."""
        block = sum(rows * columns for rows, columns in self.shapes.values()) + 2 * self.embed_dim
        if self.config.get("model_type") == "qwen2":  # whose queries, keys and values have biases
            block += sum(self.shapes[f"attn.{name}_proj"][0] for name in "qkv")
        tables = 1 if self.config.get("tie_word_embeddings", False) else 2
        return self.num_layers * block + (tables * int(self.config["vocab_size"]) + 1) * self.embed_dim

    @property
    def least_bytes(self) -> int:
        """That its weights take on disk at the least; 0 for factors, of whose ranks only a divisor is known."""
        bits = min((Scheme.parse(name).bits for name in self.schemes), default=_PLAIN_BITS)
        return 0 if self.has_factors else self.num_parameters * bits // 8

    def require(self, what: str, *, dense: bool = True, zeros: bool = True, unquantized: bool = True) -> None:
        """Refuse a step that cannot follow on those before it.

        Args:
            what: the step would do, for the message.
            dense: whether it takes whole matrices alone.
            zeros: whether it would fill zeros in.
            unquantized: whether it takes weights off their lattice.

        Raises:
            ConfigError: the form is not one that it takes.
        """
        first = "Put this step first"
        if dense and self.has_factors:
            remedy = f"{first}, or kd_recipes.compression.ToDense between them"
            raise ConfigError(Problem("._component_", f"{what} of factors", "whole matrices", remedy))
        if unquantized and self.schemes:
            got = f"{what} of weights in {', '.join(sorted(self.schemes))}, which it would take off their lattice"
            raise ConfigError(Problem("._component_", got, "weights that are not quantized", f"{first}: quantize last"))
        if zeros and self.zeros != "none":
            got = f"{what} of a model with {self.zeros} zeros, which it would fill in"
            raise ConfigError(Problem("._component_", got, "a model without", first))


def zero_pattern(weight_OI: Tensor) -> Zeros:
    """What the zeros of a weight look like."""
    zeros_OI = weight_OI == 0
    if float(zeros_OI.float().mean()) < _FEW:
        return "none"
    if weight_OI.shape[1] % 4 == 0 and bool((zeros_OI.unflatten(1, (-1, 4)).sum(-1) >= 2).all()):
        return "2:4"
    return "unstructured"
