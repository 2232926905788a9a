"""A step rehearsed on tensors without data, beside the same step on tensors with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune, models
from kd_recipes.batch import Batch
from kd_recipes.estimation import rehearsal
from kd_recipes.estimation.ledger import CUDA, GLIBC, Allocator, Ledger
from kd_recipes.estimation.optimizers import optimizer_cost
from kd_recipes.estimation.rehearsal import Rehearsal, Shape, rehearse
from kd_recipes.tally import Tally

SIZES: dict[str, Any] = {"vocab_size": 320, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 128}
SIZES |= {"num_layers": 6, "embed_dim": 64, "intermediate_dim": 96}
LORA: dict[str, Any] = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8.0}
BUILDERS: dict[str, Callable[[], TransformerDecoder]] = {
    "full": lambda: models.llama(**SIZES),
    "untied": lambda: models.llama(**SIZES, tie_word_embeddings=False),
    "lora": lambda: models.lora_llama(**SIZES, **LORA, apply_lora_to_mlp=True),
    "dora": lambda: models.lora_llama(**SIZES, **LORA, use_dora=True),
}


def _on(device: str, build: Callable[[], TransformerDecoder]) -> TransformerDecoder:
    with torch.device(device):
        model = build()
    _torchtune.freeze_all_but_adapters(model)
    return model


def _rehearsed(build: Callable[[], TransformerDecoder], shape: Shape, *, recompute: bool = False) -> Rehearsal:
    settings: dict[str, Any] = {"master_weights": False, "loss_buffers": lambda student, teacher: 0}
    return rehearse(_on("meta", build), None, shape, recompute_activations=recompute, **settings)


def _played(model: TransformerDecoder, batch: Batch, recompute: bool) -> tuple[int, int, int]:
    """Bytes after the student's forward pass and after its backward pass, and the most of them, of a real step."""
    student = _torchtune.Headless(model.train(), recompute_activations=recompute)
    now = 0

    def changed(size: int) -> None:
        nonlocal now
        now += size

    with Tally(changed) as tally:
        hidden_TD = student(batch).logits.inputs[0]
        kept = now
        hidden_TD.backward(torch.empty_like(hidden_TD))
        del hidden_TD
    return kept, now, tally.peak


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_rehearsal_keeps_what_a_step_keeps(kind: str, packed: bool, recompute: bool) -> None:
    shape = Shape(2, 48, packed)
    batch = shape.batch()
    if batch.mask_BSS is not None:
        batch.mask_BSS.fill_(True)
    kept, left, peak = _played(_on("cpu", BUILDERS[kind]), batch, recompute)
    found = _rehearsed(BUILDERS[kind], shape, recompute=recompute)
    made = sum(tensor.nbytes for tensor in vars(batch).values() if tensor is not None)  # inside of a rehearsal
    head = 0 if kind in ("lora", "dora") else 320 * 64 * 4  # its gradient comes from the loss, and is there already
    ledger = Ledger(CUDA)
    ledger.hold(event.size for event in found.events)
    assert found.activations == kept
    if kind != "full":  # where the loss's gradient and the table's share a tensor
        assert ledger.held - (head if kind == "untied" else 0) == left
    assert max(ledger.peaks.values()) == pytest.approx(peak + made + head, rel=0.02)


def test_three_blocks_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 48, packed=True, num_micro_batches=2)
    short = _rehearsed(BUILDERS["lora"], shape, recompute=True)
    monkeypatch.setattr(rehearsal, "_shorten", lambda model: len(model.layers))
    whole = _rehearsed(BUILDERS["lora"], shape, recompute=True)
    assert short.activations == whole.activations
    assert [e.size for e in short.events if e.is_grad] == [e.size for e in whole.events if e.is_grad]
    ledgers = [Ledger(CUDA), Ledger(CUDA)]
    for ledger, found in zip(ledgers, (short, whole), strict=True):
        for event in found.events:
            ledger.phase = event.phase
            ledger.change(event.size)
    assert ledgers[0].peaks == ledgers[1].peaks


@pytest.mark.parametrize(
    ("section", "state"),
    [
        ({"_component_": "torch.optim.AdamW"}, 8.0),
        ({"_component_": "torch.optim.AdamW", "fused": True}, 8.0),
        ({"_component_": "torch.optim.SGD"}, 0.0),
        ({"_component_": "torch.optim.SGD", "momentum": 0.9}, 4.0),
        ({"_component_": "torchao.optim.AdamW8bit"}, 2.06),
    ],
)
def test_an_optimizer_keeps_what_it_is_seen_to_keep(section: dict[str, Any], state: float) -> None:
    cfg = OmegaConf.create({**section, "lr": 1e-3})
    assert optimizer_cost(cfg, torch.float32, is_cuda=False).state_bytes == pytest.approx(state, abs=0.01)


def test_small_pieces_stay_and_large_ones_go() -> None:
    ledger = Ledger(Allocator(keeps_below=100, waste=0.5))
    with ledger.during("one", [60, 30, 500]):
        assert ledger.held == 590
    assert ledger.held == 90
    ledger.phase = "two"
    ledger.change(80, moves=True)
    assert ledger.held == 90 + 40
    ledger.change(-80, moves=True)
    with ledger.during("two", [80, 50]):
        assert ledger.held == 130 + 40
    assert ledger.peaks == {"one": 590, "two": 170}
    assert GLIBC.keeps_below > CUDA.keeps_below
