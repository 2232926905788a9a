"""From a YAML file and overrides to a checked config: every mistake is reported at once, before anything is loaded.

A recipe declares its keys (:class:`Key`). What stands under ``_component_`` is checked against the signature
of the object it names, so a misspelt argument of an optimizer is found as early as a misspelt key.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.trust import EVERYTHING, trust_problems, trusted_packages

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "path": ((str,), "a path"),
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "scheduled": ((float, int, DictConfig), "a number"),
    "bool": ((bool,), "True or False"),
    "choice": ((str,), "one of the names"),
    "list": ((ListConfig, list), "a list"),
    "mapping": ((DictConfig,), "a mapping of names to values"),
    "component": ((DictConfig,), "a section with _component_"),
    "component_or_name": ((DictConfig, str), "a name, or a section with _component_"),
    "components": ((DictConfig, ListConfig), "a section with _component_, or a list of them"),
    "any": ((object,), "anything"),
}

_TRUST_KEY = "trusted_components"
_SHORTEST_SECRET = 4  # characters; what is shorter would be found in every other word
_SCHEDULE = "{start, end, shape: linear or cosine, num_steps: of the whole run by default}"


@dataclass(frozen=True)
class Key:
    """One top-level key of a recipe's config.

    Args:
        name: the key.
        kind: one of ``str path int float scheduled bool choice list mapping component component_or_name components
            any``.
        required: whether it has to be there.
        default: its value where it is absent.
        wanted: what a valid value is, for messages and ``--help``.
        check: returns whether a value of the right type is valid.
        args: component only: how many positional arguments the recipe itself passes.
        kwargs: component only: names of the keyword arguments that the recipe itself passes.
        function_args: component only: as ``args``, for a function where it, too, has a meaning of its own.
    """

    name: str
    kind: str
    required: bool = False
    default: Any = None
    wanted: str = ""
    check: Callable[[Any], bool] | None = None
    args: int = 0
    kwargs: tuple[str, ...] = ()
    function_args: int | None = None

    @property
    def all_wanted(self) -> str:
        """``wanted``, or what the kind says; and the other form that the value may have."""
        wanted = self.wanted or _KINDS[self.kind][1]
        return f"{wanted}, or {_SCHEDULE}" if self.kind == "scheduled" else wanted


def is_positive(value: float) -> bool:
    """Whether a number is above 0 and finite: the check of most numeric keys."""
    return 0 < value < math.inf


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: inside a wheel, or beside an editable install."""
    here = Path(__file__).parent
    folder = here / "_configs" if (here / "_configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file that ``--config`` means: a path, else a shipped config (``configs/qwen_1b.yaml`` or ``qwen_1b``).

    Raises:
        ConfigError: neither is there; names the closest shipped ones.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    stem = Path(name).stem
    if stem in shipped and Path(name).parent.as_posix() in (".", "configs"):
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped) or list(shipped)
    raise ConfigError(Problem("--config", name, "a YAML file", f"Shipped configs: {', '.join(near)}"))


