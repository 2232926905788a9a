"""What a GGUF file says of its model, as Hugging Face's config.json says it, and the names and shapes of its tensors.

Only metadata is read here, so every reason to refuse a file is found before the first weight is touched.

Shapes: L blocks, D hidden, F feed-forward, H heads, K key-value heads, E head width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.gguf_format.names import (
    ARCHITECTURES,
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    ORIGINAL_CONTEXT,
    llama3_divisors,
    tensor_shapes,
)


def hf_config(metadata: Mapping[str, Any], *, vocab_size: int, is_tied: bool, dtype: str) -> dict[str, Any]:
    """The config.json of the model that a GGUF file describes.

    Args:
        metadata: the GGUF's key-value pairs.
        vocab_size: rows of the embedding, which may be padded beyond the tokens.
        is_tied: whether the output head is the embedding.
        dtype: torch's name of the dtype to be written (``bfloat16``).

    Raises:
        ConfigError: an architecture or a variant of attention or RoPE that we do not translate, or a missing key.
    """
    arch = _architecture(metadata)
    num_heads = _integer(metadata, f"{arch}.attention.head_count")
    hidden_size = _integer(metadata, f"{arch}.embedding_length")
    head_dim = int(metadata.get(f"{arch}.attention.key_length", hidden_size // num_heads))
    _refuse_variants(metadata, arch, head_dim)
    model_type, class_name = ARCHITECTURES[arch]
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _integer(metadata, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _integer(metadata, f"{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _integer(metadata, f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _integer(metadata, f"{arch}.context_length"),
        "rms_norm_eps": _shortest(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(metadata.get(f"{arch}.rope.freq_base", 10_000.0)),
        # torchtune's checkpointer reads this key without a default
        "tie_word_embeddings": is_tied,
        "attention_dropout": 0.0,
        **({"use_sliding_window": False} if arch == "qwen2" else {"attention_bias": False, "mlp_bias": False}),
        **special_token_ids(metadata),
        "torch_dtype": dtype,
    }


def _architecture(metadata: Mapping[str, Any]) -> str:
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise _refuse("general.architecture", arch, f"one of {', '.join(ARCHITECTURES)}")
    if (parts := int(metadata.get("split.count", 1))) > 1:
        remedy = "Merge them first: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise ConfigError(Problem("gguf_file", f"a file in {parts} parts", "one whole file", remedy))
    return str(arch)


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as the file has them."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {hf: metadata.get(f"tokenizer.ggml.{ggml}_token_id") for ggml, hf in names.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def _refuse_variants(metadata: Mapping[str, Any], arch: str, head_dim: int) -> None:
    wanted = {
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.scaling.type": "none",
        f"{arch}.expert_count": 0,
    }
    problems = [
        Problem(f"gguf_file: {key}", metadata[key], repr(value), "Only the plain form of this model is supported.")
        for key, value in wanted.items()
        if key in metadata and metadata[key] != value
    ]
    if f"{arch}.attention.layer_norm_rms_epsilon" not in metadata:
        problems.append(Problem(f"gguf_file: {arch}.attention.layer_norm_rms_epsilon", None, "a number"))
    if problems:
        raise ConfigError(*problems)


def _integer(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int):  # a list here is a model whose blocks differ
        raise _refuse(key, value, "one whole number for all blocks")
    return value


def _shortest(value: float) -> float:
    """1e-05 and not 9.999999747378752e-06: the shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


def _refuse(key: str, got: object, wanted: str) -> ConfigError:
    return ConfigError(Problem(f"gguf_file: {key}", got, wanted))


def llama3_rope_scaling(divisors: npt.NDArray[np.float32], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``rope_scaling`` section from which a GGUF's ``rope_freqs.weight`` was computed.

    Args:
        divisors: (E / 2) what each rotary frequency is divided by.
        config: its config.json.

    Returns:
        None where nothing is scaled.

    Raises:
        ConfigError: the divisors do not follow from Llama 3's formula, so config.json cannot say them.
    """
    factor = float(divisors.max())
    if np.all(divisors == 1.0):
        return None
    expected = llama3_divisors(factor, config["rope_theta"], config["head_dim"])
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-4):
        raise _refuse("rope_freqs.weight", "frequencies scaled in another way", "Llama 3's RoPE scaling, or none")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }


def check_tensors(found: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> None:
    """Refuse a file whose tensors are not those that its metadata describe.

    Args:
        found: Hugging Face name (GGUF name where we know none) -> shape.
        config: its config.json.

    Raises:
        ConfigError: unknown, missing or misshapen tensors.
    """
    expected = tensor_shapes(config)
    problems = [
        Problem("gguf_file", _few(names), "no such tensors" if kind == "unknown" else f"no {kind} tensors")
        for kind, names in {
            "unknown": [name for name in found if name not in expected],
            "missing": [name for name in expected if name not in found],
            "misshapen": [n for n, shape in expected.items() if n in found and tuple(found[n]) != shape],
        }.items()
        if names
    ]
    if problems:
        raise ConfigError(*problems)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
