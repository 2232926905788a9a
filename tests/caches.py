"""What the tests of cached teachers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_recipes.entry import run_recipe
from kd_recipes.teachers.cache.store import Store
from toy import VOCABULARY

TOP_K: dict[str, Any] = {"_component_": "kd_recipes.teachers.TopK", "k": 8}
ALL = {**TOP_K, "k": VOCABULARY}
DRAWN: dict[str, Any] = {"_component_": "kd_recipes.teachers.RandomSampling", "num_draws": 12}


def fill(config: Path, *overrides: str) -> None:
    """Make the cache that a config names."""
    assert run_recipe("cache_teacher", ["--config", str(config), *overrides]) == 0


def records(cache: Path) -> dict[bytes, bytes]:
    """What a cache has, by key."""
    store = Store(cache)
    return {key: bytes(store.read(entry)) for key in store if (entry := store.find(key))}
