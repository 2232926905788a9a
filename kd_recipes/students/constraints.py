"""All that a student's weights are held to while it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.compression import (
    CompressedCheckpointer,
    Constraint,
    GradualSparsity,
    QuantizationAwareTraining,
    form_of,
    read_checkpoint,
)
from kd_recipes.errors import ConfigError, Problem, gather, within
from kd_recipes.models import round_activations
from kd_recipes.parts import build


class Constraints:
    """Several, as one.

    Args:
        constraints: in the order in which they are applied.
    """

    def __init__(self, constraints: Sequence[Constraint] = ()) -> None:
        self._constraints = constraints

    @classmethod
    def build(cls, key: str, sections: ListConfig | DictConfig | None, cfg: DictConfig) -> Constraints:
        """Those of a config, compared with the student's files.

        Args:
            key: of the sections.
            sections: one or several.
            cfg: the config, of which ``model`` and ``checkpointer`` are looked at.

        Raises:
            ConfigError: one cannot be built, or does not fit the student.
        """
        if sections is None:
            return cls()
        if "lora_rank" in cfg.model:
            remedy = "Name a builder without lora_ in `model`"
            raise ConfigError(Problem(key, "a student with adapters", "one of which all weights are trained", remedy))
        listed = list(sections) if isinstance(sections, ListConfig) else [sections]
        form = form_of(read_checkpoint(Path(cfg.checkpointer.checkpoint_dir)))

        keys = [f"{key}[{index}]" for index in range(len(listed))] if isinstance(sections, ListConfig) else [key]

        def check(index: int, section: Any) -> Constraint:
            constraint = build(keys[index], section)
            if not isinstance(constraint, Constraint):
                wanted = "one of KeepZeros, GradualSparsity and QuantizationAwareTraining in kd_recipes.compression"
                raise ConfigError(Problem("._component_", section._component_, wanted))
            constraint.check(form)
            return constraint

        checks = [
            lambda index=index, section=section: within(keys[index], lambda: check(index, section))
            for index, section in enumerate(listed)
        ]
        constraints = gather(*checks)
        lattices = [index for index, found in enumerate(constraints) if isinstance(found, QuantizationAwareTraining)]
        if len(lattices) > 1:
            raise ConfigError(Problem(key, "QuantizationAwareTraining twice", "one of them", "It has `overrides`"))
        for sparsity in (found for found in constraints if isinstance(found, GradualSparsity)):
            sparse = replace(form, zeros=sparsity.pattern)
            for index in lattices:
                within(keys[index], partial(constraints[index].check, sparse))
        if lattices:
            _require_codes(cfg.checkpointer)
        return cls(constraints)

    def attach(self, model: TransformerDecoder) -> dict[str, str]:
        """See :meth:`Constraint.attach`."""
        schemes: dict[str, str] = {}
        for constraint in self._constraints:
            schemes |= constraint.attach(model)
        round_activations(model, schemes)  # not where the student's files did, if it is on another lattice now
        return schemes

    @contextmanager
    def update(self, parameters: Mapping[str, Tensor], step: int, num_steps: int) -> Iterator[None]:
        """See :meth:`Constraint.update`."""
        with ExitStack() as stack:
            for constraint in self._constraints:
                stack.enter_context(constraint.update(parameters, step, num_steps))
            yield

    def are_reached(self, step: int, num_steps: int) -> bool:
        """See :meth:`Constraint.is_reached`."""
        return all(constraint.is_reached(step, num_steps) for constraint in self._constraints)

    def describe(self) -> list[dict[str, Any]]:
        """Names and settings, as ``compression.json`` has them."""
        return [constraint.describe() for constraint in self._constraints]

    def metrics(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """For the curves, under ``compression/``."""
        found: dict[str, float] = {}
        for constraint in self._constraints:
            found |= {f"compression/{name}": value for name, value in constraint.metrics(parameters).items()}
        return found


def _require_codes(checkpointer: DictConfig) -> None:
    """Refuse a checkpointer that would write weights where codes are meant."""
    component = _torchtune.locate(checkpointer._component_)
    if not (inspect.isclass(component) and issubclass(component, CompressedCheckpointer)):
        remedy = "Name kd_recipes.compression.CompressedCheckpointer; it reads the same directory"
        key = "checkpointer._component_"
        raise ConfigError(Problem(key, checkpointer._component_, "a checkpointer that can write codes", remedy))
