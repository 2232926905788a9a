"""Names and shapes of a GGUF file's tensors, beside those of a Hugging Face checkpoint, and what Llama 3 divides by.

Shapes: L blocks, D hidden, F feed-forward, H heads, K key-value heads, E head width, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# GGUF architecture -> (config.json's model_type, its class)
ARCHITECTURES = {"llama": ("llama", "LlamaForCausalLM"), "qwen2": ("qwen2", "Qwen2ForCausalLM")}

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_BLOCK, _GGUF_TOP = ({hf: gguf for gguf, hf in names.items()} for names in (_BLOCK, _TOP))

# Meta's published RoPE scaling; a GGUF keeps only the divisors that follow from it.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192
ROPE_DIVISORS = "rope_freqs.weight"


def llama3_divisors(factor: float, rope_theta: float, head_dim: int) -> npt.NDArray[np.float32]:
    """What each rotary frequency of a head is divided by in Llama 3.1 and later, ``[E / 2]``."""
    wavelengths = 2 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (ORIGINAL_CONTEXT / wavelengths - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def hf_name(gguf_name: str) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for a name we do not know."""
    prefix, _, rest = gguf_name.partition(".")
    if prefix != "blk":
        return _TOP.get(gguf_name)
    block, _, part = rest.partition(".")
    return f"model.layers.{block}.{_BLOCK[part]}" if part in _BLOCK else None


def gguf_name(hf_name: str) -> str | None:
    """The inverse of :func:`hf_name`."""
    prefix, _, rest = hf_name.removeprefix("model.").partition(".")
    if prefix != "layers":
        return _GGUF_TOP.get(hf_name)
    block, _, part = rest.partition(".")
    return f"blk.{block}.{_GGUF_BLOCK[part]}" if part in _GGUF_BLOCK else None


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint that ``config`` describes."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config["model_type"] == "qwen2":
        widths = {"q": query, "k": key, "v": key}
        block |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes
