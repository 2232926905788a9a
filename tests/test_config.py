"""Configs: every mistake of a file, found from the file alone."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kd_recipes.config import Key, find_config, load, load_and_validate, shipped_configs, validate
from kd_recipes.errors import ConfigError, Problem, gather

KEYS = (
    Key("name", "str"),
    Key("count", "int", default=3, wanted="a whole number above 0", check=lambda value: value > 0),
    Key("ratio", "float", required=True, wanted="a number"),
    Key("flag", "bool", default=False),
    Key("part", "component", args=1, kwargs=("given",)),
    Key("parts", "components"),
)


def part(first: Any, given: Any, size: int, rate: float = 0.5, label: str | int = "a", on: bool = True) -> None:
    """What the sections below name."""


def loose(size: int, **settings: Any) -> None:
    """A component that takes any argument."""


@pytest.fixture(autouse=True)
def _components(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("toy_components")
    module.part, module.loose, module.number = part, loose, 7
    monkeypatch.setitem(sys.modules, "toy_components", module)


def found(settings: dict[str, Any], keys: Sequence[Key] = KEYS) -> list[str]:
    """The problems of a config."""
    with pytest.raises(ConfigError) as caught:
        validate(OmegaConf.create(settings), keys)
    return [str(problem) for problem in caught.value.problems]


# ------------------------------------------------------------------------------------------------------------- keys
def test_a_valid_config_gets_its_defaults_and_keeps_interpolations() -> None:
    given = OmegaConf.create({"ratio": 1, "name": "${oc.env:HOME}", "part": {"_component_": "toy_components.part"}})
    given.part.size = "${count}"
    given.count = 5
    cfg = validate(given, KEYS)
    assert (cfg.ratio, cfg.count, cfg.flag, cfg.parts) == (1, 5, False, None)
    assert (cfg.part.size, cfg.name) == (5, os.environ["HOME"])
    assert given.keys() == {"ratio", "name", "part", "count"}  # not changed


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "ratio: got None, wanted a number. It has to be in the config"),
        ({"ratio": None}, "ratio: got None, wanted a number. It has to be in the config"),
        ({"ratio": "half"}, "ratio: got 'half', wanted a number"),
        ({"ratio": True}, "ratio: got True, wanted a number"),
        ({"ratio": [1]}, "ratio: got [1], wanted a number"),
        ({"ratio": 1, "count": 1.0}, "count: got 1.0, wanted a whole number above 0"),
        ({"ratio": 1, "count": 0}, "count: got 0, wanted a whole number above 0"),
        ({"ratio": 1, "flag": 1}, "flag: got 1, wanted True or False"),
        ({"ratio": 1, "flag": "yes"}, "flag: got 'yes', wanted True or False"),
        ({"ratio": 1, "name": 1}, "name: got 1, wanted a text"),
        ({"ratio": 1, "rato": 1}, "rato: got 'rato', wanted a known key. Did you mean `ratio`?"),
        ({"ratio": 1, "zzz": 1}, "zzz: got 'zzz', wanted a known key. Known: count, flag, name, part, parts, ratio"),
        ({"ratio": 1, "part": "it"}, "part: got 'it', wanted a section with _component_"),
        ({"ratio": 1, "part": {"size": 1}}, "part: got {'size': 1}, wanted a section with _component_"),
        ({"ratio": 1, "parts": []}, "parts: got [], wanted at least one section with _component_"),
        ({"ratio": 1, "parts": [3]}, "parts[0]: got 3, wanted a section with _component_"),
        ({"ratio": "${ration}"}, "ratio: got 'an interpolation', wanted one that resolves. Interpolation key"),
        ({"ratio": 1, "name": "${oc.env:NOT_SET_X}"}, "name: got 'an interpolation', wanted one that resolves."),
    ],
)
def test_a_wrong_key(settings: dict[str, Any], problem: str) -> None:
    (text,) = found(settings)
    assert text.startswith(problem)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"_component_": "nowhere.part"}, "part._component_: got 'nowhere.part', wanted an importable function"),
        ({"_component_": "toy_components.port"}, "part._component_: got 'toy_components.port', wanted an importable"),
        ({"_component_": "toy_components.number"}, "part._component_: got 'toy_components.number', wanted"),
        ({"_component_": None}, "part._component_: got None, wanted an importable function or class"),
        ({"_component_": "toy_components.part"}, "part: got 'toy_components.part', wanted its arguments: missing a"),
        (
            {"_component_": "toy_components.part", "size": 1, "rat": 1},
            "part.rat: got 'rat', wanted a known argument of toy_components.part. Did you mean `rate`?",
        ),
        ({"_component_": "toy_components.part", "size": "big"}, "part.size: got 'big', wanted a number"),
        ({"_component_": "toy_components.part", "size": True}, "part.size: got True, wanted a number"),
        ({"_component_": "toy_components.part", "size": 1, "rate": "slow"}, "part.rate: got 'slow', wanted a number"),
    ],
)
def test_a_wrong_component(section: dict[str, Any], problem: str) -> None:
    assert found({"ratio": 1, "part": section})[0].startswith(problem)


def test_what_a_component_may_take_is_let_through() -> None:
    section = {"_component_": "toy_components.part", "size": 1, "label": "text", "on": False}
    loose = {"_component_": "toy_components.loose", "size": 1, "whatever": "x"}
    off = {"_component_": "nowhere.profiler", "enabled": False}
    validate(OmegaConf.create({"ratio": 1, "part": section, "parts": [loose, off]}), KEYS)


def test_all_problems_come_together_in_one_error() -> None:
    problems = found({"rato": 1, "count": "x", "part": {"_component_": "toy_components.part", "siz": 1}})
    assert [text.split(":")[0] for text in problems] == ["rato", "count", "ratio", "part.siz", "part"]


def test_gather_runs_every_check() -> None:
    def fail(key: str) -> None:
        raise ConfigError(Problem(key, 1, "2", "Add one"))

    assert gather(lambda: 1, lambda: 2) == [1, 2]
    with pytest.raises(ConfigError, match=r"  - a: got 1, wanted 2. Add one\n  - b: got 1, wanted 2. Add one"):
        gather(lambda: fail("a"), lambda: 1, lambda: fail("b"))


# ------------------------------------------------------------------------------------------------ files and overrides
def test_a_config_is_found_by_path_then_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = shipped_configs()["quickstart"]
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert find_config(name) == shipped
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    assert find_config("quickstart.yaml") == Path("quickstart.yaml")  # the user's own first
    with pytest.raises(ConfigError, match=r"--config: got 'elsewhere/quickstart.yaml', wanted a YAML file"):
        find_config("elsewhere/quickstart.yaml")


@pytest.mark.parametrize("content", [b"a: [", b"a: b: c", b"- 1\n", b"", b"\xff\xfe\x00", b"1: 2\n"])
def test_a_file_that_is_no_mapping_is_one_line_of_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    if not content:  # a config may come from overrides alone
        assert load(str(tmp_path / "bad.yaml"), ["a=1"]) == {"a": 1}
        return
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "bad.yaml"))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("word", ["a", "a=b=c", "--a", "--a=1", "~missing", "~a.missing", "a=["])
def test_a_wrong_override_is_named(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: {_component_: toy_components.loose, size: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "a.yaml"), [word])
    assert str(caught.value).startswith(f"  - overrides: got [{word!r}], wanted key=value or ~key")


@pytest.mark.parametrize("word", ["~b", "b=null", "b=None"])
def test_an_override_takes_a_section_away(word: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: {_component_: toy_components.loose, size: 1}\n")
    assert load(str(tmp_path / "a.yaml"), [word, "a=2"]).get("b") is None
    assert load(str(tmp_path / "a.yaml"), ["b=toy_components.part"]).b == {
        "_component_": "toy_components.part",
        "size": 1,
    }


def test_the_recipe_decides_the_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: compress\ntemperature: 2\n")
    with pytest.raises(ConfigError, match="temperature: got 'temperature', wanted a known key"):
        load_and_validate(str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError, match="recipe: got 'compress', wanted `distill`, as on the command line"):
        load_and_validate(str(tmp_path / "a.yaml"), recipe="distill")
