"""Builders for models that torchtune can run but has no public builder for, and the `model:` section of a checkpoint.

torchtune's builders of plain Llamas cannot tie embeddings, and the one that can (Llama 3.2) scales RoPE; but a scale
factor of one makes that scaling the identity. So a plain Llama of any size (SmolLM2, TinyLlama) is the Llama 3.2
builder with that factor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from torch import nn
from torchtune import config as tune_config
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TiedLinear, TransformerDecoder

from kd_recipes._torchtune.decoder import Adapters, Rope, build_decoder
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import Scheme, fake_quantize_activations
from kd_recipes.layers import LowRankEmbedding, LowRankLinear

# model_type of a config.json whose model is no plain matrices, so that transformers does not take them for missing
COMPRESSED = "kd_recipes"

# What torchtune's llama3_2 builder has no argument for.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    rope_base: int = 10_000,
    intermediate_dim: int | None = None,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = True,
) -> TransformerDecoder:
    """A Llama with plain rotary embeddings.

    Args:
        vocab_size: rows of the embedding.
        num_layers: blocks.
        num_heads: query heads; a head is ``embed_dim / num_heads`` wide.
        num_kv_heads: key-value heads, a divisor of ``num_heads``.
        embed_dim: width of the residual stream.
        max_seq_len: longest sequence, in tokens.
        attn_dropout: dropout of the attention weights.
        rope_base: base of the rotary frequencies.
        intermediate_dim: width of the feed-forward layer; None for Llama's own 8/3 of ``embed_dim``, rounded up.
        norm_eps: epsilon of the RMS norms.
        tie_word_embeddings: whether the output head is the embedding.
    """
    return llama3_2(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
        rope_base=rope_base,
        intermediate_dim=intermediate_dim,
        norm_eps=norm_eps,
        scale_factor=1,
        tie_word_embeddings=tie_word_embeddings,
    )


def lora_llama(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int | None = None,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    rope_base: int = 10_000,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    tie_word_embeddings: bool = True,
) -> TransformerDecoder:
    """:func:`llama` with low-rank adapters, https://arxiv.org/abs/2106.09685.

    Args:
        lora_attn_modules: which of ``q_proj k_proj v_proj output_proj`` get adapters.
        apply_lora_to_mlp: whether the feed-forward layers do.
        apply_lora_to_output: whether the output head does; torchtune's builder cannot.
        lora_rank: rank of an adapter.
        lora_alpha: an adapter's output is multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: dropout of an adapter's input.
        use_dora: decompose weights in magnitude and direction, https://arxiv.org/abs/2402.09353.
        quantize_base: keep the frozen weights in NF4.

    Raises:
        ConfigError: ``apply_lora_to_output`` is set.
    """
    if apply_lora_to_output:
        remedy = "Use apply_lora_to_mlp and lora_attn_modules."
        raise ConfigError(Problem("model.apply_lora_to_output", True, "False for a Llama", remedy))
    return lora_llama3_2(
        lora_attn_modules=list(lora_attn_modules),
        apply_lora_to_mlp=apply_lora_to_mlp,
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        max_seq_len=max_seq_len,
        intermediate_dim=intermediate_dim,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
        scale_factor=1,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
        tie_word_embeddings=tie_word_embeddings,
    )


def decoder(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_bias: bool = False,
    attn_dropout: float = 0.0,
    rope: Rope = "llama",
    rope_base: int = 10_000,
    rope_scale_factor: int = 1,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = True,
) -> TransformerDecoder:
    """A Llama or Qwen2 with heads of any width: what pruning heads or channels leaves.

    Args:
        vocab_size: rows of the embedding.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key-value heads, a divisor of ``num_heads``.
        head_dim: width of a head; need not be ``embed_dim / num_heads``.
        embed_dim: width of the residual stream.
        intermediate_dim: width of the feed-forward layers.
        max_seq_len: longest sequence, in tokens.
        attn_bias: whether query, key and value projections have biases, as Qwen2's have.
        attn_dropout: dropout of the attention weights.
        rope: which pairs of a head's channels are rotated together: ``llama`` or ``qwen2``.
        rope_base: base of the rotary frequencies.
        rope_scale_factor: of Llama 3's scaling; 1 for none.
        norm_eps: epsilon of the RMS norms.
        tie_word_embeddings: whether the output head is the embedding.

    Raises:
        ConfigError: heads that do not divide by key-value heads, or another ``rope``.
    """
    return build_decoder(**_checked(locals()), adapters=Adapters((), False, False, {}))


def lora_decoder(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    **sizes: Any,
) -> TransformerDecoder:
    """:func:`decoder` with low-rank adapters; the arguments of both it and :func:`lora_llama`.

    Raises:
        ConfigError: as :func:`decoder`; or ``apply_lora_to_output`` or ``quantize_base`` is set.
    """
    for name, value in {"apply_lora_to_output": apply_lora_to_output, "quantize_base": quantize_base}.items():
        if value:
            raise ConfigError(Problem(f"model.{name}", True, "False for a pruned model"))
    defaults = {name: p.default for name, p in signature(decoder).parameters.items() if p.default is not p.empty}
    settings = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
    adapters = Adapters(lora_attn_modules, apply_lora_to_mlp, use_dora, settings)
    return build_decoder(**_checked({**defaults, **sizes}), adapters=adapters)


def _checked(sizes: dict[str, Any]) -> dict[str, Any]:
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        wanted = f"a divisor of num_heads={sizes['num_heads']}"
        raise ConfigError(Problem("model.num_kv_heads", sizes["num_kv_heads"], wanted))
    if sizes["rope"] not in get_args(Rope):
        raise ConfigError(Problem("model.rope", sizes["rope"], f"one of {', '.join(get_args(Rope))}"))
    return sizes


def from_checkpoint(checkpoint_dir: str) -> TransformerDecoder:
    """The model, without its weights, of a directory that the compress recipe has left.

    Layers that have become products of factors are built as such; layers whose inputs are to be 8-bit integers round
    them.

    Args:
        checkpoint_dir: the directory; of it config.json is read.

    Raises:
        ConfigError: it is none, or its model cannot be built.
    """
    path = Path(checkpoint_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("model.checkpoint_dir", str(path), "a readable JSON file", str(error))) from error
    dense = config["dense"] if config.get("model_type") == COMPRESSED else config
    model: TransformerDecoder = tune_config.instantiate(OmegaConf.create(model_section(dense)))
    for name, ranks in config.get("ranks", {}).items():
        _factorize(model, name, ranks)
    round_activations(model, config.get("schemes", {}))
    return model


def _factorize(model: TransformerDecoder, name: str, ranks: Sequence[int]) -> None:
    """Put an untrained product of factors, with these sizes between them, in the place of a layer."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Embedding):
        factored: nn.Module = LowRankEmbedding(layer.num_embeddings, layer.embedding_dim, ranks[0])
        if isinstance(model.output, TiedLinear):
            model.output = TiedLinear(factored)
    else:
        sizes = (layer.in_features, layer.out_features, ranks[0])
        factored = LowRankLinear(*sizes, bias=layer.bias is not None, three_factors=len(ranks) == 2)
    model.set_submodule(name, factored)


