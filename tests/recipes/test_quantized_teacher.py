"""A teacher in fewer bits, from the config to the loss, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Rejected, WriteConfig

from kd_recipes import _torchtune, cli
from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe
from toy import Toys, checkpointer_section, distill, logged, lora_section, prepare, run_tune

INT4 = {
    "_component_": "torchao.quantization.IntxWeightOnlyConfig",
    "weight_dtype": "torch.int4",
    "granularity": {"_component_": "torchao.quantization.PerGroup", "group_size": 16},
}


def test_distils_as_from_the_teacher_itself(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for name in ("none", "int8"):
        quantization = "null" if name == "none" else name
        distill(config, f"output_dir={tmp_path / name}", f"teacher_quantization={quantization}", "kd_ratio=1")
    plain, quantized = (logged(tmp_path / name) for name in ("none", "int8"))
    for step in (1, 2):
        assert quantized[step]["loss/total"] == pytest.approx(plain[step]["loss/total"], rel=0.02)
        assert quantized[step]["loss/total"] != plain[step]["loss/total"]


def test_keeps_the_teacher_as_the_config_says(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    recipe = prepare(write_config(tmp_path, teacher_quantization=INT4, teacher_dtype="bf16"))
    assert recipe._online is not None
    model = recipe._online.model
    assert {type(layer.mlp.w1.weight).__name__ for layer in model.layers} == {"IntxUnpackedToInt8Tensor"}
    assert type(model.tok_embeddings.weight) is torch.nn.Parameter  # and the head, which the loss multiplies by
    assert recipe._sizes()["teacher"] < 1.3 * sum(parameter.numel() for parameter in model.parameters())
    recipe.cleanup()
    wide = {"teacher_checkpointer": checkpointer_section(toys.wide), "output_dir": str(tmp_path / "other")}
    section = lora_section(toys.wide, quantize_base=True, lora_attn_modules=["q_proj"])
    recipe = distill(write_config(tmp_path, teacher_model=section, max_steps=1, **wide))
    assert recipe._online is not None
    assert _torchtune.is_nf4(recipe._online.model.layers[0].mlp.w1.weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher_quantization=int9"], "teacher_quantization: got 'int9', wanted int8, int4, nf4"),
        (["teacher_quantization=8"], "teacher_quantization: got 8, wanted int8, int4, nf4"),
        (["teacher_quantization=int8_g64"], "teacher_quantization: got 'int8_g64', wanted a group size that divides"),
        (["teacher_quantization=nf4"], "teacher_quantization: got 'nf4', wanted a format that works in"),
        (["teacher_cpu_offload=True"], "teacher_cpu_offload: got True, wanted False on cpu"),
        (["teacher_cpu_offload=maybe"], "teacher_cpu_offload: got 'maybe', wanted whether the teacher's blocks wait"),
    ],
)
def test_is_refused_before_anything_is_loaded(rejected: Rejected, overrides: list[str], message: str) -> None:
    assert message in rejected(*overrides)


def test_validate_knows_the_formats(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KD_RECIPES_TRUSTED_COMPONENTS")
    for quantization in ("int4_g32", INT4):
        config = write_config(tmp_path, teacher_quantization=quantization)
        assert cli.main(["validate", str(config)]) == 0, capsys.readouterr().err
    assert cli.main(["validate", str(config := write_config(tmp_path)), "teacher_quantization=int9"]) != 0
    assert f"{config} has 1 problem:\n  - teacher_quantization: got 'int9'" in capsys.readouterr().err


def test_a_cache_is_of_the_quantized_teacher(write_config: WriteConfig, tmp_path: Path, capfd: Any) -> None:
    encoding = {"_component_": "kd_recipes.teachers.TopK", "k": 8}
    teacher = {
        "_component_": "kd_recipes.teachers.CachedTeacher",
        "path": str(tmp_path / "cache"),
        "encoding": encoding,
    }
    config = write_config(tmp_path, recipe=None, teacher=teacher, teacher_quantization="int8_g16", max_steps=1)
    assert run_recipe("cache_teacher", ["--config", str(config), "check=True"]) == 0
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["quantization"] == "int8_g16"
    distill(config)
    for recipe in ("distill", "cache_teacher"):
        words = ["--config", str(config), "teacher_quantization=null", f"output_dir={tmp_path / 'other'}"]
        assert run_recipe(recipe, words) == EXIT_BAD_INPUT
        assert "teacher_quantization: got None, wanted int8_g16, as the cache was made with" in capfd.readouterr().err
    assert run_recipe("cache_teacher", ["--config", str(config), "teacher_quantization=nf4"]) == EXIT_BAD_INPUT


def test_each_process_has_its_own(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, teacher_quantization="int8", batch_size=1)
    command = ("run", "--nproc_per_node", "2", "kd_recipes.distill", "--config", str(config))
    refused = run_tune(*command, cwd=tmp_path)
    assert refused.returncode != 0
    assert "shard_teacher: got True, wanted False with a quantized teacher" in refused.stderr
    done = run_tune(*command, "shard_teacher=False", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {1, 2} <= logged(tmp_path / "run").keys()