def load(name: str, overrides: Sequence[str] = (), *, trusts_all: bool = False) -> DictConfig:
    """Read a config and merge ``key=value`` overrides into it, with torchtune's own rules.

    Args:
        name: of the file, as :func:`find_config` takes it.
        overrides: among them ``trusted_components=[package, …]``, which the file cannot say of itself.
        trusts_all: whether the config may name any code.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override cannot be read, or a component is not trusted.
    """
    from kd_recipes import _torchtune

    path = find_config(name)
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(Problem("--config", str(path), "a readable YAML file", one_line(error))) from error
    if not isinstance(content, DictConfig):
        raise ConfigError(Problem("--config", str(path), "a YAML mapping of keys to values"))
    if _TRUST_KEY in content:
        remedy = "A config cannot vouch for itself: say it on the command line"
        raise ConfigError(Problem(_TRUST_KEY, _plain(content[_TRUST_KEY]), "no such key in a file", remedy))
    try:
        cfg = _torchtune.merge_overrides(content, overrides)
        added = [str(package) for package in cfg.pop(_TRUST_KEY, None) or []]
        tree = OmegaConf.to_container(cfg, resolve=not [*_interpolation_problems(cfg)])
    except (ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(Problem("overrides", list(overrides), "key=value or ~key", one_line(error))) from error
    packages = [EVERYTHING] if trusts_all else trusted_packages(added)
    if problems := [*trust_problems(tree, packages, _torchtune.locate)]:
        raise ConfigError(*(_hidden(cfg, problem) for problem in problems))
    return cfg


def _hidden(cfg: DictConfig, problem: Problem) -> Problem:
    got, remedy = (hide_environment(cfg, str(text)) for text in (problem.got, problem.remedy))
    return replace(problem, got=got, remedy=remedy)


def hide_environment(cfg: DictConfig, text: str) -> str:
    """A text for the screen or a log, without what a config takes from environment variables."""
    for name in set(re.findall(r"\$\{oc\.env:\s*([^,}\s]+)", OmegaConf.to_yaml(cfg, resolve=False))):
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            for form in (value, repr(value)[1:-1]):
                text = text.replace(form, f"${{oc.env:{name}}}")
    return text


def without_environment(cfg: DictConfig) -> DictConfig:
    """A copy for a logger that resolves what it is given: what comes from environment variables stays a reference."""

    def escape(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: escape(value) for key, value in node.items()}
        if isinstance(node, list):
            return [escape(value) for value in node]
        return node.replace("${oc.env", "\\${oc.env") if isinstance(node, str) else node

    return DictConfig(escape(OmegaConf.to_container(cfg, resolve=False)))


def with_environment(text: str) -> str:
    """A text of :func:`without_environment`'s copy, with what it takes from environment variables.

    Raises:
        OmegaConfBaseException: a variable is not there; :func:`validate` has said so of the config.
    """
    return str(OmegaConf.create({"text": text}).text)


def load_and_validate(
    name: str, overrides: Sequence[str] = (), recipe: str | None = None, *, trusts_all: bool = False
) -> DictConfig:
    """:func:`load`, then :func:`validate` with the keys of the recipe named, or of the config's own ``recipe``.

    Raises:
        ConfigError: with everything that was found wrong.
    """
    from kd_recipes import entry

    cfg = load(name, overrides, trusts_all=trusts_all)
    return validate(cfg, entry.recipe_module(entry.choose_recipe(recipe, cfg)).KEYS)


def configured(base: DictConfig, values: Mapping[str, Any], *, merges: bool = False) -> DictConfig:
    """A copy of a config with other values at some dotted keys.

    Args:
        base: the config.
        values: by key.
        merges: whether a section among them is merged with the config's, unless it names a component: then, or by
            default, it takes its place.

    Raises:
        ConfigError: a key that leads nowhere, such as an index past the end of a list.
    """
    cfg = base.copy()
    for key, value in values.items():
        is_merged = merges and isinstance(value, Mapping) and "_component_" not in value
        try:
            OmegaConf.update(cfg, key, value, merge=is_merged, force_add=True)
        except (LookupError, ValueError, TypeError, AttributeError, OmegaConfBaseException) as error:
            raise ConfigError(Problem(key, value, "a key of the config", one_line(error))) from error
    return cfg


def validate(cfg: DictConfig, keys: Sequence[Key]) -> DictConfig:
    """Check a config against a recipe's keys and fill in the defaults.

    Returns:
        A new config with every key of ``keys``.

    Raises:
        ConfigError: unknown, missing or ill-typed keys, all of them together.
    """
    known = {key.name: key for key in keys}
    problems = [*_interpolation_problems(cfg)]
    if not problems:
        problems += [_unknown(str(name), known, "key") for name in cfg if name not in known]
        for key in keys:
            problems += _key_problems(cfg, key)
    if problems:
        raise ConfigError(*problems)
    defaults = {key.name: key.default for key in keys}
    return OmegaConf.merge(OmegaConf.create(defaults), cfg)  # type: ignore[return-value]


def _interpolation_problems(cfg: DictConfig) -> Iterator[Problem]:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        why = str(error.msg).partition("\n")[0]
        yield Problem(str(error.full_key or "config"), "an interpolation", "one that resolves", why)


def _unknown(name: str, known: Mapping[str, Any], what: str, prefix: str = "") -> Problem:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(sorted(known))}"
    return Problem(f"{prefix}{name}", name, f"a known {what}", remedy)


def _key_problems(cfg: DictConfig, key: Key) -> Iterator[Problem]:
    value = cfg.get(key.name)
    if value is None:
        if key.required:
            yield Problem(key.name, None, key.wanted or _KINDS[key.kind][1], "It has to be in the config")
        return
    types, wanted = _KINDS[key.kind]
    is_section = isinstance(value, DictConfig)
    is_bool_as_number = isinstance(value, bool) and key.kind in ("int", "float", "scheduled")
    if not isinstance(value, types) or is_bool_as_number or (key.check is not None and not key.check(value)):
        yield Problem(key.name, _plain(value), (key.all_wanted if is_section else key.wanted) or wanted)
    elif key.kind in ("component", "component_or_name", "components") and not isinstance(value, str):
        sections = list(value) if isinstance(value, ListConfig) else [value]
        if not sections:
            yield Problem(key.name, [], "at least one section with _component_")
        for index, section in enumerate(sections):
            path = f"{key.name}[{index}]" if isinstance(value, ListConfig) else key.name
            yield from _component_problems(path, section, key)


def _component_problems(path: str, section: Any, key: Key) -> Iterator[Problem]:
    from kd_recipes import _torchtune

    if not isinstance(section, DictConfig) or "_component_" not in section:
        yield Problem(path, _plain(section), "a section with _component_")
        return
    if section.get("enabled") is False:  # a switched-off profiler is not built
        return
    name = section._component_
    try:
        component = _torchtune.locate(str(name))
        signature = inspect.signature(component)
    except (ValueError, TypeError) as error:
        yield Problem(f"{path}._component_", name, "an importable function or class", str(error).replace("\n", " "))
        return
    given = {str(k): v for k, v in section.items() if k != "_component_"}
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = [k for k in given if k not in parameters]
        yield from (_unknown(k, parameters, f"argument of {name}", f"{path}.") for k in unknown)
        given = {k: v for k, v in given.items() if k in parameters}
    yield from _type_problems(path, given, parameters)
    try:
        num_args = key.args if key.function_args is None or not inspect.isfunction(component) else key.function_args
        signature.bind(*[None] * num_args, **{**given, **dict.fromkeys(key.kwargs)})
    except TypeError as error:
        yield Problem(path, name, f"its arguments: {error}")


def _type_problems(
    path: str, given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> Iterator[Problem]:
    """A text or a truth value where the signature asks for a number: the one mistake that annotations show safely."""
    for name, value in given.items():
        annotation = str(parameters[name].annotation) if name in parameters else ""
        takes_number = any(word in annotation for word in ("int", "float"))
        takes_text = any(word in annotation for word in ("str", "Any", "Callable", "Path", "TypeVar"))
        if isinstance(value, str) and takes_number and not takes_text:
            yield Problem(f"{path}.{name}", value, "a number")
        if isinstance(value, bool) and takes_number and "bool" not in annotation and "Any" not in annotation:
            yield Problem(f"{path}.{name}", value, "a number")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
