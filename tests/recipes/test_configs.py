"""Each shipped pair takes two real steps: its own config, but for paths, sizes and what a CPU needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import Family

from kd_recipes.config import find_config
from toy import distill, tensorboard_scalars

# torchao's 8-bit optimizer compiles its update, for which a machine needs a C++ compiler and half a minute
ADAMW = ["optimizer._component_=torch.optim.AdamW"]
LORA = ["model.lora_attn_modules=[q_proj,v_proj,output_proj]", "model.apply_lora_to_mlp=True", "model.lora_rank=32"]


@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("name", ["qwen_1b", "qwen_0_5b", "llama3_2_1b"])
def test_takes_two_steps(name: str, with_adapters: bool, families: dict[str, Family], tmp_path: Path) -> None:
    family = next(family for prefix, family in families.items() if name.startswith(prefix))
    models = [*family.lora, *LORA, "model.lora_alpha=64"] if with_adapters else family.full
    overrides = family.overrides(tmp_path / "run", models)
    held_out = [word.replace("dataset.", "eval_dataset.", 1) for word in overrides if word.startswith("dataset.")]
    files = ",".join(path.name for path in sorted(family.teacher.glob("*.safetensors")))
    overrides += [*held_out, *ADAMW, f"teacher_checkpointer.checkpoint_files=[{files}]", "log_every_n_steps=1"]
    recipe = distill(find_config(name), *overrides)
    assert recipe.step == 2
    assert recipe.student.is_adapted == with_adapters
    assert list((tmp_path / "run" / "best").glob("*.safetensors"))
    scalars = tensorboard_scalars(tmp_path / "run")
    assert list(scalars["held_out/kl"]) == [0, 2]
    assert list(scalars["loss/total"]) == [1, 2]
