"""What a search is to try, with everything that can be known to be wrong found before the first trial."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes import entry
from kd_recipes.config import configured, load, load_and_validate
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.searching.records import Metric
from kd_recipes.searching.space import Dimension, build_space, own_value
from kd_recipes.trust import for_other_processes

_FILE = "plan.json"
_OURS = ("recipe", "output_dir", "resume_from_checkpoint", "best_metric")  # which each trial is given
_BEST_METRIC = {"cross_entropy": "perplexity"}  # distill's name for what orders students in the same way
_TRUSTED = "trusted_components"


@dataclass(frozen=True)
class Plan:
    """A search, checked.

    Args:
        base: the config of a distillation, with the overrides of all trials.
        space: what is searched.
        metric: what trials are compared by.
    """

    base: DictConfig
    space: Sequence[Dimension]
    metric: Metric

    @property
    def own(self) -> dict[str, Any]:
        """What the config itself has where it is searched."""
        return {dimension.key: own_value(self.base, dimension.key) for dimension in self.space}

    def trial_config(self, values: Mapping[str, Any], directory: Path) -> DictConfig:
        """A trial's whole config.

        Args:
            values: by dotted key.
            directory: of the trial.
        """
        name = self.metric.name
        fixed = {
            "recipe": "distill",
            "output_dir": str(directory),
            "resume_from_checkpoint": "auto",
            "best_metric": _BEST_METRIC.get(name, name),
        }
        return configured(self.base, {**values, **fixed})

    def best_config(self, values: Mapping[str, Any], directory: Path) -> DictConfig:
        """The base config with a trial's values, for a run of its own."""
        return configured(self.base, {**values, "recipe": "distill", "output_dir": str(directory)})

    def edges(self) -> Iterator[dict[str, Any]]:
        """The config's own values, then each dimension's outermost ones, or its choices, the others as they are."""
        yield {}
        for dimension in self.space:
            yield from ({dimension.key: value} for value in dimension.edges)

    def record(self, directory: Path) -> None:
        """Write into a search's directory what it searches, or make sure that it is what was searched there before.

        Raises:
            ConfigError: the directory holds another search, or trials of none.
        """
        file = directory / _FILE
        plan = json.loads(json.dumps({"base": OmegaConf.to_container(self.base), "space": [*map(str, self.space)]}))
        plan["metric"] = self.metric.name
        remedy = "Choose another output_dir, or delete it"
        if file.is_file():
            if changed := [key for key, value in json.loads(file.read_text("utf-8")).items() if plan[key] != value]:
                got = f"{directory}, which holds a search with another {' and another '.join(changed)}"
                raise ConfigError(Problem("output_dir", got, "a directory that holds no other search", remedy))
        elif (directory / "trials").exists():
            raise ConfigError(Problem("output_dir", str(directory), "a directory without trials", remedy))
        directory.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")


def build_plan(
    config: str,
    overrides: Mapping[str, Any] | Sequence[str],
    search: Mapping[str, Any],
    metric: str,
    *,
    directory: Path,
    is_grid: bool,
    check: Callable[[DictConfig], None],
) -> Plan:
    """Find the config, what is searched in it, and whatever is wrong with either.

    Args:
        config: a file, or the name of a shipped config.
        overrides: values by dotted key, or words as on the command line, for all trials.
        search: as :func:`kd_recipes.searching.space.build_space` takes it.
        metric: one of ``METRICS``.
        directory: of the search; nothing is written there.
        is_grid: whether all combinations are to be tried.
        check: of a distillation's validated config, against the files that it names.

    Raises:
        ConfigError: with every problem found.
    """
    if problems := [*_key_problems(_override_keys(overrides), search)]:
        raise ConfigError(*problems)
    base = _load_base(config, overrides)
    kinds = {key.name: key.kind for key in entry.recipe_module("distill").KEYS}
    space = build_space(search, base, kinds)
    plan = Plan(base, space, Metric(metric))
    validated = _check_edges(plan, directory / "trials" / "check", check)
    problems = [*_metric_problems(metric, validated, search)]
    if is_grid:
        endless = [dimension.key for dimension in space if dimension.grid is None]
        problems += [
            Problem(f"search.{key}", "a range without step", "a step, or choices, for a grid") for key in endless
        ]
    if problems:
        raise ConfigError(*problems)
    kd_ratio = validated.kd_ratio
    ratio = kd_ratio.end if isinstance(kd_ratio, DictConfig) else kd_ratio
    return replace(plan, metric=Metric(metric, float(ratio)))


def _override_keys(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    if isinstance(overrides, Mapping):
        return [str(key) for key in overrides]
    return [word.lstrip("~+").partition("=")[0] for word in overrides]


def _key_problems(overrides: Sequence[str], search: Mapping[str, Any]) -> Iterator[Problem]:
    for section, keys in (("overrides", overrides), ("search", search)):
        for key in keys:
            if key in _OURS:
                yield Problem(f"{section}.{key}", key, "another key: the search gives each trial its own")
            if key.partition(".")[0] == _TRUSTED:
                yield Problem(f"{section}.{key}", key, "no such key", "A config cannot vouch for itself")
    for key in search:
        for other in overrides:
            if other == key or other.startswith(f"{key}."):
                yield Problem(f"search.{key}", f"overrides.{other} as well", "a key in one of the two")
        for outer in search:
            if key.startswith(f"{outer}."):
                yield Problem(f"search.{key}", f"search.{outer} as well", "a section, or settings in it")


def _load_base(config: str, overrides: Mapping[str, Any] | Sequence[str]) -> DictConfig:
    try:
        if isinstance(overrides, Mapping):
            return configured(load(config), overrides)
        return load(config, overrides)
    except ConfigError as error:
        raise ConfigError(*(_in_a_sweep(problem) for problem in error.problems)) from error


def _in_a_sweep(problem: Problem) -> Problem:
    """What is said of a config on the command line, in the terms of a search that names it."""
    problem = for_other_processes(problem)
    return replace(problem, key="config") if problem.key == "--config" else problem


def _check_edges(plan: Plan, directory: Path, check: Callable[[DictConfig], None]) -> DictConfig:
    """Validate what trials in a directory may be; returns the config's own, with defaults.

    Raises:
        ConfigError: what is wrong with the config itself, else what is wrong with the values searched.
    """
    validated: list[DictConfig] = []
    problems: list[Problem] = []
    for values in plan.edges():
        try:
            validated.append(_validate(plan.trial_config(values, directory), check))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            if not values:
                break
    if problems:
        raise ConfigError(*map(_in_a_sweep, problems))
    return validated[0]


def _validate(cfg: DictConfig, check: Callable[[DictConfig], None]) -> DictConfig:
    """Read a trial's config from a file, as the trial will."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.yaml"
        OmegaConf.save(cfg, file)
        validated = load_and_validate(str(file), recipe="distill")
    check(validated)
    return validated


def _metric_problems(metric: str, cfg: DictConfig, search: Mapping[str, Any]) -> Iterator[Problem]:
    if cfg.eval_dataset is None:
        yield Problem("eval_dataset", None, "held-out data, by which trials are compared", "Add it to the config")
    if Metric(metric).needs_teacher and cfg.teacher_model is None:
        yield Problem("metric", metric, "perplexity or cross_entropy: the config has no teacher_model")
    if metric == "objective" and any(key.partition(".")[0] == "kd_ratio" for key in search):
        wanted = "perplexity or kl: trials that differ in kd_ratio have objectives that cannot be compared"
        yield Problem("metric", metric, wanted)
