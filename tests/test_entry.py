"""Which recipe was asked for, and what `--help` says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kd_recipes.distill import KEYS
from kd_recipes.entry import (
    DEFAULT_RECIPE,
    EXIT_BAD_INPUT,
    RECIPES,
    choose_recipe,
    recipe_module,
    requested_recipe,
    run_recipe,
)
from kd_recipes.errors import ConfigError

WriteConfig = Callable[..., Path]


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("tune run kd_recipes.distill --config a.yaml", "distill"),
        ("tune run kd_recipes/distill --config a.yaml", "distill"),
        ("tune run kd_recipes/distill.py --config a.yaml", "distill"),
        ("tune run kd_recipes.import_gguf --config a.yaml recipe=distill", "import_gguf"),
        ("tune run kd_recipes.distil --config a.yaml", "distil"),
        ("tune run kd_recipes --config a.yaml", None),
        ("python -m kd_recipes --config kd_recipes.yaml output_dir=kd_recipes/distill/1", None),
    ],
)
def test_the_recipe_is_read_from_the_command_line(
    command_line: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", *command_line.split()])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert requested_recipe() == expected


def test_a_worker_of_torchrun_reads_it_from_its_parent_s_command_line(tmp_path: Path) -> None:
    # the parent: a process whose command line names the recipe and which starts `python -m`, as torchrun does
    worker = "from kd_recipes.entry import requested_recipe; print(requested_recipe())"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}], check=True)"
    command = [sys.executable, "-c", parent, "run", "--nproc_per_node", "2", "kd_recipes.compress"]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["compress"]


@pytest.mark.parametrize(
    ("requested", "config", "expected"),
    [
        ("distill", {}, "distill"),
        (None, {"recipe": "compress"}, "compress"),
        ("compress", {"recipe": "compress"}, "compress"),
        (None, {}, DEFAULT_RECIPE),
    ],
)
def test_the_command_line_and_the_config_choose_a_recipe(
    requested: str | None, config: dict[str, str], expected: str
) -> None:
    assert choose_recipe(requested, OmegaConf.create(config)) == expected


@pytest.mark.parametrize(
    ("requested", "config", "message"),
    [
        ("distill", {"recipe": "compress"}, "got 'compress', wanted `distill`"),
        ("distil", {}, "Did you mean `distill`?"),
        ("distil", {"recipe": "distill"}, "got 'distil', wanted one of"),
        (None, {"recipe": "bake"}, f"wanted one of {', '.join(RECIPES)}"),
    ],
)
def test_a_contradiction_or_an_unknown_recipe_is_an_error(
    requested: str | None, config: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        choose_recipe(requested, OmegaConf.create(config))
    assert message in str(raised.value)
    assert [problem.key for problem in raised.value.problems] == ["recipe"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_keys_and_a_main(name: str) -> None:
    module = recipe_module(name)
    assert module.KEYS
    assert callable(module.main)
    assert module.__doc__


@pytest.mark.parametrize("name", ["distill", None])
def test_help_lists_every_key_with_its_default(
    name: str | None, write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe(name, ["--config", str(write_config(tmp_path)), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "tune run kd_recipes.distill --config FILE [key=value …] [--trust-config]\n\nTrain a student against a teacher."
    )
    lines = {line.split()[0]: line for line in text.partition("Keys:\n")[2].splitlines()}
    assert set(lines) == {key.name for key in KEYS}
    assert "required" in lines["optimizer"]
    assert "default 0.5" in lines["kd_ratio"]
    assert "a number in [0, 1]" in lines["kd_ratio"]
    assert not (tmp_path / "run").exists()


def test_help_needs_no_config_and_running_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("distill", ["--help"]) == 0
    assert "temperature" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=str(EXIT_BAD_INPUT)):
        run_recipe("distill", [])
    assert "--config" in capsys.readouterr().err
