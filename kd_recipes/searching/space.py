"""What is searched: settings by their dotted keys, each with the values that it may take."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from kd_recipes.errors import ConfigError, Problem, gather, one_line

_FORMS = "{low, high} with log: True or a step if need be, or {choices: [...]}"
_PLAIN = (str, int, float, bool, type(None))  # what Optuna stores as it is


@dataclass(frozen=True)
class Range:
    """A number that is searched.

    Args:
        key: dotted path into the config, such as ``optimizer.lr``.
        distribution: Optuna's.
    """

    key: str
    distribution: FloatDistribution | IntDistribution

    @property
    def edges(self) -> Sequence[Any]:
        """The values that are to be checked: what lies between them is right if they are."""
        return self.distribution.low, self.distribution.high

    @property
    def grid(self) -> Sequence[Any] | None:
        """What is suggested if all is; None where that has no end."""
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        return None if step is None else [low + index * step for index in range(round((high - low) / step) + 1)]

    def suggest(self, trial: Trial) -> Any:
        """What a trial is to have here."""
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        if isinstance(self.distribution, IntDistribution):
            return trial.suggest_int(self.key, int(low), int(high), step=int(step or 1), log=self.distribution.log)
        return trial.suggest_float(self.key, low, high, step=step, log=self.distribution.log)

    def value(self, suggested: Any) -> Any:
        """In the config."""
        return suggested

    def suggestions(self, value: Any) -> dict[str, Any]:
        """What has to be suggested for the config to have a value here; nothing where it is not searched."""
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        is_inside = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        is_hit = is_inside and (step is None or abs(math.remainder(value - low, step)) < 1e-9)
        is_whole = isinstance(self.distribution, IntDistribution)
        return {self.key: int(value) if is_whole else float(value)} if is_hit else {}


@dataclass(frozen=True)
class Choices:
    """A setting, or a whole section, of which one of several is taken.

    Args:
        key: as of :class:`Range`.
        distribution: Optuna's, over the names of the choices; numbers, texts and truth values are their own.
        sections: the others, by name.
    """

    key: str
    distribution: CategoricalDistribution
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def edges(self) -> Sequence[Any]:
        """As of :class:`Range`: all of them."""
        return [self.value(name) for name in self.distribution.choices]

    @property
    def grid(self) -> Sequence[Any]:
        """As of :class:`Range`."""
        return self.distribution.choices

    def suggest(self, trial: Trial) -> Any:
        """As of :class:`Range`: a name."""
        return trial.suggest_categorical(self.key, self.distribution.choices)

    def value(self, suggested: Any) -> Any:
        """As of :class:`Range`."""
        return self.sections.get(suggested, suggested) if isinstance(suggested, str) else suggested

    def suggestions(self, value: Any) -> dict[str, Any]:
        """As of :class:`Range`."""
        return next(({self.key: name} for name in self.distribution.choices if self.value(name) == value), {})


Dimension = Range | Choices


def build_space(search: Mapping[str, Any], base: DictConfig, kinds: Mapping[str, str]) -> list[Dimension]:
    """The dimensions that a ``search:`` section describes.

    Args:
        search: ``{low, high, log, step}`` or ``{choices}`` by dotted key.
        base: the config whose settings they are.
        kinds: of its keys, as :class:`kd_recipes.config.Key` has them.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    if not search:
        raise ConfigError(Problem("search", dict(search), f"at least one key of the config with {_FORMS}"))

    def one(key: str, entry: Any) -> Dimension:
        if not isinstance(entry, Mapping) or not (entry.keys() == {"choices"} or {"low", "high"} <= entry.keys()):
            raise ConfigError(Problem(f"search.{key}", entry, _FORMS))
        if "choices" in entry:
            return _choices(key, entry["choices"])
        return _range(key, entry, own_value(base, key), kinds.get(key))

    return gather(*(partial(one, key, entry) for key, entry in search.items()))


def _choices(key: str, values: Any) -> Choices:
    where = f"search.{key}.choices"
    if not isinstance(values, list) or not values:
        raise ConfigError(Problem(where, values, "a list of at least one value"))
    sections = {_name(value): value for value in values if not isinstance(value, _PLAIN)}
    names = [value if isinstance(value, _PLAIN) else _name(value) for value in values]
    if len(set(names)) < len(names):
        raise ConfigError(Problem(where, names, "values that differ"))
    return Choices(key, CategoricalDistribution(names), sections)


def _name(value: Any) -> str:
    """``SkewKL(alpha=0.1)`` for a section, so that tables and pictures can be read."""
    if not isinstance(value, Mapping) or "_component_" not in value:
        return json.dumps(value)
    settings = ", ".join(f"{name}={setting}" for name, setting in value.items() if name != "_component_")
    short = str(value["_component_"]).rpartition(".")[2]
    return f"{short}({settings})" if settings else short


def _range(key: str, entry: Mapping[str, Any], own: Any, kind: str | None) -> Range:
    where = f"search.{key}"
    if not entry.keys() <= {"low", "high", "log", "step"}:
        raise ConfigError(Problem(where, dict(entry), _FORMS))
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    numbers = [number for number in (low, high, step) if number is not None]
    if None in (low, high) or not all(_is_number(number) for number in numbers) or not isinstance(log, bool):
        raise ConfigError(Problem(where, dict(entry), "numbers for low, high and step, and True or False for log"))
    # `kd_ratio: {low: 0, high: 1}` is not meant to be 0 or 1: what the config has there says so, or the key's kind
    own_numbers = [own] if _is_number(own) else []
    is_whole = kind in (None, "int") and all(isinstance(number, int) for number in (*numbers, *own_numbers))
    try:
        with warnings.catch_warnings():  # of a step by which high is not reached
            warnings.simplefilter("error")
            if is_whole:
                return Range(key, IntDistribution(low, high, log=log, step=1 if step is None else step))
            return Range(key, FloatDistribution(low, high, log=log, step=step))
    except (ValueError, UserWarning) as error:
        raise ConfigError(Problem(where, dict(entry), "a range that can be searched", one_line(error))) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def own_value(base: DictConfig, key: str) -> Any:
    """What a config has at a dotted key; None where it has nothing."""
    value = OmegaConf.select(base, key, default=None)
    return OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
