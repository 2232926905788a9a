"""Decoders of all kinds, small and untrained, that generate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtune.models.llama2 import llama2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.peft import DoRALinear

from kd_recipes.compression import QuantizationAwareTraining
from kd_recipes.compression.torchao_tensors import as_torchao
from kd_recipes.lattices import Scheme, quantize
from kd_recipes.layers import LowRankEmbedding, LowRankLinear
from kd_recipes.models import decoder, llama, lora_llama, round_activations

V = 61
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 64,
}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14]]


def on_a_lattice() -> TransformerDecoder:
    model = llama(**SIZES)
    QuantizationAwareTraining("int4_g32", embeddings="int8").attach(model)
    return model


def factored() -> TransformerDecoder:
    model = llama(**SIZES)
    model.tok_embeddings = LowRankEmbedding(V, 32, 16)
    model.output = TiedLinear(model.tok_embeddings)
    for block in model.layers:
        block.attn.k_proj = LowRankLinear(32, 16, 8)
        block.mlp.w2 = LowRankLinear(64, 32, 12, three_factors=True)
    return model


def with_eight_bit_inputs() -> TransformerDecoder:
    model = llama(**SIZES, tie_word_embeddings=False)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    round_activations(model, {f"{name}.weight": "8da8w" for name in layers})
    return model


def of_torchao() -> TransformerDecoder:
    model = llama(**SIZES)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            codes = quantize(module.weight.detach(), Scheme.parse("int4_g32"))
            module.weight = nn.Parameter(as_torchao(codes, torch.float32), requires_grad=False)
    return model


TRAINABLE: dict[str, Callable[[], TransformerDecoder]] = {
    "tied": partial(llama, **SIZES),
    "untied": partial(llama, **SIZES, tie_word_embeddings=False),
    "all heads": partial(llama2, **{**SIZES, "num_kv_heads": 4}),
    "qwen2": partial(qwen2, **SIZES, tie_word_embeddings=False),
    "qwen2, tied": partial(qwen2, **SIZES, tie_word_embeddings=True),
    "pruned": partial(decoder, **{**SIZES, "num_kv_heads": 1}, head_dim=12, rope="qwen2", attn_bias=True),
    "lora": partial(lora_llama, **SIZES, **LORA),
    "dora": partial(lora_llama, **SIZES, **LORA, use_dora=True),
    "factored": factored,
    "on a lattice": on_a_lattice,
    "with 8-bit inputs": with_eight_bit_inputs,
}
BUILDERS = TRAINABLE | {"of torchao": of_torchao}


def build(name: str) -> TransformerDecoder:
    """With numbers larger than those that it is initialized with, so that likeliest ids differ."""
    torch.manual_seed(3)
    model = BUILDERS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("weight", "original", "u", "v", "bias")) and type(parameter.data) is torch.Tensor:
                parameter.normal_(std=0.2)
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
    return model
