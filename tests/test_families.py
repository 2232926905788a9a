"""Every model family that torchtune builds: the fused loss equals the path through its logits, to every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models import gemma, gemma2, llama2, llama3, llama3_1, llama3_2, mistral, phi3, qwen2
from torchtune.modules.peft import DoRALinear, get_adapter_params, set_trainable_params

from kd_recipes import _torchtune, models
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.losses import JensenShannon, Objective
from kd_recipes.signals import DenseSignal, LinearLogits

VOCABULARY = 131
SIZES = {
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 32,
}
GEMMA = {**SIZES, "head_dim": 16}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}
TO_OUTPUT = {**LORA, "apply_lora_to_output": True}
WIDE = {**SIZES, "embed_dim": 256, "intermediate_dim": 512}  # NF4 blocks need it

FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama2": (llama2.llama2, SIZES),
    "llama3": (llama3.llama3, SIZES),
    "llama3_1": (llama3_1.llama3_1, SIZES),
    "llama3_2": (llama3_2.llama3_2, SIZES),
    "ours, tied": (models.llama, SIZES),
    "qwen2, tied": (qwen2.qwen2, {**SIZES, "tie_word_embeddings": True}),
    "qwen2, untied": (qwen2.qwen2, SIZES),
    "gemma": (gemma.gemma, GEMMA),
    "gemma2": (gemma2.gemma2, GEMMA),
    "mistral": (mistral.mistral, SIZES),
    "phi3 and phi4": (phi3.phi3, SIZES),
    "llama3 LoRA": (llama3.lora_llama3, {**SIZES, **LORA}),
    "llama3 LoRA on the head": (llama3.lora_llama3, {**SIZES, **TO_OUTPUT}),
    "llama3 DoRA on the head": (llama3.lora_llama3, {**SIZES, **TO_OUTPUT, "use_dora": True}),
    "mistral LoRA on the head": (mistral.lora_mistral, {**SIZES, **TO_OUTPUT}),
    "phi3 LoRA on the head": (phi3.lora_phi3, {**SIZES, **TO_OUTPUT}),
    "qwen2 LoRA": (qwen2.lora_qwen2, {**SIZES, **LORA, "tie_word_embeddings": True}),
    "gemma LoRA": (gemma.lora_gemma, {**GEMMA, **LORA}),
    "gemma2 LoRA": (gemma2.lora_gemma2, {**GEMMA, **LORA}),
    "llama3_2 DoRA": (llama3_2.lora_llama3_2, {**SIZES, **LORA, "use_dora": True}),
    "llama3_1 QLoRA": (llama3_1.lora_llama3_1, {**WIDE, **LORA, "quantize_base": True}),
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    builder, sizes = FAMILIES[name]
    model = builder(**sizes)
    model.tok_embeddings.weight.data *= 0.2  # tied, it makes logits; the formulas below cannot do with p = 0
    for parameter_name, parameter in model.named_parameters():
        if "lora_b" in parameter_name:  # zero at first, which would hide what it is multiplied with
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
            module.magnitude.data *= 1.3
    adapters = get_adapter_params(model)
    if adapters:
        set_trainable_params(model, adapters)
    return model


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """torchtune's own path; for Gemma 2 with the cap where the model has it, on the logits."""
    if isinstance(model.norm, gemma2._component_builders.Gemma2FinalNorm):
        norm, cap = model.norm.rms_norm, model.norm.capping_value
        model.unembed = lambda hidden: cap * torch.tanh(model.output(norm(hidden)) / cap)
    return model(tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_loss_equals_the_path_through_the_logits(name):
    torch.manual_seed(1)
    tokens, labels = torch.randint(0, VOCABULARY, (2, 2, 9))
    labels[0, :3] = IGNORE_INDEX
    teacher = torch.randn(18, VOCABULARY)
    model, twin = _build(name), _build(name)
    valid = labels.flatten() != IGNORE_INDEX

    z = _logits(twin, tokens).flatten(0, 1)[valid].float()
    p, q = F.softmax(teacher[valid], -1), F.softmax(z, -1)
    m = 0.5 * (p + q)
    jsd = 0.5 * (p * (p.log() - m.log())).sum() + 0.5 * (q * (q.log() - m.log())).sum()
    truth = 0.5 * jsd + 0.5 * F.cross_entropy(z, labels.flatten()[valid], reduction="sum")
    truth.backward()

    head = _torchtune.take_head(model)
    student = DenseSignal(head.logits(model(tokens).flatten(0, 1)))
    objective = Objective(divergence=JensenShannon(0.5), chunk_size=4)
    loss = objective(student, DenseSignal(LinearLogits(given_TV=teacher)), Batch(tokens, labels))
    loss.total.backward()

    torch.testing.assert_close(loss.total, truth, rtol=1e-5, atol=1e-5)
    expected = dict(twin.named_parameters())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    for parameter_name, parameter in trained.items():
        other = expected[parameter_name].grad
        assert (parameter.grad - other).norm() <= 2e-5 * other.norm() + 1e-7, parameter_name


def test_an_unknown_head_is_an_error():
    model = _build("llama3")
    model.output = nn.Sequential(nn.Linear(64, VOCABULARY))
    with pytest.raises(ValueError, match="an output head that is linear"):
        _torchtune.take_head(model)
