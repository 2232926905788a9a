"""The `kd-recipes` command as a user runs it, and the wheel that brings it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kd_recipes
from kd_recipes.config import load_and_validate, shipped_configs
from kd_recipes.entry import RECIPES
from toy import Toys, distill, lora_section

REPOSITORY = Path(__file__).parents[1]


def run_cli(*words: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kd_recipes.cli", *words]
    path = environment.pop("PYTHONPATH", str(REPOSITORY))
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def tune_run_commands(config: Path) -> list[list[str]]:
    """The words after `tune run kd_recipes.` of every such command in a config's header."""
    header = re.match(r"(#.*\n)*", config.read_text(encoding="utf-8"))
    assert header is not None
    text = re.sub(r"^# ?", "", header.group(), flags=re.MULTILINE).replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("tune run ")]
    return [shlex.split(re.sub(r"tune run (--\S+ )*kd_recipes[./]", "", command)) for command in commands]


def test_help_has_examples_and_version_is_the_package_s() -> None:
    assert "kd-recipes cp qwen_1b my_config.yaml" in run_cli("--help").stdout
    assert run_cli("--version").stdout == f"kd-recipes {kd_recipes.__version__}\n"


def test_ls_describes_every_config_and_recipe() -> None:
    result = run_cli("ls")
    assert result.returncode == 0, result.stderr
    for name in [*shipped_configs(), *RECIPES]:
        assert re.search(rf"^  {name} +\S.{{10}}", result.stdout, re.MULTILINE), name


def test_only_validate_imports_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "kd_recipes.cli", "ls"]
    imports = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stderr
    assert "omegaconf" in imports
    assert not re.search(r"\| +(torch|torchtune|torchao|numpy)$", imports, re.MULTILINE)


def test_consolidate_writes_the_student_of_a_checkpoint(
    write_config: Callable[..., Path], tmp_path: Path, toys: Toys
) -> None:
    distill(write_config(tmp_path, model=lora_section(toys.student)), "max_steps=2", "save_every_n_steps=1")
    run, name = tmp_path / "run", "model-00001-of-00001.safetensors"
    done = run_cli("consolidate", str(run))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The student: {run / 'students' / 'step_00000002'}\n"
    newest, final = (load_file(run / where / name) for where in ("students/step_00000002", "final"))
    assert newest.keys() == final.keys()
    assert all(torch.equal(newest[key], final[key]) for key in final)
    assert run_cli("consolidate", str(run), "--checkpoint", "step_00000001", "--output", str(tmp_path / "one")).stdout
    first = load_file(tmp_path / "one" / name)
    assert any(not torch.equal(first[key], final[key]) for key in final)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    for words, message in {
        (str(tmp_path),): "wanted the output_dir of a distillation, with its run.yaml",
        (str(run),): "wanted a new or empty directory",
        (str(run), "--checkpoint", "step_7"): "--checkpoint: got '" + str(run / "step_7"),
    }.items():
        refused = run_cli("consolidate", *words)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "ConfigError" not in refused.stderr, "a traceback"  # torchao logs one of its own


def test_cp_copies_and_does_not_overwrite_unless_forced(tmp_path: Path) -> None:
    original = (REPOSITORY / "configs" / "qwen_1b.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "new" / "mine.yaml"
    assert run_cli("cp", "qwen_1b", str(mine)).returncode == 0
    assert mine.read_text(encoding="utf-8") == original

    mine.write_text("changed", encoding="utf-8")
    refused = run_cli("cp", "qwen_1b", str(mine))
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert mine.read_text(encoding="utf-8") == "changed"
    assert run_cli("cp", "configs/qwen_1b.yaml", str(mine), "--force").returncode == 0
    assert mine.read_text(encoding="utf-8") == original


@pytest.mark.parametrize(("destination", "written"), [(".", "qwen_1b.yaml"), ("mine", "mine.yaml")])
def test_cp_completes_the_destination(tmp_path: Path, destination: str, written: str) -> None:
    assert run_cli("cp", "qwen_1b", str(tmp_path / destination)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [written]


def test_cp_suggests_close_names(tmp_path: Path) -> None:
    result = run_cli("cp", "qwen1b", str(tmp_path / "mine.yaml"))
    assert result.returncode == 1
    assert "Did you mean qwen_1b" in result.stderr
    assert not list(tmp_path.iterdir())


def test_validate_accepts_a_right_config() -> None:
    result = run_cli("validate", "configs/qwen_0_5b.yaml", "temperature=2.0")
    assert (result.returncode, result.stdout) == (0, "configs/qwen_0_5b.yaml is valid\n"), result.stderr


def test_validate_lists_all_problems() -> None:
    result = run_cli("validate", "qwen_1b", "temprature=2", "batch_size=none_at_all", "optimizer.lrr=1")
    assert result.returncode == 1
    assert "3 problems" in result.stderr
    for word in ("`temperature`", "batch_size", "`lr`"):
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_validate_of_a_missing_file_is_no_traceback() -> None:
    result = run_cli("validate", "nowhere/mine.yaml")
    assert result.returncode == 1
    assert "nowhere/mine.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_torchao_that_torchtune_cannot_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "torchtune").mkdir()
    (tmp_path / "torchtune" / "__init__.py").write_text("raise ImportError(\"cannot import name 'int4_weight_only'\")")
    metadata = tmp_path / "torchao-0.16.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.16.0\n")
    result = run_cli("validate", "qwen_1b", PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert result.returncode == 1
    assert "pip install 'torchao>=0.15,<0.16'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("config", shipped_configs().values(), ids=lambda path: path.stem)
def test_commands_in_config_headers_are_valid(config: Path) -> None:
    as_it_is = [None, "--config", f"configs/{config.name}"]  # where the header has no `tune run`
    commands = tune_run_commands(config) or [as_it_is]
    for recipe, option, name, *overrides in commands:
        assert (option, Path(name).parent.name) == ("--config", "configs")  # another one, where it has to be run before
        load_and_validate(name, overrides, recipe)
    assert commands[-1][2] == f"configs/{config.name}"


def test_the_wheel_brings_configs_and_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "kd-recipes = kd_recipes.cli:main" in entry_points.read_text(encoding="utf-8")

    assert run_cli("cp", "qwen_1b", "mine.yaml", cwd=tmp_path, PYTHONPATH=str(site)).returncode == 0
    assert (tmp_path / "mine.yaml").read_bytes() == (REPOSITORY / "configs" / "qwen_1b.yaml").read_bytes()
    assert {path.stem for path in (site / "kd_recipes" / "_configs").iterdir()} == set(shipped_configs())
