"""torchtune's own knowledge-distillation configs run here as they are, but for paths and sizes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import Family
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

from kd_recipes.config import load
from toy import distill, logged, prepare, run_tune

CONFIGS = [
    "qwen2/1.5_to_0.5B_KD_lora_single_device",
    "qwen2/1.5_to_0.5B_KD_lora_distributed",
    "llama3_2/8B_to_1B_KD_lora_single_device",
    "llama3_2/8B_to_1B_KD_lora_distributed",
]


@pytest.fixture(scope="session")
def recipes() -> Path:
    """Where torchtune's recipes are; the package refuses to be imported."""
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _check_run(run: Path) -> None:
    steps = logged(run)
    assert set(steps) == {1, 2}
    assert all(math.isfinite(step["loss/total"]) and step["optimizer/grad_norm"] > 0 for step in steps.values())
    assert list((run / "final").glob("*.safetensors"))


def test_by_name_through_tune(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["qwen"]
    overrides = family.overrides(tmp_path / "run", family.lora)
    result = run_tune("run", "kd_recipes.distill", "--config", CONFIGS[0], *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _check_run(tmp_path / "run")


@pytest.mark.parametrize("name", CONFIGS)
def test_its_own_loss_classes_train_the_student(
    name: str, recipes: Path, families: dict[str, Family], tmp_path: Path
) -> None:
    family = next(family for prefix, family in families.items() if name.startswith(prefix))
    overrides = family.overrides(tmp_path / "run", family.lora)
    recipe = distill(recipes / "configs" / f"{name}.yaml", *overrides)
    assert type(recipe._objective.loss) is CEWithChunkedOutputLoss
    assert type(recipe._objective.kd_loss) is ForwardKLWithChunkedOutputLoss
    assert recipe.student.is_adapted
    _check_run(tmp_path / "run")


def _torchtune_recipe(recipes: Path) -> Callable[..., Any]:
    file = recipes / "knowledge_distillation_single_device.py"
    spec = importlib.util.spec_from_file_location("knowledge_distillation_single_device", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe: Callable[..., Any] = module.KDRecipeSingleDevice
    return recipe


@pytest.mark.parametrize("kd_ratio", [0.3, 1.0])
def test_a_step_equals_torchtune_s_but_for_its_second_division(
    kd_ratio: float, recipes: Path, families: dict[str, Family], tmp_path: Path
) -> None:
    config = recipes / "configs" / f"{CONFIGS[0]}.yaml"
    family = families["qwen"]
    overrides = [*family.overrides(tmp_path / "theirs", family.lora), f"kd_ratio={kd_ratio}", "shuffle=False"]
    overrides += ["max_steps_per_epoch=1", "batch_size=4", "gradient_accumulation_steps=1"]
    overrides += ["lr_scheduler.num_warmup_steps=0", "~optimizer.weight_decay", "optimizer._component_=torch.optim.SGD"]
    ours = prepare(config, *overrides, f"output_dir={tmp_path / 'ours'}")
    cfg = load(str(config), overrides)
    theirs = _torchtune_recipe(recipes)(cfg)
    theirs.setup(cfg)
    theirs._model.load_state_dict(ours.student.trainable(), strict=False)  # adapters begin at random
    labels = next(iter(theirs._dataloader))["labels"]
    for recipe in (ours, theirs):
        recipe.train()
        recipe.cleanup()
    # their mean is divided by the number of tokens once more, counted before the labels are shifted
    num_tokens = int((labels != CROSS_ENTROPY_IGNORE_IDX).sum())
    trained = {name: p.detach() for name, p in theirs._model.named_parameters() if "lora_b" in name}
    assert trained
    worst = 0.0
    for name, tensor in trained.items():  # all zeros at the start, so what is there is the update
        expected = ours.student.trainable()[name]
        assert expected.abs().max() > 0
        worst = max(worst, ((tensor * num_tokens - expected).norm() / expected.norm()).item())
    print(f"\nkd_ratio {kd_ratio}: largest relative difference from torchtune's gradient {worst:.1e}")
    assert worst < 1e-5
