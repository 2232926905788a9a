"""Several teachers as one: their distributions mixed, by fixed weights, by data set, or by who knows the text best."""

# B sequences, S positions, T = B * S, M teachers, W rows of weights: one, or one for each data set

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes.batch import Batch
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.signals import MixtureSignal
from kd_recipes.teachers.limits import own_divergence_problems
from kd_recipes.teachers.online import OnlineTeacher
from kd_recipes.teachers.teacher import Surroundings, TeacherSource

_REQUIRED, _OPTIONAL = ("model", "checkpointer"), ("dtype", "device", "quantization", "cpu_offload")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # it becomes part of the names of metrics
_DATA = ("dataset", "eval_dataset")
_MOST = 1e100  # of a weight: sums of them are numbers, too


class Mixture(TeacherSource):
    """A weighted mixture of what several models say: ``p = sum_i w_i p_i``, each softened by itself.

    Args:
        teachers: name -> section of ``model``, ``checkpointer`` and, where they are not to be those of the config,
            ``dtype``, ``device``, ``quantization`` and ``cpu_offload``.
        weights: name -> number from 0, brought to a sum of 1; or a list of such mappings, one for each data set of the
            lists ``dataset`` and ``eval_dataset``, in their order. All the same if None.
        by_likelihood: multiply each weight by what its teacher gives the label, at temperature 1, position by position.

    Raises:
        ConfigError: with everything that is wrong with them.
    """

    def __init__(self, teachers: Any, weights: Any = None, by_likelihood: bool = False) -> None:
        members = teachers if isinstance(teachers, Mapping | DictConfig) else {}
        named = {str(name): section for name, section in members.items()}
        self.by_likelihood = by_likelihood
        self._is_by_source = isinstance(weights, Sequence | ListConfig) and not isinstance(weights, str)
        rows = list(weights) if self._is_by_source else [dict.fromkeys(named, 1) if weights is None else weights]
        problems = [*_member_problems(named)]
        for index, row in enumerate(rows):
            problems += _weight_problems(f".weights[{index}]" if self._is_by_source else ".weights", row, named)
        if not named or not rows:
            wanted = "names, each with a section of model and checkpointer"
            problems = [Problem(".teachers", teachers, wanted)] if not named else [Problem(".weights", [], "some")]
        if problems:
            raise ConfigError(*problems)
        self._sections: dict[str, DictConfig] = {name: OmegaConf.create(dict(s)) for name, s in named.items()}
        weights_WM = torch.tensor([[float(row[name]) for name in named] for row in rows], dtype=torch.float64)
        self._weights_WM = (weights_WM / weights_WM.sum(-1, keepdim=True)).float()

    def models(self) -> dict[str, DictConfig]:
        """Those of all teachers."""
        return {f".teachers.{name}": section for name, section in self._sections.items()}

    def problems(self, cfg: DictConfig) -> Iterator[Problem]:
        """What of the config it does not suit."""
        yield from own_divergence_problems(cfg, "torchtune's need the logits of one teacher")
        for key in _DATA:
            if not self._is_by_source or cfg[key] is None:
                continue
            num_parts = len(cfg[key]) if isinstance(cfg[key], ListConfig) else 1
            if num_parts != len(self._weights_WM):
                wanted = f"{num_parts}, one for each data set of {key}, which has to be a list of them"
                remedy = "The data sets of dataset and eval_dataset are told apart by their place"
                yield Problem(".weights", f"a list of {len(self._weights_WM)}", wanted, remedy)

    def open(self, around: Surroundings) -> MixedTeachers:
        """Load all of them."""
        loaded = {name: around.load(f"teacher.teachers.{name}", section) for name, section in self._sections.items()}
        return MixedTeachers(loaded, self._weights_WM.to(around.device), self.by_likelihood)


def _member_problems(named: Mapping[str, Any]) -> Iterator[Problem]:
    for name, section in named.items():
        key = f".teachers.{name}"
        if not _NAME.fullmatch(name):
            yield Problem(key, name, "a name of letters, digits, _, . and -")
        if isinstance(section, Mapping | DictConfig) and "_component_" in section:
            remedy = "What a cache has kept of a distribution cannot be mixed: its other ids have no probabilities"
            yield Problem(f"{key}._component_", section["_component_"], "a section of model and checkpointer", remedy)
            continue
        yield from _section_problems(key, section)


def _section_problems(key: str, section: Any) -> Iterator[Problem]:
    if not isinstance(section, Mapping | DictConfig):
        yield Problem(key, section, "a section of model and checkpointer")
        return
    for part in _REQUIRED:
        found = section.get(part)
        if not isinstance(found, Mapping | DictConfig) or "_component_" not in found:
            yield Problem(f"{key}.{part}", found, "a section with _component_")
    known = (*_REQUIRED, *_OPTIONAL)
    for name in map(str, section):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield Problem(
                f"{key}.{name}", name, f"one of {', '.join(known)}", f"Did you mean `{near[0]}`?" if near else ""
            )


def _weight_problems(key: str, row: Any, named: Iterable[str]) -> Iterator[Problem]:
    names = list(named)
    if not isinstance(row, Mapping | DictConfig) or {str(name) for name in row} != set(names):
        got = sorted(map(str, row)) if isinstance(row, Mapping | DictConfig) else row
        yield Problem(key, got, f"a number for each of {', '.join(names)}, or a list of such mappings")
        return
    wrong = {name: row[name] for name in names if not _is_share(row[name])}
    yield from (Problem(f"{key}.{name}", value, f"a number from 0 to {_MOST:g}") for name, value in wrong.items())
    if not wrong and not sum(row[name] for name in names):
        yield Problem(key, dict.fromkeys(names, 0), "a number above 0 among them")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST


class MixedTeachers:
    """Teachers that run beside the student.

    Args:
        teachers: by name.
        weights_WM: of each; a row for all text, or one for each data set.
        by_likelihood: as in :class:`~kd_recipes.signals.MixtureSignal`.
    """

    def __init__(self, teachers: Mapping[str, OnlineTeacher], weights_WM: Tensor, by_likelihood: bool) -> None:
        self._teachers, self._by_likelihood = teachers, by_likelihood
        self._log_weights_WM = weights_WM.log()
        self._heaviest = list(teachers)[int(weights_WM.sum(0).argmax())]

    @property
    def online(self) -> OnlineTeacher:
        """The heaviest one, the first of several: texts are written by one model."""
        return self._teachers[self._heaviest]

    @property
    def models(self) -> Sequence[TransformerDecoder]:
        """All of them."""
        return [teacher.model for teacher in self._teachers.values()]

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """As they are: they compute when they are asked."""
        return iter(batches)

    def signal(self, batch: Batch) -> MixtureSignal:
        """Their distributions and weights at each position.

        Raises:
            ValueError: there are weights for data sets, and the batch does not say which of them it is of.
        """
        num_sequences, length = batch.tokens_BS.shape
        if len(self._log_weights_WM) == 1:
            log_weights_TM = self._log_weights_WM.expand(num_sequences * length, -1)
        elif batch.sources_B is None:
            raise ValueError("weights of teachers by data set need batches that say which one they are of")
        else:
            log_weights_TM = self._log_weights_WM[batch.sources_B].repeat_interleave(length, 0)
        logits = {name: teacher.signal(batch).logits for name, teacher in self._teachers.items()}
        return MixtureSignal(logits, log_weights_TM, self._by_likelihood)
