"""What a pipeline is to run, with everything that can be known to be wrong found before the first step."""

from __future__ import annotations

import glob
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes import _torchtune, entry
from kd_recipes.compression import sections
from kd_recipes.config import Key, configured, load, validate, with_environment, without_environment
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.parts import CHECKPOINTERS, find_device
from kd_recipes.pipelining.references import Surroundings, leaves
from kd_recipes.trust import for_other_processes

CONFIGS = "configs"  # in the pipeline's directory: the config of each step
_OURS = ("recipe", "output_dir", "resume_from_checkpoint", "trusted_components")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_SETTINGS: dict[str, tuple[Any, str]] = {
    "recipe": (str, "the name of a recipe; the config's own by default"),
    "config": (str, "a file, or the name of a shipped config; none where `with` says it all"),
    "with": (dict, "what is to be otherwise in the config, by key"),
    "checkpoints": (dict, f"the directory of a checkpoint, for {' and '.join(CHECKPOINTERS)}"),
    "result": (str, "what other steps take of it, a path in its directory"),
    "enabled": (bool, "False leaves it out"),
    "num_processes": (int, "a whole number above 0"),
}
_READ = ("gguf_file", "checkpoint_dir", "merges_file", "data_files", "tokenizer.path")  # keys of what has to be there
_LOCAL = ("json", "csv", "text", "parquet", "arrow")  # sources of data sets whose data_files are files


@dataclass(frozen=True)
class Step:
    """One recipe with its config.

    Args:
        name: of its directory.
        recipe: its name.
        directory: what it writes.
        base: its config as the file has it.
        settings: what is otherwise, by dotted key.
        checkpoints: directories that sections are taken from, by the model's key.
        within: what it can refer to.
        result: what others take of it, in its directory; None for what its recipe leaves.
        num_processes: that torchrun starts.
    """

    name: str
    recipe: str
    directory: Path
    base: DictConfig
    settings: Mapping[str, Any]
    checkpoints: Mapping[str, str]
    within: Surroundings
    result: str | None = None
    num_processes: int = 1

    @property
    def keys(self) -> Sequence[Key]:
        """Of its recipe."""
        return entry.recipe_module(self.recipe).KEYS  # type: ignore[no-any-return]

    def place(self, cfg: DictConfig) -> Path:
        """What others take of it: of training the best model, where held-out text has told which it is."""
        if self.result is not None:
            return self.directory / self.result
        if self.recipe == "distill":
            return self.directory / ("final" if cfg.eval_dataset is None else "best")
        if self.recipe == "correct_teacher":
            return self.directory / "teacher" / "best"
        return self.directory

    def config(self) -> DictConfig:
        """Its whole config, with defaults; references to the environment alone are not resolved.

        A checkpoint that is not there yet has no sections yet: they are checked as far as ``settings`` name them.

        Raises:
            ConfigError: with every problem found.
        """
        problems: list[Problem] = []
        taken = self.within.resolve(dict(self.checkpoints), problems, f"steps.{self.name}.checkpoints")
        if problems:
            raise ConfigError(*problems)
        try:
            return self._config(taken)
        except ConfigError as error:
            raise ConfigError(*(self._whole(problem) for problem in error.problems)) from error

    def _config(self, taken: Mapping[str, str]) -> DictConfig:
        own = {"recipe": self.recipe, "output_dir": str(self.directory)}
        keys = {key.name: key for key in self.keys}
        if "resume_from_checkpoint" in keys:
            own["resume_from_checkpoint"] = "auto"
        there = {key: found for key, path in taken.items() if (found := _sections(key, path))}
        unknown = [key for key in taken if key not in there]
        from_files = {name: section for found in there.values() for name, section in found.items()}
        from_files |= {key: {} for key in unknown}
        cfg = configured(configured(self.base, {**own, **from_files}), self.settings, merges=True)
        for key in unknown:
            cfg, keys[key] = _stand_in(cfg, keys[key], taken[key])
        validated = validate(cfg, list(keys.values()))
        content: Any = OmegaConf.to_container(without_environment(validated), resolve=True)
        problems: list[Problem] = []
        resolved = self.within.resolve(content, problems)
        if problems:
            raise ConfigError(*(replace(problem, key=problem.key.removeprefix(".")) for problem in problems))
        return DictConfig(resolved)

    def _whole(self, problem: Problem) -> Problem:
        return replace(for_other_processes(problem), key=f"steps.{self.name}.with.{problem.key}")


