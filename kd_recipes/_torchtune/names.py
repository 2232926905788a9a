"""Names and rows of weights, in Hugging Face's files and in torchtune's models, for Llamas and Qwen2s.

torchtune rotates neighbouring channels of a Llama's head together and transformers those half a head apart, so the
rows of its queries and keys stand in another order. What belongs to a row (a factor, codes, scales) moves with it.
"""

# H heads, E channels of a head

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchtune.models.qwen2._convert_weights import _FROM_HF

_PARTS = ("weight", "bias", "u", "s", "v")  # parameters of layers; codes and scales are parts of these
_HF: dict[str, str] = {
    key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in _FROM_HF.items() if name is not None
}
_TUNE = {name.removesuffix(".scale"): key for key, name in _HF.items()}
_ROWLESS = ("v", "s")  # factors whose rows are not the layer's outputs


def to_tune(name: str) -> str:
    """torchtune's name of a tensor in a Hugging Face file.

    Raises:
        KeyError: there is no such tensor in a Llama or Qwen2.
    """
    module, rest, index = _split(name)
    found = _HF[module]
    if found.endswith(".scale"):  # of a norm: its parameter has another name, too
        return found.format(index)
    return f"{found.format(index)}.{rest}"


def to_hf(name: str) -> str:
    """The name in a Hugging Face file of torchtune's tensor.

    Raises:
        KeyError: there is no such tensor in a Llama or Qwen2.
    """
    if name.endswith("norm.scale"):
        module, _, index = _split(name.removesuffix(".scale") + ".weight")
        return f"{_TUNE[module].format(index)}.weight"
    module, rest, index = _split(name)
    return f"{_TUNE[module].format(index)}.{rest}"


def _split(name: str) -> tuple[str, str, str]:
    """The module's name with {} for its block, the rest from the parameter on, and the block's number."""
    match = re.fullmatch(rf"(.+?)\.((?:{'|'.join(_PARTS)})(?:\.(?:codes|scales))?)", name)
    if match is None:
        raise KeyError(name)
    number = re.search(r"\.(\d+)\.", match[1])
    module = re.sub(r"\.\d+\.", ".{}.", match[1], count=1)
    return module, match[2], number[1] if number else ""


def rows_to_tune(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The rows of a tensor of a Hugging Face file in torchtune's order.

    Args:
        name: torchtune's.
        tensor: as it is in the file.
        config: the checkpoint's config.json.
    """
    heads = _rotated_heads(name, config)
    return tensor if heads is None else _swap(tensor, heads, 2)


def rows_to_hf(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The inverse of :func:`rows_to_tune`; the name is torchtune's, too."""
    heads = _rotated_heads(name, config)
    return tensor if heads is None else _swap(tensor, heads, tensor.shape[0] // heads // 2)


def _rotated_heads(name: str, config: Mapping[str, Any]) -> int | None:
    match = re.search(r"\.(q|k)_proj\.(\w+)", name)
    if match is None or match[2] in _ROWLESS or config["model_type"] != "llama":
        return None
    num_heads = int(config["num_attention_heads"])
    return num_heads if match[1] == "q" else int(config.get("num_key_value_heads") or num_heads)


def _swap(tensor: Tensor, heads: int, outer: int) -> Tensor:
    """Within each head, rows ``[outer, inner]`` become ``[inner, outer]``."""
    head_E = tensor.shape[0] // heads
    return tensor.view(heads, outer, head_E // outer, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
