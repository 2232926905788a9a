"""What other packages make of the same model and text, each left as a plain Hugging Face directory.

They want other versions than torchtune does, and so an environment of their own, which `compression.py` makes:

    python tests/benchmarks/peers.py NAME TEACHER TEXT OUTPUT
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_TOKENS, LENGTH = 8192, 512  # of calibration text, as compression.py asks for
NUM_NEURONS = 864


def calibration(teacher: str, text: str) -> list[torch.Tensor]:
    """Windows of ids ``[1, S]``."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [json.loads(line)["text"] for line in Path(text).read_text("utf-8").splitlines()[:200]]
    random.Random(0).shuffle(rows)
    windows: list[torch.Tensor] = []
    for row in rows:
        if sum(window.numel() for window in windows) < NUM_TOKENS:
            windows.append(tokenizer(row, return_tensors="pt").input_ids[:, :LENGTH])
    return windows


def gptq(model: Any, windows: list[torch.Tensor], num_bits: int, group_size: int) -> None:
    """llm-compressor's GPTQ, symmetric, of all linear layers but the head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(
        num_bits=num_bits, type="int", symmetric=True, strategy="group", group_size=group_size, actorder=None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = [{"input_ids": window[0].tolist(), "attention_mask": [1] * window.shape[1]} for window in windows]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=LENGTH,
        output_dir=None,
    )


def torchao_hqq(model: Any, num_bits: int, group_size: int) -> None:
    """torchao alone, which goes by the weights: the scale by half-quadratic optimization."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{num_bits}"),
        granularity=PerGroup(group_size),
        intx_choose_qparams_algorithm="hqq_scale_only",
    )
    head = model.lm_head
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and module is not head)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight = torch.nn.Parameter(module.weight.dequantize())


def taylor(model: Any, windows: list[torch.Tensor]) -> None:
    """torch-pruning's neurons by first-order Taylor importance on the text."""
    import torch_pruning as tp

    for window in windows:
        (model(input_ids=window, labels=window).loss * window.numel() / NUM_TOKENS).backward()
    ratios = {layer.mlp.gate_proj: 1 - NUM_NEURONS / layer.mlp.gate_proj.out_features for layer in model.model.layers}
    pruner = tp.pruner.BasePruner(
        model,
        windows[0],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        root_module_types=[torch.nn.Linear],
        ignored_layers=[model.lm_head, *(layer.self_attn for layer in model.model.layers)],
        forward_fn=lambda model, window: model(window).logits,
        output_transform=lambda logits: logits.sum(),
    )
    pruner.step()
    model.zero_grad()
    model.config.intermediate_size = NUM_NEURONS


def main() -> None:
    """Make one."""
    name, teacher, text, output = sys.argv[1:]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    keys = set(model.state_dict())
    windows = calibration(teacher, text)
    match name.split("_"):
        case ["torch", "pruning"]:
            taylor(model, windows)
        case ["llm", "compressor", bits, group]:
            gptq(model, windows, int(bits), int(group))
        case ["torchao", bits, group]:
            torchao_hqq(model, int(bits), int(group))
    state = {key: value.detach() for key, value in model.state_dict().items() if key in keys}
    plain = AutoModelForCausalLM.from_config(model.config) if name != "torch_pruning" else model
    plain.load_state_dict(state)
    if getattr(plain.config, "quantization_config", None) is not None:
        del plain.config.quantization_config
    plain.save_pretrained(output)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(output)


if __name__ == "__main__":
    main()
