"""What made a model, and what made an evaluation of it: enough to do both again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kd_recipes.batch import Batch
from kd_recipes.history import CONFIG, History

_PACKAGES = ("kd-recipes", "torch", "torchtune", "torchao", "transformers", "lm-eval")


def runs_of(directories: Mapping[str, Path]) -> dict[str, Any]:
    """What the distillations recorded that made these models; ``best/`` and ``final/`` lie in their run's directory.

    Args:
        directories: of the models, by name.

    Returns:
        As :class:`~kd_recipes.evaluation.results.Evaluation` has it, of those that were distilled.
    """
    found = {}
    for name, directory in directories.items():
        history = History(directory.parent)
        entries = list(history.read())
        if not entries:
            continue
        curves = {
            split: [[entry.step, dict(entry.values)] for entry in entries if entry.split == split]
            for split in ("train", "held_out", "health")
        }
        alerts = [{"step": entry.step, **entry.values} for entry in entries if entry.split == "alert"]
        config = directory.parent / CONFIG
        settings = OmegaConf.to_container(OmegaConf.load(config)) if config.is_file() else {}
        found[name] = {**curves, "alerts": alerts, "config": settings}
    return found


def text_digest(text: Iterable[Batch]) -> str:
    """Of ids and labels, SHA-256."""
    digest = hashlib.sha256()
    for batch in text:
        digest.update(batch.tokens_BS.cpu().numpy().tobytes() + batch.labels_BS.cpu().numpy().tobytes())
    return digest.hexdigest()


def digest_of(described: Any) -> str:
    """A short name for what can be written as JSON: another one where anything in it is another one."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def made_by(config: Mapping[str, Any], seed: int, text: Iterable[Batch]) -> dict[str, Any]:
    """Config, versions, seed, the text's hash, hardware and date.

    Args:
        config: plain, without secrets.
        seed: of what was drawn.
        text: the held-out batches.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "data": {"held-out text, SHA-256 of its ids": text_digest(text)},
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
        "config": dict(config),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not installed
            continue
    return found


def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():  # where platform knows no more than the architecture
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    found: dict[str, Any] = {"system": platform.platform(), "cpu": cpu, "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found