def _sections(key: str, path: str) -> dict[str, Any]:
    """The sections of a model and of its checkpointer; nothing where there is no checkpoint yet."""
    directory = Path(with_environment(path))
    if not os.path.isfile(directory / "config.json"):
        return {}
    found: Any = OmegaConf.to_container(sections(directory, Path(path)))  # which names it as the config does
    return {key: found["model"], CHECKPOINTERS[key]: {**found["checkpointer"], "output_dir": "${output_dir}"}}


def _stand_in(cfg: DictConfig, key: Key, path: str) -> tuple[DictConfig, Key]:
    """Something to be checked in the place of sections that are not known: what is set in them, if it names a builder.

    The rest of such a builder's arguments will be the checkpoint's.
    """
    checkpointer = {
        "_component_": "kd_recipes.compression.CompressedCheckpointer",
        "checkpoint_dir": path,
        "checkpoint_files": ["model.safetensors"],
    }
    cfg = configured(cfg, {CHECKPOINTERS[key.name]: checkpointer})
    if "_component_" not in cfg[key.name]:
        return configured(
            cfg, {key.name: {"_component_": "kd_recipes.models.from_checkpoint", "checkpoint_dir": path}}
        ), key
    try:
        parameters = inspect.signature(_torchtune.locate(str(cfg[key.name]._component_))).parameters
    except (ValueError, TypeError):  # which validation says
        return cfg, key
    named = (name for name, it in parameters.items() if it.kind in (it.POSITIONAL_OR_KEYWORD, it.KEYWORD_ONLY))
    return cfg, replace(key, kwargs=tuple(named))


@dataclass(frozen=True)
class Plan:
    """A pipeline, checked.

    Args:
        directory: of the pipeline.
        steps: those to run, in order.
        left_out: names of those that are not to.
        given: by name, what is there already; references to the environment are not resolved.
    """

    directory: Path
    steps: Sequence[Step]
    left_out: Sequence[str]
    given: Mapping[str, Path]


def build_plan(cfg: DictConfig) -> Plan:
    """The steps of a pipeline's config, each checked against its recipe's keys; files are not looked for.

    Raises:
        ConfigError: with every problem of every step.
    """
    content: Any = OmegaConf.to_container(without_environment(cfg), resolve=True)
    sections: dict[str, Any] = content["steps"]
    problems = [problem for name, section in sections.items() for problem in _section_problems(name, section)]
    if problems:
        raise ConfigError(*problems)
    left_out = [name for name, section in sections.items() if _is_left_out(section)]
    places: dict[str, Path] = {}
    steps: list[Step] = []
    for name, section in sections.items():
        if isinstance(section, str):
            places[name] = Path(section)
        elif name not in left_out:
            directory = Path(cfg.output_dir) / name
            within = Surroundings({**places, name: directory}, left_out, tuple(sections))
            places[name] = directory
            try:
                step = _build(name, section, directory, within)
                steps.append(step)
                problems += _process_problems(step)
                places[name] = step.place(step.config())
            except ConfigError as error:
                problems += error.problems
    if not steps and not problems:
        problems.append(Problem("steps", list(sections), "at least one step that is not left out"))
    if problems:
        raise ConfigError(*problems)
    given = {name: places[name] for name, section in sections.items() if isinstance(section, str)}
    return Plan(Path(cfg.output_dir), steps, left_out, given)


def _is_left_out(section: Any) -> bool:
    return section is None or (isinstance(section, dict) and section.get("enabled") is False)


