"""The pages of docs/: what they tell a reader to type is valid, links lead somewhere, the site shows all of them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, ROOT, SITE, anchors, blocks, commands, hooks, links, tune_run

from kd_recipes import cli
from kd_recipes.config import find_config, load_and_validate, shipped_configs
from kd_recipes.entry import RECIPES, recipe_module

PAGES = sorted(DOCS.glob("*.md"))
IDS = [page.stem for page in PAGES]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def site() -> dict[str, str]:
    """Every page of the site, by its path under docs/, as mkdocs gets it."""
    ours = hooks()
    files = {page.name: page.read_text(encoding="utf-8") for page in PAGES} | ours.generated()
    return {path: ours.to_pages(ours.with_readme(markdown), path) for path, markdown in files.items()}


def flat(nav: Any) -> list[str]:
    """The pages of a nav."""
    if isinstance(nav, str):
        return [nav]
    return [*chain.from_iterable(map(flat, nav.values() if isinstance(nav, dict) else nav))]


# -------------------------------------------------------------------------------------------------------- commands
def check(words: list[str], copies: dict[str, str]) -> None:
    """That a command is valid; ``copies`` are the files that the page has had its reader make, and of what."""
    if run := tune_run(words):
        overrides = [word for word in run.overrides if not word.startswith("--")]
        load_and_validate(copies.get(run.config, run.config), overrides, run.recipe, trusts_all=True)
    elif words[:2] == ["tune", "cp"]:
        copies[words[3]] = str(torchtune_config(words[2]))
    elif words[0] == "kd-recipes":
        options = cli._parser().parse_args(words[1:])
        if options.command == "cp":
            copies[str(options.destination)] = str(shipped_configs()[options.name])
        elif options.command == "validate":
            load_and_validate(copies.get(options.file, options.file), options.overrides, options.recipe)
    elif words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[0] == "python":
        assert importlib.util.find_spec(words[2]) if words[1] == "-m" else (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("cat", "export", "open", "pip", "tensorboard", "tune")


def torchtune_config(name: str) -> Path:
    """The file of a config that torchtune ships; its recipes cannot be imported."""
    spec = importlib.util.find_spec("recipes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "configs" / f"{name}.yaml"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_valid(page: Path) -> None:
    copies = {"my.yaml": "qwen_1b"}  # which the README has a reader copy
    for words in commands(page.read_text(encoding="utf-8")):
        run = tune_run(words)
        if run and "/" in run.config and not run.config.startswith("configs/"):  # torchtune's name for its own
            copies[run.config] = str(torchtune_config(run.config))
        check(words, copies)


def test_a_wrong_command_is_noticed() -> None:
    for line in ("tune run kd_recipes.distill --config configs/quickstart.yaml temprature=2", "kd-recipes cop x y"):
        with pytest.raises((ValueError, SystemExit)):
            check(line.split(), {})
    assert commands("a\n\n    tune run kd_recipes.x --config \\\n        y  # z\n") == [
        ["tune", "run", "kd_recipes.x", "--config", "y"]
    ]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_shown_output_is_the_real_one(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks(page.read_text(encoding="utf-8"), "text"):
        line, _, shown = text.partition("\n")
        if not line.startswith("$ kd-recipes validate my.yaml"):
            assert not line.startswith("$ ")
            continue
        shutil.copyfile(find_config("quickstart"), "my.yaml")
        assert cli.main(line.split()[2:]) == 1
        assert capsys.readouterr().err == shown


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])(?:tests|kd_recipes|configs)/[\w/]+\.(?:py|yaml)\b", text))
    assert [name for name in named if not (ROOT / name).is_file()] == []


# ------------------------------------------------------------------------------------------------------------ links
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere_where_the_file_lies(page: Path) -> None:
    for path, anchor in links(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_links_lead_somewhere_on_the_site(site: dict[str, str]) -> None:
    for page, markdown in site.items():
        for path, anchor in links(markdown):
            target = (Path("/") / page).parent.joinpath(path).resolve() if path else Path("/") / page
            name = target.relative_to("/").as_posix()
            assert name in site, f"{page}: {path}"
            assert not anchor or anchor in anchors(site[name]), f"{page}: {path}#{anchor}"


def test_the_nav_lists_every_page_once(site: dict[str, str]) -> None:
    nav = yaml.safe_load(SITE.read_text(encoding="utf-8"))["nav"]
    assert sorted(flat([*nav, *hooks().nav()])) == sorted(site)


# ------------------------------------------------------------------------------------------------------ from the code
def test_keys_and_configs_are_the_code_s(site: dict[str, str]) -> None:
    for recipe in RECIPES:
        rows = re.findall(r"^\| `(\w+)` \|", site[f"reference/{recipe}_keys.md"], flags=re.MULTILINE)
        assert rows == [key.name for key in recipe_module(recipe).KEYS]
    for name, path in shipped_configs().items():
        assert path.read_text(encoding="utf-8").rstrip() in site[f"reference/configs/{name}.md"]


def test_the_readme_is_not_copied_but_shown(site: dict[str, str]) -> None:
    assert "<!-- README" in (DOCS / "index.md").read_text(encoding="utf-8")
    assert "<!-- README" not in site["index.md"]
    assert "top-1 agreement" in site["index.md"]
    with pytest.raises(ValueError, match="has no heading '## Nothing'"):
        hooks().with_readme("<!-- README: Nothing -->")


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the docs extra")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE), "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "site" / "reference" / "api" / "losses.html").read_text(encoding="utf-8")
    assert "kd_recipes.losses.ForwardKL" in html
    assert ":class:" not in html
