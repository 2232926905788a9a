"""Which code a config may name. A config can come from anybody, and a ``_component_`` is a function that is called.

A name is looked at before it is imported, and what it leads to after: ``torchtune.training.os.system`` begins well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kd_recipes.errors import Problem

# Not all of torch: torch.hub.load and others like it fetch code, and run it.
TRUSTED = (
    *("kd_recipes.compression", "kd_recipes.losses", "kd_recipes.models", "kd_recipes.tokenizers"),
    "kd_recipes.monitoring",
    "kd_recipes.teachers",
    *("torch.nn", "torch.optim", "torchao.float8", "torchao.optim", "torchao.quantization", "torchao.sparsity"),
    *("torchtune.data", "torchtune.datasets", "torchtune.models", "torchtune.modules", "torchtune.training"),
)
# What torchtune.training exports is made in these; others of its modules load pickles if they are told to.
_TRAINING = tuple(
    f"torchtune.training.{name}"
    for name in ("_profiler", "checkpointing._checkpointer", "lr_schedulers", "metric_logging", "quantization")
)
VARIABLE = "KD_RECIPES_TRUSTED_COMPONENTS"
EVERYTHING = "*"


def trusted_packages(added: Sequence[str]) -> frozenset[str]:
    """Dotted names of the packages whose components a config may name.

    Args:
        added: by the user, not by the config; beside what the environment variable lists, with commas.
    """
    return frozenset((*TRUSTED, *added, *filter(None, os.environ.get(VARIABLE, "").split(","))))


def trust_problems(
    config: Any, packages: Collection[str], locate: Callable[[str], Callable[..., Any]]
) -> Iterator[Problem]:
    """What a config names that it may not.

    Args:
        config: nested mappings and lists.
        packages: that are trusted.
        locate: from a name to the object; only called with names of trusted packages.
    """
    if EVERYTHING in packages:
        return
    for path, name in _components(config):
        wanted = f"a component of {', '.join(TRUSTED)}"
        package = name.partition(".")[0] or name
        remedy = (
            f"If you trust it, add trusted_components=[{package}] on the command line; "
            "--trust-config trusts all that the config names"
        )
        if not _is_within(name, packages):
            yield Problem(path, name, wanted, remedy)
            continue
        try:
            found: Any = locate(name)
            while isinstance(found, partial):  # as torchtune makes some of its data sets
                found = found.func
            module = getattr(found, "__module__", None) or ""
        except ValueError:  # validation says so, with the section
            continue
        made_in = [*packages, *_TRAINING] if "torchtune.training" in packages else packages
        if not _is_within(module, [package for package in made_in if package != "torchtune.training"]):
            yield Problem(path, f"{name}, which is of {module or 'no module'}", wanted, remedy)


def for_other_processes(problem: Problem) -> Problem:
    """The same, where a recipe starts others, which have to trust what it trusts: they see its environment."""
    if "trusted_components" not in problem.remedy:
        return problem
    return replace(problem, remedy=f"If you trust it, put the package into the environment's {VARIABLE}")


def _is_within(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _components(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_component_":
                yield here, str(value)
            else:
                yield from _components(value, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _components(value, f"{path}[{index}]")