def _section_problems(name: str, section: Any) -> Iterator[Problem]:
    where = f"steps.{name}"
    if not _NAME.fullmatch(str(name)) or name == CONFIGS:
        yield Problem(where, name, f"a name of letters, digits, - and _ that is not {CONFIGS}")
    if section is None or isinstance(section, str):
        return
    if not isinstance(section, dict):
        yield Problem(where, section, "a section with recipe and config, or the path of what is there already")
        return
    yield from _setting_problems(where, section)


def _setting_problems(where: str, section: dict[str, Any]) -> Iterator[Problem]:
    for key, value in section.items():
        if key not in _SETTINGS:
            yield Problem(f"{where}.{key}", key, f"one of {', '.join(_SETTINGS)}")
        elif value is not None and (type(value) is not _SETTINGS[key][0] or (key == "num_processes" and value < 1)):
            yield Problem(f"{where}.{key}", value, _SETTINGS[key][1])
        elif key == "with" and value:
            mine = [word for word in value if str(word).partition(".")[0] in _OURS]
            yield from (Problem(f"{where}.with.{word}", word, "another key: the pipeline says this") for word in mine)
        elif key == "checkpoints" and value:
            wanted = f"one of {', '.join(CHECKPOINTERS)}"
            yield from (Problem(f"{where}.{key}.{word}", word, wanted) for word in value if word not in CHECKPOINTERS)


def _process_problems(step: Step) -> Iterator[Problem]:
    if step.num_processes > 1 and step.recipe not in entry.PARALLEL:
        wanted = f"1: `{step.recipe}` runs in a single process"
        yield Problem(f"steps.{step.name}.num_processes", step.num_processes, wanted, "Leave it out")


def _build(name: str, section: Mapping[str, Any], directory: Path, within: Surroundings) -> Step:
    where = f"steps.{name}"
    try:
        base = load(with_environment(section["config"])) if section.get("config") else DictConfig({})
        # a distillation's config may serve another recipe, whatever it says of itself
        recipe = entry.choose_recipe(None, DictConfig({"recipe": section.get("recipe") or base.get("recipe")}))
    except ConfigError as error:
        renamed = ({"--config": "config", "recipe": "recipe"}.get(p.key, f"config: {p.key}") for p in error.problems)
        problems = zip(error.problems, renamed, strict=True)
        raise ConfigError(*(replace(for_other_processes(p), key=f"{where}.{key}") for p, key in problems)) from error
    if recipe == "pipeline":
        raise ConfigError(Problem(f"{where}.recipe", recipe, "another recipe: a pipeline has no pipelines in it"))
    return Step(
        name,
        recipe,
        directory,
        base,
        section.get("with") or {},
        section.get("checkpoints") or {},
        within,
        section.get("result"),
        section.get("num_processes") or 1,
    )


def check_inputs(plan: Plan) -> None:
    """Look for the devices and files that steps name, and that no step before them makes.

    Raises:
        ConfigError: with all that are missing.
    """
    given = {name: Path(with_environment(str(path))) for name, path in plan.given.items()}
    problems = [
        Problem(f"steps.{name}", str(plan.given[name]), "the path of what is there")
        for name, path in given.items()
        if not os.path.exists(path)
    ]
    known = list(given.values())
    for step in plan.steps:
        cfg, where = step.config(), f"steps.{step.name}.with"
        content: Any = OmegaConf.to_container(cfg, resolve=True)
        for key, path in _read_paths(content):
            if not os.path.exists(path) and not any(path.is_relative_to(directory) for directory in known):
                problems.append(Problem(f"{where}.{key}", str(path), "what is there, or what a step before it makes"))
        known.append(step.directory)
        if cfg.get("device") is not None:
            try:
                find_device(f"{where}.device", cfg.device)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(*problems)


def _read_paths(content: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    for key, value in leaves(content):
        name = "." + re.sub(r"\[\d+\]", "", key)
        is_read = name.endswith(tuple(f".{read}" for read in _READ)) or name.startswith(".models.")
        if not is_read or not isinstance(value, str) or "://" in value or glob.has_magic(value):
            continue
        section, is_data, _ = key.rpartition(".data_files")
        if not is_data or OmegaConf.select(DictConfig(content), f"{section}.source") in _LOCAL:
            yield key, Path(value)
