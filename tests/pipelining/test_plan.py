"""A pipeline's plan: paths of the environment, and what is found wrong before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kd_recipes.config import load
from kd_recipes.errors import ConfigError
from kd_recipes.pipelining.plan import Plan, build_plan, check_inputs
from toy import Toys, save_config, toy_config

STUDENT = "${oc.env:TOY_MODELS}/student"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def models(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that ``TOY_MODELS`` names, of a teacher, a student whose weights lie in two files, and a config."""
    models = tmp_path / "models"
    shutil.copytree(toys.teacher, models / "teacher")
    shutil.copytree(toys.student, models / "student", ignore=lambda *_: ["model.safetensors"])
    for name in PARTS:
        (models / "student" / name).touch()
    distillation = toy_config(toys, tmp_path)
    del distillation["output_dir"]
    save_config(distillation, models / "distill.yaml")
    monkeypatch.setenv("TOY_MODELS", str(models))
    return models


def planned(models: Path, **steps: Any) -> Plan:
    """The plan of a distillation, and of other steps before it."""
    distilled = {
        "config": "${oc.env:TOY_MODELS}/distill.yaml",
        "checkpoints": {"model": STUDENT, "teacher_model": "step:teacher"},
        "with": {
            "tokenizer.path": "step:teacher",
            "model._component_": "kd_recipes.models.lora_llama",
            "model.lora_attn_modules": ["q_proj"],
            "model.lora_rank": 2,
            "model.lora_alpha": 4,
        },
    }
    content = {"output_dir": str(models.with_name("out")), "steps": {**steps, "distilled": distilled}}
    OmegaConf.save(OmegaConf.create(content), models / "pipeline.yaml")
    return build_plan(load(str(models / "pipeline.yaml")))


def test_paths_of_the_environment_are_followed_and_written_as_references(models: Path) -> None:
    plan = planned(models, teacher="${oc.env:TOY_MODELS}/teacher")
    check_inputs(plan)
    cfg = plan.steps[0].config()
    assert list(cfg.checkpointer.checkpoint_files) == PARTS
    assert (cfg.model.num_layers, cfg.model.lora_rank) == (2, 2)  # the student's sizes, and settings on top
    assert cfg.teacher_checkpointer.checkpoint_dir == cfg.tokenizer.path == str(models / "teacher")
    written = OmegaConf.to_yaml(cfg, resolve=False)
    assert "checkpoint_dir: ${oc.env:TOY_MODELS}/student" in written
    assert "path: ${oc.env:TOY_MODELS}/teacher" in written
    assert str(models) not in written


def test_what_is_missing_is_named_as_the_config_names_it(models: Path) -> None:
    plan = planned(models, teacher="${oc.env:TOY_MODELS}/none", other="o" * 300)
    with pytest.raises(ConfigError) as error:
        check_inputs(plan)
    assert "steps.teacher: got '${oc.env:TOY_MODELS}/none', wanted the path of what is there" in str(error.value)
    assert f"steps.other: got '{'o' * 300}'" in str(error.value)
    assert str(models / "none") not in str(error.value)


def test_a_pattern_of_data_is_not_looked_for_as_a_file(models: Path) -> None:
    data = {"source": "json", "data_files": str(models / "?.jsonl")}
    section = {"config": str(models / "distill.yaml"), "with": {"dataset": data}}
    check_inputs(planned(models, teacher=str(models / "teacher"), first=section))


def test_several_processes_of_a_recipe_that_runs_in_one_are_refused_beforehand(models: Path) -> None:
    exported = {
        "recipe": "export",
        "num_processes": 2,
        "with": {"checkpoint_dir": "step:teacher", "formats": ["hf_bf16"], "formts": []},
    }
    first = {"config": str(models / "distill.yaml"), "num_processes": 2}
    with pytest.raises(ConfigError) as error:
        planned(models, teacher=str(models / "teacher"), first=first, exported=exported)
    processes, misspelt = error.value.problems
    assert str(processes).endswith(
        "exported.num_processes: got 2, wanted 1: `export` runs in a single process. Leave it out"
    )
    assert "formts" in str(misspelt)
