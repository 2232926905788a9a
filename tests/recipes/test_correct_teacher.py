"""Correcting a teacher: what a user types, what comes of it, and that a distillation takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import snapshot
from omegaconf import OmegaConf
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from kd_recipes.config import load_and_validate
from kd_recipes.correct_teacher import fine_tuning, lora_section
from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe
from kd_recipes.errors import ConfigError
from kd_recipes.tokenizers import hf_tokenizer
from toy import Toys, distill, logged, run_tune, sentence, text_section

WriteConfig = Callable[..., Path]


@pytest.fixture
def correcting(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Callable[..., Path]:
    """``correcting(**correction)``: a config of a distillation that says how its teacher is to be corrected."""

    def write(**correction: Any) -> Path:
        own = {"output_dir": str(tmp_path / "corrected"), "max_steps": 6, "optimizer": {"lr": 1e-2}, **correction}
        held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
        return write_config(tmp_path, **{"recipe": None, "correction": own, "eval_dataset": held_out})

    return write


def _held_out_loss(directory: Path) -> float:
    """Nats a token of the held-out sentences, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = hf_tokenizer(str(directory), max_seq_len=128)
    total, count = 0.0, 0
    for index in range(6):
        ids = torch.tensor([tokenizer.encode(sentence(100 + index))])
        logits = model(ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum").detach())
        count += ids.shape[1] - 1
    return total / count


def test_a_corrected_teacher_is_better_and_a_distillation_takes_it(
    correcting: Callable[..., Path], toys: Toys, tmp_path: Path
) -> None:
    config, before = correcting(), snapshot(toys.teacher)
    done = run_tune("run", "kd_recipes.correct_teacher", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert snapshot(toys.teacher) == before
    best = tmp_path / "corrected" / "best"
    step = json.loads((best / "compression.json").read_text())["steps"][-1]
    figures = step["figures"]
    assert step["step"] == "teacher correction"
    assert step["from"] == str(toys.teacher)
    assert step["adapter"]["lora_rank"] == 16
    assert figures["cross_entropy_after"] < figures["cross_entropy_before"] - 0.1
    assert figures["cross_entropy_before"] == pytest.approx(_held_out_loss(toys.teacher), rel=1e-4)
    assert figures["cross_entropy_after"] == pytest.approx(_held_out_loss(best), rel=1e-4)
    said = done.stdout.splitlines()
    assert f"{figures['cross_entropy_before']:.4f} nats a token before" in done.stdout
    (overrides,) = (line.partition(": ")[2].split() for line in said if line.startswith("To distil from it"))
    distill(config, *overrides, f"output_dir={tmp_path / 'run'}")
    found = logged(tmp_path / "run")
    assert found[0]["held_out/teacher_cross_entropy"] == pytest.approx(figures["cross_entropy_after"], rel=1e-4)
    assert {"kd/teacher_cross_entropy", "loss/cross_entropy"} <= found[1].keys()


def test_a_correction_that_makes_it_worse_leaves_it_as_it_was(
    correcting: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = correcting(optimizer={"lr": 1e-2, "maximize": True}, max_steps=2)  # climbs instead of descending
    assert run_recipe("correct_teacher", ["--config", str(config)]) == 0
    assert "never less" in capsys.readouterr().out
    step = json.loads((tmp_path / "corrected" / "best" / "compression.json").read_text())["steps"][-1]
    assert step["after_step"] == 0
    assert step["figures"]["cross_entropy_before"] == step["figures"]["cross_entropy_after"]


def test_goes_on_and_says_the_same(correcting: Callable[..., Path], tmp_path: Path) -> None:
    config = correcting()
    assert run_recipe("correct_teacher", ["--config", str(config)]) == 0
    record = (tmp_path / "corrected" / "best" / "compression.json").read_text()
    assert run_recipe("correct_teacher", ["--config", str(config), "resume_from_checkpoint=True"]) == 0
    assert (tmp_path / "corrected" / "best" / "compression.json").read_text() == record


def test_what_it_trains_is_the_teacher_alone_with_settings_of_its_own(
    correcting: Callable[..., Path], tmp_path: Path
) -> None:
    config = correcting(lora_rank=4, batch_size=3, optimizer={"_component_": "torch.optim.SGD", "lr": 0.5})
    overrides = ["teacher_dtype=fp32", "dtype=bf16", "kd_loss._component_=kd_recipes.losses.ReverseKL", "temperature=2"]
    found = fine_tuning(load_and_validate(str(config), overrides, "correct_teacher"))
    assert found.model._component_ == "kd_recipes.models.lora_llama"
    assert (found.model.lora_rank, found.model.lora_alpha, found.model.num_layers) == (4, 32, 3)
    assert (found.batch_size, found.max_steps, found.dtype) == (3, 6, "fp32")
    assert found.optimizer == {"_component_": "torch.optim.SGD", "lr": 0.5}  # and no setting of another one's
    assert (found.teacher_model, found.teacher, found.kd_loss, found.health) == (None, None, None, None)
    assert (found.kd_ratio, found.temperature) == (0.0, 1.0)
    assert found.metric_logger.log_dir == f"{tmp_path / 'corrected'}/logs"
    whole = fine_tuning(
        load_and_validate(str(correcting(model=OmegaConf.to_container(found.model))), [], "correct_teacher")
    )
    assert whole.model.lora_rank == 4


@pytest.mark.parametrize(
    ("section", "twin"),
    [
        ("kd_recipes.models.llama", "kd_recipes.models.lora_llama"),
        ("kd_recipes.models.decoder", "kd_recipes.models.lora_decoder"),
        ("torchtune.models.qwen2_5.qwen2_5_7b_instruct", "torchtune.models.qwen2_5.lora_qwen2_5_7b_instruct"),
        ("torchtune.models.llama3_2.llama3_2_3b", "torchtune.models.llama3_2.lora_llama3_2_3b"),
        ("torchtune.models.gemma2.lora_gemma2_2b", "torchtune.models.gemma2.lora_gemma2_2b"),
    ],
)
def test_the_twin_of_a_builder(section: str, twin: str) -> None:
    found = lora_section(OmegaConf.create({"_component_": section, "max_seq_len": 5}), {"lora_rank": 2})
    assert found._component_ == twin
    assert (found.lora_rank, found.lora_alpha, found.max_seq_len) == (2, 32, 5)


def test_a_builder_without_a_twin_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"beside which there is a kd_recipes\.models\.lora_from_checkpoint"):
        lora_section(OmegaConf.create({"_component_": "kd_recipes.models.from_checkpoint"}), {})


@pytest.mark.parametrize(
    ("correction", "overrides", "message"),
    [
        ({"lora_rnk": 4}, [], "correction.lora_rnk: got 'lora_rnk', wanted a setting of the adapters"),
        ({"lora_rnk": 4}, [], "Did you mean `lora_rank`?"),
        ({"kd_ratio": 0.5}, [], "correction.kd_ratio: got 'kd_ratio', wanted"),
        ({"output_dir": None}, [], "correction.output_dir: got None, wanted a directory"),
        ({"output_dir": "${output_dir}/."}, [], "wanted a directory for the corrected teacher, apart from"),
        ({}, ["~eval_dataset"], "eval_dataset: got None"),
        ({}, ["~correction"], "correction: got None"),
        ({}, ["recipe=distill"], "recipe: got 'distill', wanted `correct_teacher`"),
    ],
)
def test_what_is_refused(
    correction: dict[str, Any],
    overrides: list[str],
    message: str,
    correcting: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = correcting(**correction)
    assert run_recipe("correct_teacher", ["--config", str(config), *overrides]) == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "corrected").exists()


def test_torchtunes_own_recipe_corrects_a_teacher_too(write_config: WriteConfig, toys: Toys, tmp_path: Path) -> None:
    ours: Any = OmegaConf.load(write_config(tmp_path, recipe=None))
    lora = {**lora_section(ours.teacher_model, {}), "lora_dropout": 0.0}
    checkpointer = {**ours.teacher_checkpointer, "output_dir": str(tmp_path / "corrected")}
    sections = {"model": lora, "checkpointer": checkpointer, "tokenizer": ours.tokenizer, "dataset": ours.dataset}
    run = {"output_dir": str(tmp_path / "corrected"), "device": "cpu", "dtype": "fp32", "epochs": 1, "seed": 0}
    steps = {"max_steps_per_epoch": 6, "gradient_accumulation_steps": 1, "optimizer": {"lr": 1e-2}}
    assert run_tune("cp", "qwen2_5/0.5B_lora_single_device", "correct.yaml", cwd=tmp_path).returncode == 0
    theirs: Any = OmegaConf.load(tmp_path / "correct.yaml")
    kept = {name: value for name, value in theirs.items() if name not in sections}
    merged = OmegaConf.merge(
        kept, sections, run, steps, {"optimizer": {"fused": False}, "lr_scheduler": {"num_warmup_steps": 1}}
    )
    OmegaConf.save(merged, tmp_path / "correct.yaml")
    done = run_tune("run", "lora_finetune_single_device", "--config", str(tmp_path / "correct.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    corrected = tmp_path / "corrected" / "epoch_0"
    assert _held_out_loss(corrected) < _held_out_loss(toys.teacher) - 0.1
    place = f"teacher_checkpointer.checkpoint_dir={corrected}"
    distill(tmp_path / "config.yaml", place, "teacher_checkpointer.checkpoint_files=[model-00001-of-00001.safetensors]")
