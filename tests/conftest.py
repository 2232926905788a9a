"""Fixtures of toy size. A test that needs a model or data makes neither itself: see toy.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models are slower on more threads
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
os.environ["KD_RECIPES_TRUSTED_COMPONENTS"] = (
    "*"  # the toys are in no package; test_attacks.py and test_sweep.py are without it
)

from families import Family, save_families

from toy import Toys, save_config, save_toys, toy_config


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Toy checkpoints and data on disk; read them, never write into them."""
    return save_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def write_config(toys: Toys) -> Callable[..., Path]:
    """``write_config(tmp_path, **overrides)`` writes the toy config of two steps and returns its path.

    The run goes to ``tmp_path / "run"``; dots in a key lead into sections: ``**{"model.num_layers": 1}``.
    """

    def write(tmp_path: Path, **overrides: Any) -> Path:
        return save_config(toy_config(toys, tmp_path), tmp_path / "config.yaml", **overrides)

    return write


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Toy pairs of the families of the shipped configs, ``qwen`` and ``llama3_2``."""
    return save_families(tmp_path_factory.mktemp("families"))
