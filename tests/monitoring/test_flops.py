"""FLOPs of a step beside those that torch counts as it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from kd_recipes.devices import peak_flops
from kd_recipes.models import llama, lora_llama
from kd_recipes.monitoring.flops import Sizes, step_flops, utilization

SIZES: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 96}
SIZES |= {"vocab_size": 320, "max_seq_len": 128}
SHAPE = (2, 96)


def _counted(model: TransformerDecoder, tokens_BS: Tensor, *, is_trained: bool) -> int:
    # the kernels of fused attention on a CPU are not counted by torch
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_trained):
        logits = model(tokens_BS)
        if is_trained:
            cross_entropy(logits.flatten(0, 1), tokens_BS.flatten()).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_step_counts_what_torch_counts(tied: bool) -> None:
    student = llama(num_layers=2, **SIZES, tie_word_embeddings=tied)
    teacher = llama(num_layers=5, **{**SIZES, "embed_dim": 128}, tie_word_embeddings=tied).requires_grad_(False)
    tokens_BS = torch.randint(0, 320, SHAPE)
    counted = _counted(student, tokens_BS, is_trained=True) + _counted(teacher, tokens_BS, is_trained=False)
    ours = step_flops(Sizes.of(student), [Sizes.of(teacher)], [SHAPE], tokens_BS.numel())
    print(f"\n{ours / counted - 1:+.2%}")
    assert ours == pytest.approx(counted, rel=0.02)


def test_micro_batches_add_up_and_labels_alone_reach_a_head() -> None:
    sizes = Sizes.of(llama(num_layers=2, **SIZES))
    whole = step_flops(sizes, [sizes], [SHAPE, (1, 64)], 100)
    assert whole == step_flops(sizes, [sizes], [SHAPE], 40) + step_flops(sizes, [sizes], [(1, 64)], 60)
    assert whole - step_flops(sizes, [sizes], [SHAPE, (1, 64)], 0) == (6 + 2) * 320 * 64 * 100
    assert step_flops(sizes, [], [SHAPE], 40) * 8 == step_flops(sizes, [sizes], [SHAPE], 40) * 6


def test_frozen_weights_below_adapters_take_two_thirds() -> None:
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8.0}
    student = lora_llama(num_layers=8, **SIZES, **lora)
    set_trainable_params(student, get_adapter_params(student))
    counted = _counted(student, torch.randint(0, 320, SHAPE), is_trained=True)
    sizes = Sizes.of(student)
    ours = step_flops(sizes, [], [SHAPE], SHAPE[0] * SHAPE[1])
    assert sizes.trained_body == sum(p.numel() for p in student.parameters() if p.requires_grad) < 0.1 * sizes.body
    assert ours == pytest.approx(counted, rel=0.02)  # the first block's inputs need no gradient


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_nothing_is_said_of_a_cpu() -> None:
    assert utilization(1e12, 1.0, torch.device("cpu")) is None
