"""Fixtures of the recipes' tests: bad input to refuse, a checkpoint to damage, a disk to fill, a cached teacher."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input import Rejected, WriteConfig, problems, snapshot
from caches import TOP_K

from kd_recipes import _torchtune
from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe
from toy import Toys, text_section


@pytest.fixture
def rejected(
    toys: Toys,
    write_config: WriteConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Rejected:
    """``rejected(*overrides, **settings)`` runs into bad input and returns the problems, one a line.

    Nothing that was there is touched, nothing new is made, and no weights are loaded unless ``loads`` says that the
    mistake shows only then.
    """
    loaded: list[str] = []
    load_checkpoint = _torchtune.load_checkpoint

    def spy(section: Any) -> Any:
        loaded.append(section.checkpoint_dir)
        return load_checkpoint(section)

    monkeypatch.setattr(_torchtune, "load_checkpoint", spy)

    def run(*overrides: str, loads: bool = False, **settings: Any) -> str:
        config = write_config(tmp_path, **settings)
        run_before, checkpoints = snapshot(tmp_path / "run"), (toys.student, toys.teacher)
        before = [snapshot(path) for path in checkpoints]
        loaded.clear()
        assert run_recipe("distill", ["--config", str(config), *overrides]) == EXIT_BAD_INPUT
        assert snapshot(tmp_path / "run") == run_before
        assert [snapshot(path) for path in checkpoints] == before
        assert not list(tmp_path.glob(".run*"))
        assert bool(loaded) == loads
        return problems(capfd.readouterr().err)

    return run


@pytest.fixture
def cached(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Callable[..., Path]:
    """``cached(encoding, **settings)``: a config of a distillation, without a recipe's name, that names a cache."""

    def write(encoding: dict[str, Any] | None = TOP_K, **settings: Any) -> Path:
        teacher = {"_component_": "kd_recipes.teachers.CachedTeacher", "path": str(tmp_path / "cache")}
        if encoding is not None:
            teacher["encoding"] = encoding  # type: ignore[assignment]
        held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
        return write_config(tmp_path, **{"recipe": None, "teacher": teacher, "eval_dataset": held_out, **settings})

    return write


@pytest.fixture
def checkpoint(toys: Toys, tmp_path: Path) -> Path:
    """A copy of the student's checkpoint, to be damaged."""
    return Path(shutil.copytree(toys.student, tmp_path / "copy"))


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], Path]]:
    """``small_disk(kib)`` mounts a file system of that size."""
    mounted: list[str] = []

    def mount(kib: int) -> Path:
        directory = tempfile.mkdtemp(prefix="kd_recipes_disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", directory]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            os.rmdir(directory)
            pytest.skip(f"not allowed to mount a small disk: {done.stderr.strip()}")
        mounted.append(directory)
        return Path(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", directory], check=True)
        os.rmdir(directory)