def round_activations(model: nn.Module, schemes: Mapping[str, str]) -> None:
    """Round the inputs of linear layers to 8 bits a token, where their weights' scheme says so, and nowhere else.

    A head that is taken off its model finds ``rounding`` in it.

    Args:
        model: whose layers.
        schemes: name of a parameter -> the scheme that it is in.
    """
    names = {key.rpartition(".")[0] for key, name in schemes.items() if Scheme.parse(name).dynamic_activations}
    for name, layer in model.named_modules():
        if handle := vars(layer).pop("rounding", None):
            handle.remove()
        if name in names and not isinstance(layer, (nn.Embedding, LowRankEmbedding)):
            layer.rounding = layer.register_forward_pre_hook(_round_inputs)


def _round_inputs(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_quantize_activations(args[0]), *args[1:])


def model_section(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model:`` section of a torchtune config that builds the model of a Hugging Face checkpoint.

    Args:
        hf_config: the checkpoint's config.json, as transformers 4 or 5 writes it.

    Returns:
        ``_component_`` and its arguments.

    Raises:
        ConfigError: another ``model_type`` than llama and qwen2, or a variant that torchtune's builders cannot build.
    """
    rope = rope_settings(hf_config)
    problems = _unsupported(hf_config, rope)
    if problems:
        raise ConfigError(*problems)
    arguments = {
        "vocab_size": hf_config["vocab_size"],
        "num_layers": hf_config["num_hidden_layers"],
        "num_heads": hf_config["num_attention_heads"],
        "num_kv_heads": hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"],
        "embed_dim": hf_config["hidden_size"],
        "intermediate_dim": hf_config["intermediate_size"],
        "max_seq_len": hf_config["max_position_embeddings"],
        "rope_base": _whole(rope["rope_theta"]),
        "norm_eps": hf_config.get("rms_norm_eps", 1e-6),  # transformers' default for both; the builders' is 1e-5
        "tie_word_embeddings": bool(hf_config.get("tie_word_embeddings", False)),
    }
    head_dim = hf_config.get("head_dim")
    if head_dim and head_dim * arguments["num_heads"] != arguments["embed_dim"]:
        is_qwen2 = hf_config["model_type"] == "qwen2"
        arguments |= {"head_dim": head_dim, "attn_bias": is_qwen2, "rope": "qwen2" if is_qwen2 else "llama"}
        arguments["rope_scale_factor"] = _whole(rope["factor"]) if rope["rope_type"] == "llama3" else 1
        return {"_component_": "kd_recipes.models.decoder", **arguments}
    if hf_config["model_type"] == "qwen2":
        return {"_component_": "torchtune.models.qwen2.qwen2", **arguments}
    if rope["rope_type"] == "llama3":
        scale_factor = _whole(rope["factor"])
        return {"_component_": "torchtune.models.llama3_2.llama3_2", **arguments, "scale_factor": scale_factor}
    return {"_component_": "kd_recipes.models.llama", **arguments}


def checkpointer_model_type(hf_config: Mapping[str, Any]) -> str:
    """The ``model_type`` that torchtune's FullModelHFCheckpointer converts this checkpoint with.

    Every Llama is ``LLAMA3_2``: torchtune converts ``LLAMA3`` and ``LLAMA3_2`` by the same code, which takes a tied
    checkpoint without ``lm_head.weight`` as it is. (One that repeats the embedding as ``lm_head.weight`` is refused
    when the weights are loaded; ``QWEN2`` drops it, as told by ``tie_word_embeddings`` in config.json.)

    Raises:
        ConfigError: another ``model_type`` than llama and qwen2.
    """
    types = {"llama": "LLAMA3_2", "qwen2": "QWEN2"}
    model_type = hf_config.get("model_type")
    if model_type not in types:
        raise ConfigError(Problem("config.json: model_type", model_type, f"one of {', '.join(types)}"))
    return types[model_type]


def rope_settings(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings: transformers 4 keeps them in ``rope_theta`` and ``rope_scaling``, 5 in ``rope_parameters``."""
    settings = {"rope_type": "default", "rope_theta": hf_config.get("rope_theta", 10_000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        settings |= hf_config.get(name) or {}
    if "type" in settings:  # the key before transformers 4.43
        settings["rope_type"] = settings.pop("type")
    return settings


def _unsupported(hf_config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[Problem]:
    model_type = hf_config.get("model_type")
    if model_type not in ("llama", "qwen2"):
        return [Problem("config.json: model_type", model_type, "llama or qwen2", "Write the model section by hand.")]
    wanted: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    wanted |= {"use_sliding_window": False}
    found = {name: hf_config.get(name) for name in wanted}
    rope_types = ("default", "llama3") if model_type == "llama" else ("default",)
    if rope["rope_type"] == "llama3" and model_type == "llama":
        wanted |= _LLAMA3_ROPE
        found |= {name: rope.get(name) for name in _LLAMA3_ROPE}
    problems = [
        Problem(f"config.json: {name}", found[name], repr(value), "torchtune's builder has no argument for it.")
        for name, value in wanted.items()
        if found[name] is not None and found[name] != value
    ]
    if rope["rope_type"] not in rope_types:
        problems.append(Problem("config.json: rope_type", rope["rope_type"], " or ".join(rope_types)))
    return problems


def _whole(value: float) -> int | float:
    """An int where it is one: torchtune annotates these arguments so."""
    return int(value) if float(value).is_integer() else value
