"""One way of making a model smaller: from a checkpoint to a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.compression.form import Form
from kd_recipes.compression.stream import Text
from kd_recipes.errors import ConfigError, Problem, within


class Step(ABC):
    """What a section of ``compress:`` describes."""

    @abstractmethod
    def check(self, form: Form) -> Form:
        """What the step leaves of a model of this form.

        Raises:
            ConfigError: it cannot do what it is asked for; keys begin with a dot.
        """

    @abstractmethod
    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """Do it.

        Args:
            source: the checkpoint to make smaller; it stays as it is.
            destination_dir: the directory to make.
            text: what the model is meant for.
        """

    def describe(self) -> dict[str, Any]:
        """Its name and settings, as ``compression.json`` has them."""
        settings = OmegaConf.to_container(OmegaConf.create(vars(self)), resolve=True)
        return {"step": type(self).__name__, **settings}  # type: ignore[dict-item]


def check_steps(steps: Mapping[str, Step], form: Form) -> list[Form]:
    """Compare each step with all that the ones before it may leave.

    Args:
        steps: by the keys of their sections, in order.
        form: of the model that the first one takes.

    Returns:
        All that the last may leave.

    Raises:
        ConfigError: a step cannot do what it is asked for; it names the form, where others could be taken.
    """
    forms = [form]
    for key, step in steps.items():
        forms = within(key, partial(_check_each, step, forms))
    return forms


def _check_each(step: Step, forms: Sequence[Form]) -> list[Form]:
    left: list[Form] = []
    found: list[tuple[Problem, Form]] = []
    for form in forms:
        try:
            left += [outcome for outcome in step.check(form).outcomes if outcome not in left]
        except ConfigError as error:
            found += [(problem, form) for problem in error.problems]
    problems: list[Problem] = []
    for problem, form in found:
        if sum(other == problem for other, _ in found) < len(forms):
            problems.append(replace(problem, wanted=f"{problem.wanted}, with {_told_apart(form, forms)}"))
        elif problem not in problems:
            problems.append(problem)
    if problems:
        raise ConfigError(*problems)
    return left


def _told_apart(form: Form, forms: Sequence[Form]) -> str:
    """By the sizes that are not the same in all."""
    sizes = {"num_layers": "blocks", "intermediate_dim": "neurons", "num_kv_heads": "key-value heads"}
    sizes |= {"embed_dim": "channels"}
    told = [name for name in sizes if len({getattr(other, name) for other in forms}) > 1]
    return " and ".join(f"{getattr(form, name)} {sizes[name]}" for name in told)
