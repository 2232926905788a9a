"""What the README tells a newcomer to type works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kd_recipes.config import load_and_validate

ROOT = Path(__file__).parent.parent
LINES = re.findall(r"^\$ (.+?)(?:  +#.*)?$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


def test_is_short_and_has_commands() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert LINES
    assert not re.search(r"@[A-Z]+@", (ROOT / "README.md").read_text())


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= targets


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_kd_recipes_commands_run_in_order(tmp_path: Path) -> None:
    commands = [shlex.split(line) for line in LINES if line.startswith("kd-recipes ")]
    assert commands
    for name, *words in commands:
        program = Path(sys.executable).with_name(name)
        result = subprocess.run(
            [program, *words], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("tune run ") and "my.yaml" in line])
def test_tune_commands_have_valid_configs(line: str) -> None:
    words = shlex.split(line)
    overrides = words[words.index("--config") + 2 :]
    load_and_validate("qwen_1b", overrides, "distill")  # what my.yaml is a copy of
